"""The loop over steps: dispatch, collect metrics, show progress."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from unlearnjax.data.schedule import Schedule, Step
from unlearnjax.data.tokens import Store
from unlearnjax.training.hyperparameters import Hyperparameters
from unlearnjax.training.state import State, init_state
from unlearnjax.training.step import Metrics, Task, Work, compiled_step


class Curve(NamedTuple):
    """One candidate's history, a point per update."""

    update: list[int]
    loss: list[float]
    terms: dict[str, list[float]]
    gradient_norm: list[float]


class Result(NamedTuple):
    """A finished run. `diverged_at[i]` is the number of updates candidate i had taken when it diverged, or None."""

    states: State
    curves: list[Curve]
    diverged_at: list[int | None]
    seconds: float
    candidate_steps: int  # optimizer updates, summed over candidates
    steady_seconds: float  # seconds of the steps after each program's first call, which compiles
    steady_candidate_steps: int


def work_of(step: Step) -> Work:
    rows = {name: jnp.asarray(r) for name, r in step.rows.items()}
    return Work(rows, jnp.asarray(step.micro), jnp.asarray(step.micro_weight), jnp.asarray(step.update))


def _record(curves: list[Curve], pending: list[dict[str, float]], step: Step, got: Metrics, alive: np.ndarray) -> None:
    for i, curve in enumerate(curves):
        if not (next(iter(step.rows.values()))[i] >= 0).any():
            continue
        pending[i]["loss"] = pending[i].get("loss", 0.0) + float(got.loss[i])
        for name, values in got.terms.items():
            pending[i][name] = pending[i].get(name, 0.0) + float(values[i])
        if step.update[i]:
            if alive[i]:
                curve.update.append(len(curve.update) + 1)
                curve.loss.append(pending[i]["loss"])
                curve.gradient_norm.append(float(got.gradient_norm[i]))
                for name in got.terms:
                    curve.terms[name].append(pending[i][name])
            pending[i].clear()


def train(
    task: Task,
    params: PyTree,
    stores: dict[str, Store],
    schedule: Schedule,
    h: Hyperparameters,
    *,
    progress: bool = False,
    label: str = "training",
    after_step: Callable[[int, State], None] | None = None,
) -> Result:
    """Train all candidates of `h` (stacked) through `schedule`.

    Args:
      progress: show a bar with candidate-steps (optimizer updates summed over candidates) per second.
      after_step: called with the number of steps done and the states, which the next step will overwrite.
    """
    n = h.learning_rate.shape[0]
    states = jax.jit(jax.vmap(lambda c: init_state(task.adapter, params, c)))(h)
    run = compiled_step(task)
    curves = [Curve([], [], {t.name: [] for t in task.objective.terms}, []) for _ in range(n)]
    pending: list[dict[str, float]] = [{} for _ in range(n)]
    diverged: list[int | None] = [None] * n
    waiting: list[tuple[Step, Metrics, Any, Any]] = []
    total = int(schedule.updates.sum())
    bar = _bar(total, label, progress)

    def collect(keep: int) -> None:
        # Reading a metric waits for its step; staying a few steps behind keeps the device busy.
        while len(waiting) > keep:
            step, got, alive, updates = jax.device_get(waiting.pop(0))
            _record(curves, pending, step, got, alive)
            for i in range(n):
                if not alive[i] and diverged[i] is None:
                    diverged[i] = int(updates[i])
            bar.update(int(step.update.sum()))

    seen: set[tuple[int, int]] = set()
    steady, steady_steps = 0.0, 0
    begin = time.perf_counter()
    with contextlib.closing(bar):
        for count, step in enumerate(schedule.steps):
            program = (step.width, step.answers)
            first = program not in seen
            seen.add(program)
            if first:
                jax.block_until_ready(states)
            started = time.perf_counter()
            states, metrics = run(params, stores, states, work_of(step), h, step.width, step.answers)
            # Copies: the next step takes over the states' own buffers.
            waiting.append((step, metrics, states.alive + False, states.updates + 0))
            collect(keep=4)
            if first:
                jax.block_until_ready(states)
            else:
                steady += time.perf_counter() - started
                steady_steps += int(step.update.sum())
            if after_step is not None:
                after_step(count + 1, states)
        collect(keep=0)
        jax.block_until_ready(states)
    seconds = time.perf_counter() - begin
    return Result(states, curves, diverged, seconds, sum(len(c.update) for c in curves), steady, steady_steps)


def _bar(total: int, label: str, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit="candidate-step", disable=not show, dynamic_ncols=True)


def finished(result: Result) -> Sequence[int]:
    """The candidates that did not diverge."""
    return [i for i, at in enumerate(result.diverged_at) if at is None]
