"""The greedy soup (2203.05482, recipe 1): candidates are averaged as long as a score does not fall."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, PyTree

from unlearnjax.errors import UserError
from unlearnjax.merging.api import checked_leaves


class Soup(NamedTuple):
    """A greedy soup."""

    delta: Any
    """The members' mean; each leaf in its own dtype."""
    members: Bool[Array, "N"]
    order: Int32[Array, "N"]
    """The candidates from the best alone to the worst."""
    alone: Float32[Array, "N"]
    """Each candidate's own score."""
    score: Float32[Array, ""]
    """The soup's."""


def greedy(deltas: PyTree[Float[Array, "N ..."]], score: Callable[[Any], Float[Array, ""]]) -> Soup:
    """Average the candidates that do not make it worse.

    From the candidate with the best score on, each is added to the mean and stays if the score is then at least what
    it was before. Equal candidates come in their order; NaN is worse than any score. One program, 2 N - 1 scores.

    Args:
      deltas: a pytree whose leaves have a leading axis N; floating dtypes.
      score: (delta) -> scalar, the higher the better, on held-out data; pure and traceable. For unlearning, say how
        well it forgets subject to what it retains.

    Raises:
      UserError: no leaves, N = 0, leaves that disagree on N, or a leaf that is not floating or not finite.
    """
    checked_leaves(deltas)
    return jax.jit(_greedy, static_argnums=1)(deltas, score)


def _greedy(deltas: Any, score: Callable[[Any], Float[Array, ""]]) -> Soup:
    def valued(delta: Any) -> Float32[Array, ""]:
        value = jnp.asarray(score(delta)).astype(jnp.float32)
        if value.shape != ():
            raise UserError(f"greedy: the score must be one number, not of shape {value.shape}")
        return jnp.where(jnp.isnan(value), -jnp.inf, value)

    alone = jax.lax.map(valued, deltas)
    order = jnp.argsort(alone, descending=True, stable=True).astype(jnp.int32)
    pick = lambda i: jax.tree.map(lambda x: x[i].astype(jnp.float32), deltas)  # noqa: E731
    typed = lambda sums, number: jax.tree.map(lambda s, x: (s / number).astype(x.dtype), sums, deltas)  # noqa: E731

    def add(carry: tuple, i: Int32[Array, ""]) -> tuple[tuple, Bool[Array, ""]]:
        sums, number, best = carry
        more = jax.tree.map(jnp.add, sums, pick(i))
        value = valued(typed(more, number + 1))
        stays = value >= best
        sums = jax.tree.map(lambda a, b: jnp.where(stays, a, b), more, sums)
        return (sums, number + stays.astype(jnp.float32), jnp.where(stays, value, best)), stays

    start = (pick(order[0]), jnp.float32(1), alone[order[0]])
    (sums, number, best), stays = jax.lax.scan(add, start, order[1:])
    members = jnp.zeros(alone.shape, bool).at[order].set(jnp.concatenate([jnp.ones(1, bool), stays]))
    return Soup(typed(sums, number), members, order, alone, best)
