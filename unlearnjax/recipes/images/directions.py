"""The merges of a recipe: from candidates on disk to the directions that are subtracted."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from unlearnjax.errors import UserError
from unlearnjax.merging.api import check_hyperparameters, find_rule, merge
from unlearnjax.merging.stream import merge_stream
from unlearnjax.recipes.images.schema import ImageMerge
from unlearnjax.recipes.images.store import Store


class Sparsity(NamedTuple):
    """Share of weights that a direction does not touch, of those that were trained and of all the model's."""

    trained: float
    all: float


def direction(wanted: ImageMerge, store: Store, names: Sequence[str], key: jax.Array) -> PyTree[np.ndarray]:
    """One merge of `unlearnjax.merge` over the candidates `names`: in the memory of one candidate where the method is
    streamed, else of all of them.

    Raises:
      UserError: from the method; no candidate is left.
    """
    if not names:
        raise UserError("no candidate is left")
    method, rule = find_rule(wanted.method, wanted.semantics)
    filled = check_hyperparameters(method, rule, wanted.hyperparameters)
    settings: dict[str, Any] = {**wanted.hyperparameters, "semantics": wanted.semantics}
    if rule.accumulator is not None and not rule.accumulator.needs_weights(filled):
        merged = merge_stream(store.deltas(names), wanted.method, **settings)
    else:
        merged = merge(store.stacked(names), wanted.method, key=key, **settings)
    return jax.tree.map(np.asarray, merged)


def sparsity(delta: PyTree[np.ndarray], weights: tuple[int, int]) -> Sparsity:
    """Args: weights: how many are trained, and how many the model has in all."""
    kept = sum(int(np.count_nonzero(x)) for x in jax.tree.leaves(delta))
    trained, every = weights
    return Sparsity(1 - kept / trained, 1 - kept / every)


class Soup(NamedTuple):
    """A greedy soup: its mean, its members in the order they were taken."""

    delta: PyTree[np.ndarray]
    members: list[str]


def greedy_soup(store: Store, order: Sequence[str], alone: float, cost: Callable[[PyTree[np.ndarray]], float]) -> Soup:
    """Candidates from the best on, each kept in the mean if the rule's cost, searched anew over lambda, falls
    (negmerge.md, section 4: ours, since the paper does not say).

    Args:
      order: the candidates from the best alone to the worst. alone: the first one's cost.
      cost: of a direction at its best lambda.
    """
    total, members, best = store.delta(order[0]), [order[0]], alone
    for name in order[1:]:
        more = jax.tree.map(np.add, total, store.delta(name))
        value = cost(jax.tree.map(lambda x: x / np.float32(len(members) + 1), more))
        if value < best:
            total, best = more, value
            members.append(name)
    return Soup(jax.tree.map(lambda x: x / np.float32(len(members)), total), members)
