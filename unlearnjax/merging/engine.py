"""Runs a rule over the leaves of a tree: rounds, then combine. Scope and stacked layers are handled here only."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32
from unlearnjax_kernels.dare.api import Part

from unlearnjax.merging.product import Product
from unlearnjax.merging.protocol import Draws, Round, Rule, Settings, State


def run(
    rule: Rule,
    leaves: Sequence[Float[Array, "N ..."] | Product],
    weights: Float32[Array, "N"],
    starts: Sequence[State],
    keys: Sequence[Array | None],
    bases: Sequence[Array | None],
    settings: Settings,
    *,
    stacked: int = 0,
    reduce: Callable[[Any], Any] = lambda partials: partials,
    parts: Sequence[Part | None] | None = None,
) -> list[Float[Array, "..."]]:
    """Merges the leaves of one tree. Pure and traceable; checks nothing.

    Args:
        leaves: [N, ...] each, any floating dtype; or a `Product`, of which one layer is formed at a time, anew in each
            pass over the data.
        starts: `rule.start` for each leaf (scope "leaf") or once for all of them (scope "tree").
        keys, bases: one per leaf, or None.
        stacked: how many axes after N only stack separate tensors ([N, layers, out, in]: 1). Scope "leaf" then means
            each of those tensors.
        reduce: what else partials are summed over: `lambda p: jax.lax.psum(p, axis)` inside a shard_map whose shards
            hold parts of each tensor, or the sum over a stream's chunks.
        parts: which part of its tensor each leaf holds, for rules that draw random numbers; None: all of it.

    Returns:
        The merged leaves, each in its leaf's dtype.
    """
    parts = [None] * len(leaves) if parts is None else parts
    dtypes, leaves = [leaf.dtype for leaf in leaves], [widened(leaf) for leaf in leaves]
    if rule.scope == "leaf":
        found = [
            _leaf(rule, leaf, weights, start, key, base, settings, stacked, reduce, part)
            for leaf, start, key, base, part in zip(leaves, starts, keys, bases, parts, strict=True)
        ]
        return [x.astype(dtype) for x, dtype in zip(found, dtypes, strict=True)]
    (state,) = starts
    members = list(zip(leaves, keys, bases, parts, strict=True))

    def tree_partials(round_: Round, state: State) -> Any:
        return reduce(_partials(round_, members, weights, state, settings, stacked))

    state = _rounds(rule, state, settings, tree_partials)

    def merged(leaf: Array | Product, key: Array | None, base: Array | None, part: Part | None) -> Array:
        def tensor(deltas: Array, key: Array | None, base: Array | None) -> Float32[Array, "..."]:
            return rule.combine(deltas, weights, state, Draws.of(key, part), base, settings)

        return _stacked(tensor, stacked, leaf, key, base)

    return [merged(*member).astype(dtype) for member, dtype in zip(members, dtypes, strict=True)]


def widened(leaf: Any) -> Any:
    """The leaf in float32, as a `Product` is. On a CPU a barrier follows, which lets XLA write it out: LLVM does not
    vectorise comparisons of 16-bit loads."""
    if leaf.dtype == jnp.float32:
        return leaf
    wide = lambda x: x.astype(jnp.float32)  # noqa: E731
    return jax.lax.platform_dependent(leaf, cpu=lambda x: jax.lax.optimization_barrier(wide(x)), default=wide)


def _leaf(
    rule: Rule,
    leaf: Float[Array, "N ..."] | Product,
    weights: Float32[Array, "N"],
    start: State,
    key: Array | None,
    base: Array | None,
    settings: Settings,
    stacked: int,
    reduce: Callable[[Any], Any],
    part: Part | None,
) -> Float[Array, "..."]:
    def tensor(deltas: Array, key: Array | None, base: Array | None) -> Float32[Array, "..."]:
        draws = Draws.of(key, part)

        def own_partials(round_: Round, state: State) -> Any:
            return reduce(round_.statistics(deltas, weights, state, draws, base, settings))

        state = _rounds(rule, start, settings, own_partials)
        return rule.combine(deltas, weights, state, draws, base, settings)

    return _stacked(tensor, stacked, leaf, key, base)


def _rounds(rule: Rule, state: State, settings: Settings, partials: Callable[[Round, State], Any]) -> State:
    for round_ in rule.rounds:
        if round_.settled(state):
            continue

        def step(state: State, round_: Round = round_) -> State:
            if round_.before is not None:
                state = step(state, round_.before)
            return round_.update(state, partials(round_, state), settings)

        def unfinished(state: State, round_: Round = round_) -> Bool[Array, ""]:
            return ~round_.until(state)  # type: ignore[misc]

        state = step(state) if round_.until is None else jax.lax.while_loop(unfinished, step, state)
    return state


def _partials(
    round_: Round,
    members: Sequence[tuple[Array | Product, Array | None, Array | None, Part | None]],
    weights: Array,
    state: State,
    settings: Settings,
    stacked: int,
) -> Any:
    """The round's partials summed over all leaves and their stacked tensors."""
    result = None
    for leaf, key, base, part in members:

        def one(deltas: Array, key: Array | None, base: Array | None, part: Part | None = part) -> Any:
            return round_.statistics(deltas, weights, state, Draws.of(key, part), base, settings)

        found = _stacked(one, stacked, leaf, key, base)
        found = jax.tree.map(lambda p: jnp.sum(p, axis=tuple(range(stacked)), dtype=p.dtype), found)
        result = found if result is None else jax.tree.map(jnp.add, result, found)
    return result


def _stacked(tensor: Callable[..., Any], stacked: int, leaf: Any, key: Array | None, base: Array | None) -> Any:
    """`tensor(deltas, key, base)` mapped over the stacked axes, each tensor with a key of its own.

    The layers of a `Product` are walked one after another instead: deltas of one layer lie in memory, not of all.
    """
    if stacked == 0:
        return tensor(leaf, key, base)
    layers = leaf.shape[1]

    def inner(deltas: Array, k: Array | None, b: Array | None) -> Any:
        return _stacked(tensor, stacked - 1, deltas, k, b)

    if isinstance(leaf, Product):

        def layer(i: Array) -> Any:
            own = None if key is None else jax.random.fold_in(key, i)
            return inner(leaf.layer(i), own, None if base is None else base[i])

        return jax.lax.map(layer, jnp.arange(layers))
    keys = None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(layers))
    return jax.vmap(inner, in_axes=(1, 0, 0))(leaf, keys, base)
