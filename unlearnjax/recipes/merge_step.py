"""The merges of a recipe: from a stack of trained LoRA candidates to models that can be evaluated and exported."""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, PyTree

from unlearnjax.adapters.lora import lora_weights, scaled
from unlearnjax.distributed.processes import fetch
from unlearnjax.distributed.rules import sharding
from unlearnjax.errors import UserError
from unlearnjax.merging.api import merge, merge_stacked
from unlearnjax.merging.core_space import truncate_lora
from unlearnjax.merging.geometry import gram, lengths
from unlearnjax.merging.lora_space import (
    concatenate_lora,
    lora_delta,
    merge_lora,
    to_lora,
    truncation_error,
    truncation_errors,
)
from unlearnjax.recipes.schema import Merge, rule_of
from unlearnjax.training.hyperparameters import index

SUMS = ("linear", "uniform", "task_arithmetic")  # merges whose delta is a weighted sum of the candidates'


class Trial(NamedTuple):
    """One scale of a searched merge, and its means of the official scores on the sample."""

    candidates: list[int]
    scale: float
    forget: float
    retain: float


class Found(NamedTuple):
    """What a search tried, and the least retain score that it accepted."""

    floor: float
    trials: list[Trial]


class Merged(NamedTuple):
    """One merge's result. Exactly one of `lora` (scale 1) and `delta` is what is evaluated; `core` is the delta as the
    adapter (scale 1) that a merge in core space computed.

    `length` is its Frobenius norm over the mean of the candidates', and `rescaled` what the method's own result was
    multiplied by: for that, and by the merge's `scale`, with a minus where it is subtracted.
    """

    merge: Merge
    semantics: str
    candidates: list[int]  # indices of the candidates that went in
    lora: PyTree[Array] | None
    delta: PyTree[Array] | None
    length: float | None  # None where the candidates have none
    rescaled: float = 1.0
    core: PyTree[Array] | None = None
    scale: float = 1.0
    search: Found | None = None


class Exported(NamedTuple):
    """A merge as an adapter of rank `rank` (scale 1), and what of the delta that rank misses (relative, Frobenius).

    lora, rank: None where a candidate that went in is no LoRA: such a merge is written as a model.
    """

    lora: PyTree[Array] | None
    rank: int | None
    truncation_error: float


def merge_candidates(
    wanted: Merge,
    stacked: PyTree[Array],
    scale: Array,
    kept: Sequence[int],
    seed: int,
    ranks: Sequence[int] | None = None,
    deltas: Mapping[int, PyTree[Array]] = MappingProxyType({}),
    mesh: Mesh | None = None,
) -> Merged:
    """Merge the candidates `kept` of a stack ([N, ...] leaves, scale [N]); weights of the others are dropped.

    Args:
      ranks: of each of the N where the stack is padded; None: all are the stack's.
      deltas: of the candidates that are no LoRAs, by their place; a merge with one of them works on full deltas.
      mesh: of the base, among whose devices the stacks of full deltas are cut.

    Raises:
      UserError: from the method (see `unlearnjax.merge`), or no candidate is left.
    """
    if not kept:
        raise UserError("no candidate is left, all of them diverged; lower learning_rate")
    chosen = np.asarray(kept, np.int32)
    semantics = rule_of(wanted)[1].semantics
    if any(i in deltas for i in kept):
        own_deltas = [delta_at(i, stacked, scale, deltas) for i in kept]
        return _merge_deltas(wanted, semantics, own_deltas, list(kept), seed, mesh)
    core = wanted.space == "core"
    used = None if ranks is None else [ranks[i] for i in kept]
    more: dict[str, Any] = {"ranks": used, "compress": wanted.compress} if core else {}
    mine = _picked(stacked, chosen)
    result = merge_lora(
        mine, scale[chosen], wanted.method, wanted.space,
        weights=_weights(wanted, kept), semantics=semantics, key=jax.random.key(seed), **more, **wanted.hyperparameters,
    )  # fmt: skip
    in_factors = wanted.space != "delta"
    adapters = scaled(mine, scale[chosen])
    mean = float(np.mean(lengths(gram(adapters).whole)))
    own = float(lengths(gram(jax.tree.map(lambda x: x[None], result)).whole)[0]) if in_factors else _norm(result)
    factor = 1.0
    if wanted.length is not None and mean > 0 and own > 0:
        factor = wanted.length * mean / own
        result = scaled(result, factor) if in_factors else jax.tree.map(lambda x: x * factor, result)
    length = own * factor / mean if mean > 0 else None
    if core:  # evaluated as weights: its rank is not the candidates'
        return Merged(wanted, semantics, list(kept), None, lora_delta(result, 1.0), length, factor, result)
    lora, delta = (result, None) if in_factors else (None, result)
    return Merged(wanted, semantics, list(kept), lora, delta, length, factor)


def _picked(stacked: PyTree[Array], chosen: np.ndarray) -> PyTree[Array]:
    """These candidates of a stack; all of them are the stack itself, which lies where training laid it."""
    count = jax.tree.leaves(stacked)[0].shape[0]
    return stacked if list(chosen) == list(range(count)) else jax.tree.map(lambda x: x[chosen], stacked)


def delta_at(i: int, stacked: PyTree[Array] | None, scale: Array, deltas: Mapping[int, PyTree[Array]]) -> PyTree[Array]:
    """Candidate i's change of the weights."""
    return deltas[i] if i in deltas else lora_delta(index(stacked, i), scale[i])


def _merge_deltas(
    wanted: Merge, semantics: str, own: Sequence[PyTree[Array]], kept: list[int], seed: int, mesh: Mesh | None
) -> Merged:
    """Merge full deltas. A tensor that a candidate did not train is zero in it."""
    named = [{jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(d)} for d in own]
    like = {name: leaf for one in named for name, leaf in one.items()}
    rule = rule_of(wanted)[1]
    # Tensors that do not know of each other are merged one by one: all candidates' at once may not fit a device.
    parts = [list(like)] if rule.scope == "tree" else [[name] for name in like]
    merged: dict[str, np.ndarray] = {}
    for part in parts:
        stack = {n: stacked_over(mesh, [one.get(n) for one in named], like[n].shape) for n in part}
        done = merge_stacked(
            stack, wanted.method, weights=_weights(wanted, kept), semantics=semantics, key=jax.random.key(seed),
            stacked=1, **wanted.hyperparameters,
        )  # fmt: skip
        merged |= fetch(done)
    shape = functools.reduce(overlaid, own)
    places = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(shape)]
    delta = jax.tree.unflatten(jax.tree.structure(shape), [merged[name] for name in places])
    mean, own_length = float(np.mean([_norm(d) for d in own])), _norm(delta)
    factor = 1.0
    if wanted.length is not None and mean > 0 and own_length > 0:
        factor = wanted.length * mean / own_length
        delta = jax.tree.map(lambda x: x * factor, delta)
    length = own_length * factor / mean if mean > 0 else None
    return Merged(wanted, semantics, kept, None, delta, length, factor)


def stacked_over(mesh: Mesh | None, own: Sequence[Any], shape: Sequence[int]) -> Array:
    """Candidates' deltas of one tensor as [N, ...], each device with all candidates' part of some rows (see
    `cut_for_merging`), so that none holds the whole stack.

    Args:
      own: None where a candidate did not train the tensor.
      shape: of the tensor, its first axis the layers'.
    """
    if mesh is None:
        return jnp.stack([jnp.zeros(shape, jnp.float32) if x is None else jnp.asarray(x) for x in own])
    # In host memory, where those of candidates that trained weights are.
    held = [None if x is None else fetch(x) for x in own]
    axes = [None, None, "merged", *[None] * len(shape)][: 1 + len(shape)]
    whole_shape = (len(own), *shape)

    def cut(index: Any) -> np.ndarray:
        zeros = np.broadcast_to(np.float32(0), shape)
        return np.stack([(zeros if x is None else x)[index[1:]] for x in held])

    return jax.make_array_from_callback(whole_shape, sharding(mesh, axes, whole_shape), cut)


def overlaid(one: PyTree[Array], other: PyTree[Array]) -> PyTree[Array]:
    """Both trees' dictionaries in one; a leaf of both is the first one's."""
    if not isinstance(one, dict):
        return one
    more = {name: tree for name, tree in other.items() if name not in one}
    return {**{name: overlaid(tree, other[name]) if name in other else tree for name, tree in one.items()}, **more}


def at_scale(merged: Merged, scale: float) -> Merged:
    """The merge times `scale`, or minus that where it is to be subtracted. At scale 0 it is the base, bit for bit."""
    factor = -scale if merged.merge.negate else scale
    if factor == 1:
        return merged

    def times(lora: PyTree[Array] | None) -> PyTree[Array] | None:
        return None if lora is None else scaled(lora, factor)

    delta = None if merged.delta is None else jax.tree.map(lambda x: x * factor, merged.delta)
    length = None if merged.length is None else merged.length * scale
    return merged._replace(
        lora=times(merged.lora), delta=delta, core=times(merged.core), length=length,
        rescaled=merged.rescaled * factor, scale=scale,
    )  # fmt: skip


def delta_of(merged: Merged) -> PyTree[Array]:
    """The change of the weights, whatever space the merge was made in."""
    return lora_weights(merged.lora) if merged.lora is not None else merged.delta


def _norm(delta: PyTree[Array]) -> float:
    return float(np.sqrt(sum(float(jnp.sum(jnp.square(x.astype(jnp.float32)))) for x in jax.tree.leaves(delta))))


def _weights(wanted: Merge, kept: Sequence[int]) -> Float[Array, " N"] | None:
    return None if wanted.weights is None else jnp.asarray([wanted.weights[i] for i in kept], jnp.float32)


def export(
    merged: Merged, stacked: PyTree[Array], scale: Array, largest_rank: int,
    deltas: Mapping[int, PyTree[Array]] = MappingProxyType({}),
) -> Exported:  # fmt: skip
    """The merge as an adapter: exact for a sum of deltas (candidates side by side) and in core space, unless a rank is
    given; truncated for others. None at all where one of `deltas`' candidates went in."""
    if any(i in deltas for i in merged.candidates):
        return Exported(None, None, 0.0)
    if merged.lora is not None:
        return Exported(merged.lora, _pairs(merged.lora)[0]["a"].shape[-2], 0.0)
    assert merged.delta is not None
    if merged.core is not None:
        rank = merged.merge.rank or max(pair["a"].shape[-2] for pair in _pairs(merged.core))
        lora = truncate_lora(merged.core, rank)  # or pads, where linears have fewer directions
        return Exported(lora, rank, truncation_error(merged.delta, lora))
    if merged.merge.method in SUMS:
        chosen = np.asarray(merged.candidates, np.int32)
        mine = jax.tree.map(lambda x: x[chosen], stacked)
        lora = concatenate_lora(mine, scale[chosen], _coefficients(merged))
        if merged.merge.rank is not None:
            lora = truncate_lora(lora, merged.merge.rank)
            return Exported(lora, merged.merge.rank, truncation_error(merged.delta, lora))
        # Rounding only; the largest linear's.
        return Exported(
            lora, _pairs(lora)[0]["a"].shape[-2], max(truncation_errors(merged.delta, lora).values(), default=0.0)
        )
    rank = merged.merge.rank or largest_rank
    low = to_lora(merged.delta, rank)
    return Exported(low.lora, rank, low.truncation_error)


def _coefficients(merged: Merged) -> Float[Array, " N"]:
    """What a linear merge multiplies each of its candidates by: its action on the unit vectors."""
    units = jnp.eye(len(merged.candidates), dtype=jnp.float32)
    weights = _weights(merged.merge, merged.candidates)
    own = merge(units, merged.merge.method, weights=weights, semantics=merged.semantics, **merged.merge.hyperparameters)
    return own * jnp.float32(merged.rescaled)


def _pairs(lora: PyTree[Array]) -> list[dict[str, Array]]:
    return jax.tree.leaves(lora, is_leaf=lambda x: isinstance(x, dict) and set(x) == {"a", "b"})


def describe(merged: Merged, exported: Exported, names: Sequence[str]) -> dict[str, Any]:
    """The merge's entry in the report."""
    hyper = dict(merged.merge.hyperparameters)
    weights = _weights(merged.merge, merged.candidates)
    if weights is not None:
        hyper["weights"] = weights.tolist()
    if merged.merge.compress is not None:
        hyper["compress"] = merged.merge.compress
    more: dict[str, Any] = {"negated": True} if merged.merge.negate else {}
    if merged.merge.scale != 1:
        more["scale"] = merged.scale
    if merged.search is not None:
        trials = merged.search.trials
        several = len({tuple(t.candidates) for t in trials}) > 1
        more["search"] = {
            "floor": merged.search.floor,
            "trials": [
                {"scale": t.scale, "forget": t.forget, "retain": t.retain}
                | ({"candidate": names[t.candidates[0]]} if several else {})
                for t in trials
            ],
        }
    return {
        "name": merged.merge.name,
        "method": merged.merge.method,
        "space": merged.merge.space,
        "semantics": merged.semantics,
        "hyperparameters": hyper,
        "candidates": [names[i] for i in merged.candidates],
        "exported_rank": exported.rank,
        "truncation_error": exported.truncation_error,
        "length": merged.length,
        **more,
    }
