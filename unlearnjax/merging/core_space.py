"""Merging LoRA adapters in their core space (2509.17786), and in one compressed before the merge (2606.03723).

With the candidates' factors side by side, B = [B_1 ... B_N] and A = [A_1; ...; A_N], the left singular vectors U of B
and the right ones V of A span everything that any of them does. In these bases candidate i is the small matrix

    M_i = scale_i U^T B_i A_i V,        scale_i B_i A_i = U M_i V^T  exactly,

so any method can merge the M_i in place of the full deltas. The result U M V^T has at most the ranks' sum as rank, and
nothing is lost on the way. For a weighted sum this is the delta's merge; trims and elections see other entries.

`compress = r` first chooses r-dimensional parts of both bases, those that keep most of all candidates together
(max sum_i |P^T M_i Q|^2, by alternating eigenvectors), and merges the r x r matrices: the result has rank r without a
truncation. That is how the abstract of 2606.03723 describes Compress-then-Merge; whether its subspaces are chosen by
this criterion could not be checked.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, PyTree

from unlearnjax.errors import UserError
from unlearnjax.merging.api import merge_stacked
from unlearnjax.merging.lora_tree import linears_of, nest, per_candidate, stack_of
from unlearnjax.merging.protocol import MergeMethod

SWEEPS = 10  # of the alternation; it has settled after two or three where the candidates resemble each other


class Core(NamedTuple):
    """One linear's candidates in shared bases: scale_i B_i A_i = left @ cores[i] @ right."""

    left: Float32[Array, "L out K"]
    cores: Float32[Array, "N L K J"]
    right: Float32[Array, "L J in"]


def core_space(
    lora: PyTree, scale: Float[Array, "N"], ranks: Sequence[int] | None = None, compress: int | None = None
) -> dict[str, Core]:
    """The candidates' cores, by linear.

    Args:
        lora: {"a": [N, L, r, in], "b": [N, L, out, r]} for each linear.
        scale: [N], alpha / rank of each candidate.
        ranks: how many rows of `a` (columns of `b`) each candidate uses, the rest being padding; None: all of them.
        compress: how many directions of each basis to keep; None: all, so that nothing is lost.

    Raises:
        UserError: no stack of LoRA adapters, or scale or ranks do not fit it; compress below 1.
    """
    linears = stack_of(lora)
    scale = per_candidate("scale", scale, linears)
    count, _, rank, _ = next(iter(linears.values()))["a"].shape
    used = tuple(ranks) if ranks is not None else (rank,) * count
    if len(used) != count or any(not 1 <= r <= rank for r in used):
        raise UserError(f"merge: ranks {list(used)} do not fit {count} candidates of rank up to {rank}")
    if compress is not None and compress < 1:
        raise UserError(f"merge: compress is {compress} and must be at least 1")
    found = {}
    for path, pair in linears.items():
        a, b = (pair[name].astype(jnp.float32) for name in ("a", "b"))
        found[path] = _bases(a, b, scale, used)
        if compress is not None:
            found[path] = _compressed(found[path], compress)
    return found


def merge_core(
    lora: PyTree,
    scale: Float[Array, "N"],
    method: str | MergeMethod,
    *,
    weights: Float[Array, "N"] | None = None,
    semantics: str | None = None,
    key: Array | None = None,
    ranks: Sequence[int] | None = None,
    compress: int | None = None,
    **hyperparameters: Any,
) -> PyTree:
    """Merges a stack of N LoRA adapters in their core space.

    Args:
        lora, scale, ranks, compress: as in `core_space`.
        method, weights, semantics, key, hyperparameters: as in `merge`; a layer's core is a tensor of its own.

    Returns:
        A LoRA tree of scale 1 and of rank min(sum of ranks, in), or `compress` if that is less; `truncate_lora` makes
        it smaller.

    Raises:
        UserError: as `merge` and `core_space`.
    """
    found = core_space(lora, scale, ranks, compress)
    cores = {path: core.cores for path, core in found.items()}
    merged = merge_stacked(
        cores, method, stacked=1, weights=weights, semantics=semantics, key=key, **hyperparameters
    )  # fmt: skip
    return nest({path: {"a": core.right, "b": _product(core.left, merged[path])} for path, core in found.items()})


def truncate_lora(lora: PyTree, rank: int) -> PyTree:
    """The best adapter of this rank for b @ a (Eckart-Young), by QR of the factors: no full delta is formed.

    Args:
        lora: {"a": [L, r, in], "b": [L, out, r]} for each linear, of scale 1; rank: of the result. Where the adapter's
            rank is less, the rest of the rows is zero.

    Raises:
        UserError: a rank below 1, or a tree that is no LoRA tree.
    """
    if rank < 1:
        raise UserError(f"truncate_lora: rank is {rank} and must be at least 1")
    return nest({path: _truncated(pair["a"], pair["b"], rank) for path, pair in linears_of(lora, ndim=3).items()})


def _product(x: Array, y: Array) -> Float32[Array, "..."]:
    # A TPU would multiply in bfloat16 by default.
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _left_singular(x: Float32[Array, "rows columns"]) -> Float32[Array, "rows K"]:
    """The left singular vectors, K = min(rows, columns): of R alone, which is small where x is tall."""
    q, r = jnp.linalg.qr(x)
    return _product(q, jnp.linalg.svd(r, full_matrices=False)[0])


@functools.partial(jax.jit, static_argnums=3)
def _bases(
    a: Float32[Array, "N L r in"], b: Float32[Array, "N L out r"], scale: Float32[Array, "N"], used: tuple[int, ...]
) -> Core:
    beside = jnp.concatenate([b[i, :, :, :r] for i, r in enumerate(used)], axis=2)
    below = jnp.concatenate([a[i, :, :r] for i, r in enumerate(used)], axis=1)
    # One layer at a time, as everywhere: the bases of all layers' decompositions never lie in memory together.
    left = jax.lax.map(_left_singular, beside)
    right = jnp.swapaxes(jax.lax.map(_left_singular, jnp.swapaxes(below, 1, 2)), 1, 2)
    cores = [
        scale[i] * _product(_product(jnp.swapaxes(left, 1, 2), b[i]), _product(a[i], jnp.swapaxes(right, 1, 2)))
        for i in range(len(used))
    ]
    return Core(left, jnp.stack(cores), right)


@functools.partial(jax.jit, static_argnums=1)
def _compressed(core: Core, rank: int) -> Core:
    def leading(matrices: Float32[Array, "N K J"]) -> Float32[Array, "K r"]:
        """Eigenvectors of sum_i M_i M_i^T with the largest eigenvalues."""
        square = jnp.sum(_product(matrices, jnp.swapaxes(matrices, 1, 2)), axis=0)
        return jnp.linalg.eigh(square)[1][:, ::-1][:, :rank]

    def layer(cores: Float32[Array, "N K J"]) -> tuple[Float32[Array, "K r"], Float32[Array, "J r"]]:
        def sweep(_: Array, bases: tuple[Array, Array]) -> tuple[Array, Array]:
            _, q = bases
            p = leading(_product(cores, q[None]))
            return p, leading(_product(jnp.swapaxes(cores, 1, 2), p[None]))

        first = leading(cores), leading(jnp.swapaxes(cores, 1, 2))
        return jax.lax.fori_loop(0, SWEEPS, sweep, first)

    p, q = jax.lax.map(layer, jnp.swapaxes(core.cores, 0, 1))
    cores = _product(_product(jnp.swapaxes(p, 1, 2)[None], core.cores), q[None])
    return Core(_product(core.left, p), cores, _product(jnp.swapaxes(q, 1, 2), core.right))


@functools.partial(jax.jit, static_argnums=2)
def _truncated(a: Float[Array, "L r in"], b: Float[Array, "L out r"], rank: int) -> dict[str, Float32[Array, "L ..."]]:
    def layer(pair: tuple[Array, Array]) -> dict[str, Array]:
        a, b = (x.astype(jnp.float32) for x in pair)
        q_b, r_b = jnp.linalg.qr(b)
        q_a, r_a = jnp.linalg.qr(a.T)
        u, s, vt = jnp.linalg.svd(_product(r_b, r_a.T), full_matrices=False)
        missing = max(rank - s.shape[0], 0)
        small_b, small_a = u[:, :rank] * s[None, :rank], vt[:rank]
        return {
            "a": jnp.pad(_product(small_a, q_a.T), ((0, missing), (0, 0))),
            "b": jnp.pad(_product(q_b, small_b), ((0, 0), (0, missing))),
        }

    return jax.lax.map(layer, (a, b))
