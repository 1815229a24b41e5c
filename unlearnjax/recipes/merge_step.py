"""The merges of a recipe: from a stack of trained LoRA candidates to models that can be evaluated and exported."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from unlearnjax.errors import UserError
from unlearnjax.merging.api import find_rule
from unlearnjax.merging.lora_space import concatenate_lora, merge_lora, to_lora, truncation_errors
from unlearnjax.recipes.schema import Merge


class Merged(NamedTuple):
    """One merge's result. Exactly one of `lora` (scale 1) and `delta` is what the merge computed."""

    merge: Merge
    semantics: str
    candidates: list[int]  # indices of the candidates that went in
    lora: PyTree[Array] | None
    delta: PyTree[Array] | None


class Exported(NamedTuple):
    """A merge as an adapter of rank `rank` (scale 1), and what of the delta that rank misses (relative, Frobenius)."""

    lora: PyTree[Array]
    rank: int
    truncation_error: float


def merge_candidates(merge: Merge, stacked: PyTree[Array], scale: Array, kept: Sequence[int], seed: int) -> Merged:
    """Merge the candidates `kept` of a stack ([N, ...] leaves, scale [N]); weights of the others are dropped.

    Raises:
      UserError: from the method (see `unlearnjax.merge`), or no candidate is left.
    """
    if not kept:
        raise UserError(f"merge {merge.name}: no candidate is left to merge, all of them diverged; lower learning_rate")
    chosen = np.asarray(kept, np.int32)
    lora = jax.tree.map(lambda x: x[chosen], stacked)
    weights = None if merge.weights is None else jnp.asarray([merge.weights[i] for i in kept], jnp.float32)
    # The method's own default differs between spaces (factors follow PEFT), so None is resolved where it is used.
    result = merge_lora(
        lora, scale[chosen], merge.method, merge.space, weights=weights, semantics=merge.semantics,
        key=jax.random.key(seed), **merge.hyperparameters,
    )  # fmt: skip
    named = merge.semantics or _default_semantics(merge)
    in_factors = merge.space == "factors"
    return Merged(merge, named, list(kept), result if in_factors else None, None if in_factors else result)


def _default_semantics(merge: Merge) -> str:
    if merge.space == "factors" and merge.method != "linear":
        return "peft"
    return find_rule(merge.method, None)[1].semantics


def export(merged: Merged, stacked: PyTree[Array], scale: Array, largest_rank: int) -> Exported:
    """The merge as an adapter: exact for a linear merge of deltas (candidates side by side), truncated for others."""
    if merged.lora is not None:
        rank = jax.tree.leaves(merged.lora, is_leaf=_is_pair)[0]["a"].shape[-2]
        return Exported(merged.lora, rank, 0.0)
    assert merged.delta is not None
    if merged.merge.method == "linear" and merged.merge.rank is None:
        chosen = np.asarray(merged.candidates, np.int32)
        weights = merged.merge.weights
        normalised = None
        if weights is not None:
            picked = np.asarray([weights[i] for i in merged.candidates], np.float32)
            normalize = merged.merge.hyperparameters.get("normalize", True)
            normalised = jnp.asarray(picked / picked.sum() if normalize else picked)
        lora = concatenate_lora(jax.tree.map(lambda x: x[chosen], stacked), scale[chosen], normalised)
        rank = jax.tree.leaves(lora, is_leaf=_is_pair)[0]["a"].shape[-2]
        return Exported(lora, rank, _whole_error(merged.delta, lora))
    rank = merged.merge.rank or largest_rank
    low = to_lora(merged.delta, rank)
    return Exported(low.lora, rank, low.truncation_error)


def _whole_error(delta: PyTree[Array], lora: PyTree[Array]) -> float:
    return max(truncation_errors(delta, lora).values(), default=0.0)


def _is_pair(x: Any) -> bool:
    return isinstance(x, dict) and set(x) == {"a", "b"}


def describe(merged: Merged, exported: Exported, names: Sequence[str]) -> dict[str, Any]:
    """The merge's entry in the report."""
    plain = dataclasses.asdict(merged.merge)
    hyper = dict(plain["hyperparameters"])
    if merged.merge.weights is not None:
        hyper["weights"] = [float(merged.merge.weights[i]) for i in merged.candidates]
    return {
        "name": merged.merge.name,
        "method": merged.merge.method,
        "space": merged.merge.space,
        "semantics": merged.semantics,
        "hyperparameters": hyper,
        "candidates": [names[i] for i in merged.candidates],
        "exported_rank": exported.rank,
        "truncation_error": exported.truncation_error,
    }
