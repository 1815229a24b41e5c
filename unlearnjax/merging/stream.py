"""Merging candidates that come one at a time, in the memory of the result and one candidate."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, PyTree

from unlearnjax.errors import UserError
from unlearnjax.merging.api import check_count, check_hyperparameters, find_rule, methods
from unlearnjax.merging.protocol import MergeMethod, Rule


def merge_stream(
    candidates: Iterable[PyTree[Float[Array, "..."]]],
    method: str | MergeMethod,
    *,
    weights: Iterable[float] | None = None,
    semantics: str | None = None,
    **hyperparameters: Any,
) -> PyTree[Float[Array, "..."]]:
    """Merges deltas as they come; what `merge` gives for all of them stacked, up to the rounding of a sum.

    Args:
        candidates: pytrees of one structure and one set of shapes (without the axis N), taken one after the other and
            not kept.
        method: one that needs no two candidates at once: `unlearnjax methods` says which are streamed.
        weights: one per candidate; None is the rule's default, as in `merge`.
        semantics, hyperparameters: as in `merge`.

    Returns:
        A pytree like a candidate; each leaf in the dtype of the first candidate's, computed in float32.

    Raises:
        UserError: as `merge`; a method that cannot be streamed; no candidate; one of another structure, shape or dtype
            than the first; fewer or more weights than candidates.
    """
    found, rule = find_rule(method, semantics)
    if rule.accumulator is None:
        able = sorted(name for name, other in methods().items() if any(r.accumulator for r in other.rules))
        raise UserError(f"merge_stream: {found.name} needs all candidates at once; streamed are {', '.join(able)}")
    settings = check_hyperparameters(found, rule, hyperparameters)
    if weights is None and rule.accumulator.needs_weights(settings):
        raise UserError(
            f"merge_stream: {found.name} without a division needs weights: the number of candidates is open"
        )
    static = tuple((p.name, settings[p.name]) for p in rule.hyperparameters if p.static)
    numbers = {p.name: jnp.asarray(settings[p.name], jnp.float32) for p in rule.hyperparameters if not p.static}
    start, add, finish = _compiled(rule, static)

    carry: Any = None
    first = treedef = None
    used: list[float] = []
    for number, (candidate, weight) in enumerate(_weighted(candidates, weights)):
        leaves, own = jax.tree_util.tree_flatten_with_path(candidate)
        paths = [jax.tree_util.keystr(path, simple=True, separator="/") or "the array" for path, _ in leaves]
        arrays = [x if isinstance(x, (np.ndarray, jax.Array)) else np.asarray(x) for _, x in leaves]
        kinds = [(path, x.shape, x.dtype) for path, x in zip(paths, arrays, strict=True)]
        if first is None:
            first, treedef = kinds, own
            _check_first(kinds)
            carry = start(arrays)
        else:
            _check_like(kinds, first, number)
        carry, finite = add(carry, arrays, jnp.float32(weight), numbers)
        for path, good in zip(paths, np.asarray(finite), strict=True):
            if not good:
                raise UserError(f"merge: {path} of candidate {number} holds NaN or Inf; leave that candidate out")
        used.append(weight)
    if first is None:
        raise UserError("merge: there are no candidates")
    check_count(found, rule, len(used))
    problem = rule.check_weights(np.asarray(used, np.float32), settings)
    if problem:
        raise UserError(f"merge: weights {used} do not suit {found.name}: {problem}")
    # Leaf by leaf, each carry let go once it is used.
    merged = [finish(carry.pop(0), numbers).astype(dtype) for _, _, dtype in first]
    return jax.tree.unflatten(treedef, merged)


@functools.lru_cache(maxsize=64)
def _compiled(rule: Rule, static: tuple[tuple[str, Any], ...]) -> Any:
    accumulator, fixed = rule.accumulator, dict(static)
    assert accumulator is not None  # `merge_stream` refused the others

    def start(arrays: list[Array]) -> list[Any]:
        return [accumulator.start(x.shape, fixed) for x in arrays]

    # The carry is the result's memory: it is written over.
    @functools.partial(jax.jit, donate_argnums=0)
    def add(
        carry: list[Any], arrays: list[Array], weight: Float32[Array, ""], numbers: dict
    ) -> tuple[list[Any], Array]:
        settings = {**numbers, **fixed}
        added = [accumulator.add(c, x, weight, settings) for c, x in zip(carry, arrays, strict=True)]
        return added, jnp.stack([jnp.isfinite(x).all() for x in arrays])

    def finish(carry: Any, numbers: dict) -> Array:
        return accumulator.finish(carry, {**numbers, **fixed})

    return jax.jit(start), add, jax.jit(finish)


def _weighted(candidates: Iterable[Any], weights: Iterable[float] | None) -> Iterator[tuple[Any, float]]:
    """Each with its weight, 1 where none are given."""
    if weights is None:
        yield from ((candidate, 1.0) for candidate in candidates)
        return
    missing = object()
    for candidate, weight in itertools.zip_longest(candidates, weights, fillvalue=missing):
        if candidate is missing or weight is missing:
            raise UserError("merge: the weights are not as many as the candidates; give one for each")
        number = float(weight)  # type: ignore[arg-type]
        if not np.isfinite(number):
            raise UserError(f"merge: weight {weight} is not finite")
        yield candidate, number


Kinds = list[tuple[str, tuple[int, ...], Any]]


def _check_first(kinds: Kinds) -> None:
    if not kinds:
        raise UserError("merge: a candidate is an empty tree; give at least one array")
    for path, _, dtype in kinds:
        if not jnp.issubdtype(dtype, jnp.floating):
            raise UserError(f"merge: {path} is {dtype}, and only floating deltas are merged; leave it out")


def _check_like(kinds: Kinds, first: Kinds, number: int) -> None:
    names, expected = [path for path, _, _ in kinds], [path for path, _, _ in first]
    if names != expected:
        other = sorted(set(names) ^ set(expected))
        raise UserError(f"merge: candidate {number} has other arrays than candidate 0: {', '.join(other)}")
    for (path, shape, dtype), (_, shape0, dtype0) in zip(kinds, first, strict=True):
        if (shape, dtype) != (shape0, dtype0):
            raise UserError(
                f"merge: {path} of candidate {number} is {dtype}{shape} and of candidate 0 {dtype0}{shape0}"
            )
