"""The loop over steps: dispatch, collect metrics, show progress."""

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from unlearnjax.data.schedule import Schedule, Step
from unlearnjax.data.tokens import Store
from unlearnjax.distributed.mesh import mesh_of
from unlearnjax.distributed.processes import Agreement, put
from unlearnjax.distributed.rules import of_candidates, of_store, of_work, whole
from unlearnjax.training.best import Assessor
from unlearnjax.training.hyperparameters import Hyperparameters
from unlearnjax.training.interrupt import Interrupted, Stop
from unlearnjax.training.pieces import held
from unlearnjax.training.state import State, init_state
from unlearnjax.training.step import Metrics, Task, Work, by_variant, compiled_step, states_shardings


class Curve(NamedTuple):
    """One candidate's history, a point per update."""

    update: list[int]
    loss: list[float]
    terms: dict[str, list[float]]
    gradient_norm: list[float]


class Clock(NamedTuple):
    """Time spent. `steady` leaves out the steps of each program's first call, which compiles."""

    seconds: float = 0.0
    steady_seconds: float = 0.0
    steady_candidate_steps: int = 0


class Snapshot(NamedTuple):
    """A run between two steps: all that the rest of it depends on, and what it has recorded so far."""

    step: int  # steps of the schedule that are done
    states: State  # in host memory
    curves: list[Curve]
    pending: list[dict[str, float]]  # sums over the steps of the update that each candidate is in
    diverged_at: list[int | None]
    clock: Clock


class Keeper(Protocol):
    """Where snapshots go (see `unlearnjax.training.keeper`)."""

    @property
    def saved(self) -> int | None:
        """The step of the newest snapshot that is safe."""

    def due(self) -> bool:
        """Whether to take one now."""

    def save(self, snapshot: Snapshot, wait: bool) -> None:
        """Keep one; `wait` until it is safe."""


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
    n = len(step.update)
    share = np.ones(n, np.float32) if step.share is None else step.share
    restart = np.zeros(n, bool) if step.restart is None else step.restart
    epochs = np.full(n, step.epoch, np.int32) if step.epochs is None else step.epochs
    columns = (step.micro, step.micro_weight, step.update, epochs, share, restart)
    return Work(rows, *map(jnp.asarray, columns))


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
    assessor: Assessor | None = None,
    start: Snapshot | None = None,
    keeper: Keeper | None = None,
    stop: Stop | None = None,
) -> Result:
    """Train all candidates of `h` (stacked) through `schedule`.

    A run that goes on from a snapshot of itself gives the same result, bit for bit, where device, versions and all
    arguments are the same.

    Args:
      params: where they lie on several devices (see `unlearnjax.distributed`), these share the work.
      progress: show a bar with candidate-steps (optimizer updates summed over candidates) per second.
      after_step: called with the number of steps done and the states, which the next step will overwrite.
      assessor: looks at the candidates now and then and keeps the best of each in the states (`Task.keep_best`).
      start: where to go on; its lists, and on a mesh its arrays on devices, are taken over. Default: the beginning.
      keeper: gets a snapshot when it asks for one, when `stop` asks to stop, and after the last step.
      stop: looked at between two steps.

    Raises:
      Interrupted: `stop` asked for it.
    """
    n = h.learning_rate.shape[0]
    mesh = mesh_of(params)
    task = task._replace(mesh=mesh)
    if mesh is not None:
        stores = put(stores, of_store(mesh, stores))
        h = put(h, of_candidates(mesh, {}, h))
    if start is None:
        blank = [Curve([], [], {t.name: [] for t in task.objective.terms}, []) for _ in range(n)]
        start = Snapshot(0, fresh_states(task, params, h), blank, [{} for _ in range(n)], [None] * n, Clock())
    else:
        # The step takes over its argument's buffers: of one device they are copied, restored ones of a mesh are not.
        if mesh is None:
            states = jax.device_put(start.states, may_alias=False)
        else:
            states = put(start.states, states_shardings(task, start.states))
        start = start._replace(states=states)
    states, curves, pending, diverged = start.states, start.curves, start.pending, start.diverged_at
    run, updates = (
        compiled_step(task),
        sum((s.update.astype(int) for s in schedule.steps[: start.step]), np.zeros(n, int)),
    )
    assess = None if assessor is None else assessor.compiled(task)
    # Copies: the next step takes over the states' own buffers.
    copied = jax.jit(
        lambda alive, updates: (alive | False, updates + 0), out_shardings=None if mesh is None else whole(mesh)
    )
    waiting: list[tuple[Step, Metrics, Any, Any]] = []
    steps = schedule.steps
    bar = _bar(int(schedule.updates.sum()), label, progress, sum(int(s.update.sum()) for s in steps[: start.step]))

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
    steady, steady_steps = start.clock.steady_seconds, start.clock.steady_candidate_steps
    begin = time.perf_counter() - start.clock.seconds

    def snapshot(done: int) -> Snapshot:
        collect(keep=0)
        copies = [Curve(list(c.update), list(c.loss), {k: list(v) for k, v in c.terms.items()}, list(c.gradient_norm))
                  for c in curves]  # fmt: skip
        clock = Clock(time.perf_counter() - begin, steady, steady_steps)
        # Copies on CPU too, where the next step overwrites the buffers.
        host = jax.tree.map(np.array if mesh is None else held, states)
        return Snapshot(done, host, copies, [dict(p) for p in pending], list(diverged), clock)

    def wishes() -> tuple[int, int]:
        return 0 if stop is None else stop.signum, keeper is not None and keeper.due()

    agree = Agreement()
    with contextlib.closing(bar), stop.polling() if stop is not None else contextlib.nullcontext():
        for done, step in enumerate(steps[start.step :], start=start.step + 1):
            program = (step.width, step.answers)
            first = program not in seen
            seen.add(program)
            if first:
                jax.block_until_ready(states)
            started = time.perf_counter()
            work = work_of(step)
            if mesh is not None:
                work = put(work, of_work(mesh, work))
            states, metrics = run(params, stores, states, work, h, step.width, step.answers)
            waiting.append((step, metrics, *copied(states.alive, states.updates)))
            collect(keep=4)
            if first:
                jax.block_until_ready(states)
            spent = time.perf_counter() - started
            updates = updates + step.update
            if assessor is not None and assess is not None:
                due = assessor.due(updates, schedule.updates, step)
                if due.any():
                    states = assess(params, stores, states, h, work.epoch, jnp.asarray(due))
            if after_step is not None:
                after_step(done, states)
            # Processes of one job stop and save after the same step.
            started = time.perf_counter()
            signum, save = agree(wishes, done == len(steps))
            if not first:
                steady += spent + time.perf_counter() - started  # several processes wait for their devices here
                steady_steps += int(step.update.sum())
            asked = signum != 0
            if keeper is not None and (asked or done == len(steps) or save):
                keeper.save(snapshot(done), wait=asked or done == len(steps))
            if asked:
                raise Interrupted(signum, _where(done, len(steps), keeper))
        collect(keep=0)
        jax.block_until_ready(states)
    seconds = time.perf_counter() - begin
    return Result(states, curves, diverged, seconds, sum(len(c.update) for c in curves), steady, steady_steps)


def abstract_states(task: Task, params: PyTree, h: Hyperparameters) -> State:
    """Shapes and dtypes of all candidates' states, and where `params` lie on a mesh their shardings there."""
    states: State = jax.eval_shape(lambda: fresh_states(task, params, h))
    mesh = mesh_of(params)
    if mesh is None:
        return states
    places = states_shardings(task._replace(mesh=mesh), states)
    like = lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(like, states, places)


def fresh_states(task: Task, params: PyTree, h: Hyperparameters) -> State:
    """All candidates before their first step."""
    memory = {t.name: t.adaptive.names for t in task.objective.terms if t.adaptive is not None}

    def every(params: PyTree, h: Hyperparameters) -> State:
        init = lambda own, c: init_state(own.adapter, params, c, memory, task.keep_best)  # noqa: E731
        one = lambda own, h: jax.vmap(lambda c: init(own, c))(h)  # noqa: E731
        states: State = by_variant(task, one, h)
        if task.mesh is None:
            return states
        return jax.lax.with_sharding_constraint(states, states_shardings(task, states))

    return jax.jit(every)(params, h)


def _where(done: int, total: int, keeper: Keeper | None) -> str:
    """What is left of a run that was stopped after step `done`."""
    if keeper is None:
        return f"after step {done} of {total}"
    if keeper.saved == done:
        return f"after step {done} of {total}, which is saved"
    saved = "nothing is saved" if keeper.saved is None else f"step {keeper.saved} is what is saved"
    return f"after step {done} of {total}, which could not be saved ({saved})"


def _bar(total: int, label: str, show: bool, initial: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, initial=initial, desc=label, unit="candidate-step", disable=not show, dynamic_ncols=True)


def finished(result: Result) -> Sequence[int]:
    """The candidates that did not diverge."""
    return [i for i, at in enumerate(result.diverged_at) if at is None]
