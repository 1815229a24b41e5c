"""Merging LoRA adapters: the space a merge works in is said by name, because the spaces disagree.

    "delta"    D_i = scale_i B_i A_i is formed for every linear and the deltas are merged: the truth. The result is a
               full delta; writing it as an adapter again (`to_lora`) loses what `truncation_error` says.
    "core"     The same deltas in bases shared by all candidates, as small matrices, merged there (see `core_space`).
               The result is an adapter of at most the ranks' sum.
    "factors"  PEFT's rule: A and B are merged apart, as if they were two deltas, each with the square root of
               w_i scale_i. The result is an adapter of the same rank, and contains cross terms B_i A_j.

A LoRA tree holds, for each adapted linear, {"a": [(N,) L, r, in], "b": [(N,) L, out, r]}, all layers stacked. A trim
"per tensor" is one per layer's matrix. Merged adapters have scale 1.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, PyTree

from unlearnjax.distributed.mesh import mesh_of
from unlearnjax.distributed.processes import put
from unlearnjax.distributed.rules import cut_for_merging
from unlearnjax.errors import UserError, nearest
from unlearnjax.merging.api import check_hyperparameters, find_rule, merge_stacked
from unlearnjax.merging.core_space import merge_core
from unlearnjax.merging.lora_tree import linears_of, nest, per_candidate, stack_of
from unlearnjax.merging.product import Product, scaled_product
from unlearnjax.merging.protocol import MergeMethod, Rule

SPACES = ("delta", "core", "factors")


class LowRank(NamedTuple):
    """An adapter that stands for a delta, `scale * b @ a`, and how much of the delta it misses.

    truncation_error: |delta - scale b a| / |delta| in Frobenius norm over the whole tree (0 for a zero delta).
    """

    lora: PyTree
    scale: float
    truncation_error: float


def lora_delta(lora: PyTree, scale: float | Float[Array, "*N"]) -> PyTree:
    """The delta of an adapter, `scale * b @ a` in float32, for every linear as {"weight": [..., L, out, in]}.

    Args:
        lora: a LoRA tree, of one candidate or of a stack of N.
        scale: alpha / rank; one number, or [N] for a stack.

    Raises:
        UserError: the tree is no LoRA tree, or `scale` does not fit its stack.
    """
    factor = jnp.asarray(scale, jnp.float32)
    return nest({path: {"weight": _product(path, pair, factor)} for path, pair in linears_of(lora).items()})


def merge_lora(
    lora: PyTree,
    scale: Float[Array, "N"],
    method: str | MergeMethod,
    space: str,
    *,
    weights: Float[Array, "N"] | None = None,
    semantics: str | None = None,
    key: Array | None = None,
    ranks: Sequence[int] | None = None,
    compress: int | None = None,
    mesh: Mesh | None = None,
    **hyperparameters: Any,
) -> PyTree:
    """Merges a stack of N LoRA adapters.

    In space "delta" the candidates' deltas are formed one layer at a time, not those of all layers: also for the passes
    of rules whose statistics are of the whole model (`merge_stacked` says where not).

    Args:
        lora: {"a": [N, L, r, in], "b": [N, L, out, r]} for each linear.
        scale: [N], alpha / rank of each candidate.
        method, semantics, key, hyperparameters: as in `merge`. In space "factors" the semantics is "peft" unless named,
            and lambda scales the adapter's delta (not each of its factors).
        space: "delta", "core" or "factors". "factors" takes ranks as they are: candidates padded to a common rank are
            trimmed over their padding too, where PEFT refuses different ranks.
        weights: [N]. None is `merge`'s default in space "delta"; in "factors" it is 1 each, as PEFT's callers write it
            (for `linear` that makes the step N times the mean's, and adds the cross terms).
        ranks, compress: for space "core", see `core_space`.
        mesh: the devices that share a merge in space "delta"; default: those that the adapters lie on. (Inside of a
            program it must be given.)

    Returns:
        "delta": {"weight": [L, out, in]} for each linear, float32. "core": a LoRA tree of the ranks' sum or `compress`.
        "factors": a LoRA tree of the same rank. Both are of scale 1.

    Raises:
        UserError: as `merge`; an unknown space, or one the semantics does not work in; a tree that is no LoRA tree.
    """
    if space not in SPACES:
        raise UserError(f"merge: unknown space {space!r}{nearest(str(space), SPACES)}")
    if space == "factors" and semantics is None and "peft" in find_rule(method, None)[0].semantics:
        semantics = "peft"
    found, rule = find_rule(method, semantics)
    if space not in rule.spaces:
        able = " and ".join(repr(other.semantics) for other in found.rules if space in other.spaces)
        hint = f"pass semantics {able}" if able else "use space 'delta'"
        raise UserError(f"merge: {found.name} ({rule.semantics} semantics) does not work in space {space!r}; {hint}")
    if space == "core":
        return merge_core(
            lora, scale, found, weights=weights, semantics=rule.semantics, key=key, ranks=ranks, compress=compress,
            **hyperparameters,
        )  # fmt: skip
    if ranks is not None or compress is not None:
        raise UserError(f"merge: ranks and compress are for space 'core', not {space!r}")
    linears = stack_of(lora)
    scale = per_candidate("scale", scale, linears)
    options: dict[str, Any] = {"semantics": rule.semantics, "key": key, "stacked": 1}
    if space == "delta":
        # Where a tensor's merge asks for nothing of the others, one linear's factors are laid out at a time.
        groups = [[path] for path in linears] if rule.scope == "leaf" else [list(linears)]
        merged: dict[str, Array] = {}
        for paths in groups:
            deltas = {path: _unformed(path, linears[path], scale, mesh) for path in paths}
            merged |= merge_stacked(deltas, found, weights=weights, **options, **hyperparameters)
        return nest({path: {"weight": delta} for path, delta in merged.items()})
    return _merge_factors(linears, scale, found, rule, weights, options, hyperparameters)


def _merge_factors(
    linears: dict[str, dict[str, Array]],
    scale: Float32[Array, "N"],
    method: MergeMethod,
    rule: Rule,
    weights: Float[Array, "N"] | None,
    options: dict[str, Any],
    hyperparameters: dict[str, Any],
) -> PyTree:
    settings = check_hyperparameters(method, rule, hyperparameters)
    if "lambda" in settings:  # it scales the product, so each factor takes its root
        settings["lambda"] = jnp.sqrt(jnp.asarray(settings["lambda"], jnp.float32))
    given = jnp.ones_like(scale) if weights is None else per_candidate("weights", weights, linears)
    strength = given * scale
    root = jnp.sqrt(jnp.abs(strength))
    # The sign goes to A alone: on both factors it would cancel.
    factor_weights = {"a": jnp.where(strength >= 0, root, -root), "b": root}
    key = options.pop("key")
    # Each factor draws its own numbers: their leaves have the same names.
    keys = dict(zip(("a", "b"), (None, None) if key is None else jax.random.split(key), strict=True))
    merged = {
        name: merge_stacked(
            {path: pair[name] for path, pair in linears.items()}, method, weights=own, key=keys[name], **options,
            **settings,
        )
        for name, own in factor_weights.items()
    }  # fmt: skip
    return nest({path: {name: merged[name][path] for name in ("a", "b")} for path in linears})


def concatenate_lora(lora: PyTree, scale: Float[Array, "N"], weights: Float[Array, "N"] | None = None) -> PyTree:
    """One adapter of the ranks' sum whose delta is exactly sum_i w_i scale_i B_i A_i (PEFT's combination_type "cat").

    Args:
        lora: a stack of N adapters; scale: [N]; weights: [N], 1/N each when None (the exact mean of the deltas).

    Returns:
        A LoRA tree of rank N r and scale 1; w_i scale_i is folded into A.

    Raises:
        UserError: the tree is no stack of LoRA adapters, or scale or weights do not have N entries.
    """
    linears = stack_of(lora)
    scale = per_candidate("scale", scale, linears)
    count = scale.shape[0]
    given = per_candidate("weights", [1 / count] * count if weights is None else weights, linears)

    def join(pair: dict[str, Array]) -> dict[str, Array]:
        a = (given * scale).reshape(-1, 1, 1, 1) * pair["a"].astype(jnp.float32)
        b = pair["b"].astype(jnp.float32)
        # By index: of arrays that are cut over several processes jax makes no lists.
        return {
            "a": jnp.concatenate([a[i] for i in range(count)], axis=1),
            "b": jnp.concatenate([b[i] for i in range(count)], axis=2),
        }

    return nest({path: join(pair) for path, pair in linears.items()})


def to_lora(delta: PyTree, rank: int) -> LowRank:
    """The best adapter of this rank: a truncated SVD of each layer's matrix (Eckart-Young), b = U S and a = V^T.

    Args:
        delta: {"weight": [L, out, in]} for each linear.
        rank: of the adapter; where a matrix has fewer singular values, the rest of the rows is zero.

    Raises:
        UserError: a rank below 1, or leaves of another shape.
    """
    if rank < 1:
        raise UserError(f"to_lora: rank is {rank} and must be at least 1")
    linears = linears_of(delta, ("weight",), 3)
    lora = nest({path: _truncate(leaf["weight"].astype(jnp.float32), rank) for path, leaf in linears.items()})
    return LowRank(lora, 1.0, truncation_error(delta, lora))


def truncation_error(delta: PyTree, lora: PyTree, scale: float = 1.0) -> float:
    """|delta - scale b a| / |delta| in Frobenius norm over the whole tree (0 for a zero delta)."""
    missed, size = _norms(delta, lora, scale)
    return _ratio(sum(missed.values()), sum(size.values()))


def truncation_errors(delta: PyTree, lora: PyTree, scale: float = 1.0) -> dict[str, float]:
    """|delta - scale b a| / |delta| of each linear over its layers, by path ("layers/attention/q")."""
    missed, size = _norms(delta, lora, scale)
    return {path: _ratio(missed[path], size[path]) for path in size}


@functools.partial(jax.jit, static_argnums=1)
def _truncate(delta: Float32[Array, "L out in"], rank: int) -> dict[str, Float32[Array, "..."]]:
    def one(matrix: Float32[Array, "out in"]) -> dict[str, Float32[Array, "..."]]:
        u, s, vt = jnp.linalg.svd(matrix, full_matrices=False)
        missing = max(rank - s.shape[0], 0)
        a = jnp.pad(vt[:rank], ((0, missing), (0, 0)))
        return {"a": a, "b": jnp.pad(u[:, :rank] * s[None, :rank], ((0, 0), (0, missing)))}

    return jax.lax.map(one, delta)  # one layer at a time: the full U and V of all layers never lie in memory together


def _norms(delta: PyTree, lora: PyTree, scale: float) -> tuple[dict[str, float], dict[str, float]]:
    """Squared Frobenius norms of what the adapter misses, and of the delta, by path."""
    missed, size = {}, {}
    pairs = linears_of(lora)
    for path, leaf in linears_of(delta, ("weight",), 3).items():
        if path not in pairs:
            raise UserError(f"truncation_errors: the adapter has no {path}; give the adapter made from this delta")
        full = leaf["weight"].astype(jnp.float32)
        gap = full - _product(path, pairs[path], jnp.float32(scale))
        # Summed in double: squares of small deltas over many entries lose digits in float32.
        missed[path], size[path] = (math.fsum(_layer_norms(x).tolist()) for x in (gap, full))
    return missed, size


@jax.jit
def _layer_norms(x: Float32[Array, "L out in"]) -> Float32[Array, "L"]:
    return jnp.sum(x * x, axis=(1, 2))


def _ratio(missed: float, size: float) -> float:
    return math.sqrt(missed / size) if size > 0 else 0.0


def _product(path: str, pair: dict[str, Array], scale: Float32[Array, "*N"]) -> Float32[Array, "*N L out in"]:
    return scaled_product(*_factors(path, pair, scale), scale)


def _unformed(path: str, pair: dict[str, Array], scale: Float32[Array, "N"], mesh: Mesh | None) -> Product:
    traced = isinstance(pair["b"], jax.core.Tracer)
    if mesh is None and not traced:
        mesh = mesh_of(pair)
    if mesh is not None:
        pair = (jax.lax.with_sharding_constraint if traced else put)(pair, cut_for_merging(mesh, pair))
    b, a = _factors(path, pair, scale)
    return Product(a, b, scale, mesh)


def _factors(
    path: str, pair: dict[str, Array], scale: Float32[Array, "*N"]
) -> tuple[Float32[Array, "*N L out r"], Float32[Array, "*N L r in"]]:
    a, b = pair["a"].astype(jnp.float32), pair["b"].astype(jnp.float32)
    if a.ndim != 3 + scale.ndim or a.shape[: scale.ndim] != scale.shape:
        raise UserError(f"lora_delta: scale of shape {scale.shape} does not fit {path}/a of shape {a.shape}")
    return b, a
