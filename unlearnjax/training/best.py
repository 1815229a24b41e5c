"""Keeping each candidate as it was when its own loss on a sample of rows was lowest (Selective Amnesia, 2504.12996)."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree

from unlearnjax.data.buckets import round_up
from unlearnjax.data.schedule import Step
from unlearnjax.data.tokens import Store, Tokens
from unlearnjax.training.hyperparameters import Hyperparameters
from unlearnjax.training.state import Best, State, choose
from unlearnjax.training.step import Task, Work, by_variant, loss_of, mapped


class Batches(NamedTuple):
    """The sample's rows by side, -1 where a slot is empty; the width of the rows and of the answers."""

    rows: dict[str, Int[np.ndarray, "batches rows"]]
    width: int
    answers: int


def sampled(sides: Mapping[str, Tokens], most: int, batch: int) -> Batches:
    """At most `most` rows of each side (of a pool: of each of its two sets), evenly spaced, in batches.

    A pool's batches hold rows of both sets, in turns.
    """
    chosen: dict[str, np.ndarray] = {}
    for side, tokens in sides.items():
        count = len(tokens.length)
        if tokens.border is None:
            chosen[side] = np.asarray(_evenly(count, most))
            continue
        parts = [_evenly(tokens.border, most), [tokens.border + i for i in _evenly(count - tokens.border, most)]]
        # In turns, also where one set is shorter.
        places = [((i + 0.5) / len(part), row) for part in parts for i, row in enumerate(part)]
        chosen[side] = np.asarray([row for _, row in sorted(places)])
    longest = max(len(rows) for rows in chosen.values())
    batches = -(-longest // batch)
    rows = {side: np.full((batches * batch,), -1, np.int32) for side in chosen}
    for side, own in chosen.items():
        rows[side][:longest] = np.resize(own, longest)
    width = max(int(sides[side].length[own].max()) for side, own in chosen.items())
    answers = max(int(sides[side].answer_length[own].max()) for side, own in chosen.items())
    width = round_up(width, 8)
    return Batches({s: r.reshape(batches, batch) for s, r in rows.items()}, width, min(round_up(answers, 8), width))


def _evenly(count: int, most: int) -> list[int]:
    return [round(i * (count - 1) / max(1, min(most, count) - 1)) for i in range(min(most, count))]


class Assessor(NamedTuple):
    """`every`: updates of a candidate between two looks at it; its last update is one more."""

    every: int
    batches: Batches

    def due(self, updates: Int[np.ndarray, " N"], totals: Int[np.ndarray, " N"], step: Step) -> Bool[np.ndarray, " N"]:
        """The candidates to look at after a step that made their planned updates `updates`, of `totals`."""
        found: np.ndarray = step.update & ((updates % self.every == 0) | (updates == totals))
        return found

    def compiled(self, task: Task) -> Callable[..., State]:
        """The states with their best, of (params, stores, states, h, epoch [N], due [N]); buffers are donated."""
        quiet = task._replace(use_dropout=False, tokens_at_once=1)  # one candidate at a time on each device

        def losses(
            own: Task, params: PyTree[Array], stores: dict[str, Store], stacked: tuple[State, Hyperparameters, Array]
        ) -> Array:
            def one(state: State, h: Hyperparameters, epoch: Array) -> Array:
                def batch(rows: dict[str, Array]) -> Array:
                    first = next(iter(rows.values()))
                    weight = jnp.zeros(first.shape, jnp.float32).at[0].set(1.0)
                    flag = jnp.zeros((), bool)
                    work = Work(rows, jnp.zeros_like(first), weight, flag, epoch, jnp.ones(()), flag)
                    width, answers = self.batches.width, self.batches.answers
                    return loss_of(own, params, state.trainable, stores, work, h, state, width, answers)[0]

                rows = {side: jnp.asarray(r) for side, r in self.batches.rows.items()}
                return jnp.mean(jax.lax.map(batch, rows))

            return mapped(own, one, stacked, 1)

        def run(params: Any, stores: Any, states: State, h: Any, epoch: Array, due: Array) -> State:
            light = states._replace(moments=(), gradient=(), best=())
            found = by_variant(quiet, lambda own, x: losses(own, params, stores, x), (light, h, epoch))
            better = due & states.alive & (found < states.best.loss)
            new = Best(states.trainable, found, states.updates)
            return states._replace(best=jax.vmap(choose)(better, new, states.best))

        return jax.jit(run, donate_argnums=(2,))
