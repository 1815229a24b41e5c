"""Where every array lies: one table from logical axes to mesh axes, and what follows from it for each kind of tree."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from unlearnjax.distributed.mesh import CANDIDATE, DATA, FSDP, TENSOR, mesh_of
from unlearnjax.distributed.processes import put
from unlearnjax.models.abstract import ArrayInfo, is_info
from unlearnjax.models.protocol import WHERE_IT_IS, Spread

# A logical axis that is not here lies whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    "candidate": (CANDIDATE,),
    "rows": (DATA, FSDP),
    # Rows that need not lie whole for each candidate: the candidates' axis cuts them too, unless a stack of candidates
    # has it. It comes last, so that these rows are cut no less finely than "rows".
    "batch": (DATA, FSDP, CANDIDATE),
    "vocab": (TENSOR,),
    "heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "mlp": (TENSOR,),
    "embed": (FSDP,),
    # The long axis of a low-rank factor, and the features of what the base says of the rows: cut as fine as can be.
    "features": (FSDP, TENSOR),
    # The rows of a matrix whose candidates meet: every device has all candidates' part of some rows.
    "merged": (CANDIDATE, DATA, FSDP, TENSOR),
}


def cut_by(name: str | None, size: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that cut a dimension: those of its logical axis' rule, each as a whole or not at all.

    Args:
      sizes: of the mesh, by axis.
    """
    chosen: list[str] = []
    for axis in RULES.get(name or "", ()):
        if sizes.get(axis, 1) > 1 and size % math.prod([sizes[a] for a in (*chosen, axis)]) == 0:
            chosen.append(axis)
    return tuple(chosen)


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The mesh axes of each dimension (`cut_by`), each of them at most once."""
    free = dict(mesh.shape)
    parts: list[tuple[str, ...] | str | None] = []
    for name, size in zip(axes, shape, strict=True):
        chosen = cut_by(name, size, free)
        for axis in chosen:
            del free[axis]
        parts.append(None if not chosen else chosen[0] if len(chosen) == 1 else chosen)
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    return NamedSharding(mesh, partition(axes, shape, mesh))


def whole(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def of_params(mesh: Mesh, abstract: PyTree[ArrayInfo]) -> PyTree[NamedSharding]:
    """The base weights' shardings: of the abstract tree of `Model.abstract`."""
    return jax.tree.map(lambda info: sharding(mesh, info.axes, info.shape), abstract, is_leaf=is_info)


def _names(path: tuple[Any, ...]) -> tuple[str, ...]:
    """The dictionary keys of a path, which in a state are those of a parameter or of an adapter's factor."""
    return tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))


def _info(abstract: PyTree[ArrayInfo], names: Sequence[str]) -> ArrayInfo | None:
    node: Any = abstract
    for name in names:
        if not isinstance(node, dict) or name not in node:
            return None
        node = node[name]
    return node if is_info(node) else None


def candidate_axes(abstract: PyTree[ArrayInfo], path: tuple[Any, ...], rank: int) -> tuple[str | None, ...]:
    """The logical axes of a leaf with `rank` dimensions, the first of them N: of a stack of adapters, of their states,
    of hyperparameters. What is no weight has N alone."""
    names = _names(path)
    tail: tuple[str | None, ...] = ()
    if names and names[-1] in ("a", "b") and _info(abstract, (*names[:-1], "weight")) is not None:
        tail = ("layers", None, "features") if names[-1] == "a" else ("layers", "features", None)
    else:
        info = _info(abstract, names)
        tail = () if info is None else info.axes
    tail = tail if len(tail) == rank - 1 else (None,) * (rank - 1)
    return ("candidate", *tail)


def of_candidates(mesh: Mesh, abstract: PyTree[ArrayInfo], stacked: PyTree[Any]) -> PyTree[NamedSharding]:
    """Shardings of a tree whose leaves have a leading axis N (arrays, or their shapes)."""

    def leaf(path: tuple[Any, ...], x: Any) -> NamedSharding:
        return sharding(mesh, candidate_axes(abstract, path, len(x.shape)), x.shape)

    return jax.tree_util.tree_map_with_path(leaf, stacked)


def of_work(mesh: Mesh, work: PyTree[Any]) -> PyTree[NamedSharding]:
    """Shardings of a step's work: [N] and [N, rows]."""
    return jax.tree.map(lambda x: sharding(mesh, ("candidate", "rows")[: len(x.shape)], x.shape), work)


def of_store(mesh: Mesh, store: PyTree[Any]) -> PyTree[NamedSharding]:
    """Shardings of rows that all candidates read: tokens whole, [tokens, hidden] of the base cut along hidden."""
    axes = {2: (None, "features")}
    return jax.tree.map(lambda x: sharding(mesh, axes.get(len(x.shape), (None,) * len(x.shape)), x.shape), store)


def along_rows(mesh: Mesh | None, x: jax.Array, rows: str = "rows") -> jax.Array:
    """Inside a compiled program: cut an array of rows among the devices that share a batch.

    Args:
      rows: their logical axis: "batch" where there is no stack of candidates.
    """
    if mesh is None:
        return x
    names = (rows, *(None,) * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, sharding(mesh, names, x.shape))


def take_rows(mesh: Mesh | None, x: jax.Array, at: jax.Array) -> jax.Array:
    """Inside a compiled program: x[at] of a store's array (`of_store`), each device of its own features. Left to XLA,
    TPUs' compiler fails at it on some meshes (candidate=8,fsdp=8: a slice of the wrong shape).

    Args:
      x: [tokens, hidden], or [tokens], which are whole everywhere. at: [rows, ...].
    """
    if mesh is None or x.ndim != 2:
        return x[at]
    kept = partition((None, "features"), x.shape, mesh)
    rows = (DATA,) if at.shape[0] % mesh.shape[DATA] == 0 else ()
    out = PartitionSpec(rows, *(None,) * (at.ndim - 1), *kept[1:])
    take = jax.shard_map(
        lambda x, at: x[at], mesh=mesh, in_specs=(kept, PartitionSpec(rows)), out_specs=out, check_vma=False
    )
    return take(x, at)


def spread_of(mesh: Mesh | None, candidates: int = 1) -> Spread:
    """Inside a compiled program without gradients: each layer's output stays cut by rows (`spread_rows`), which XLA,
    left alone, gives up for the way in which the weights are cut.

    Args:
      candidates: that are mapped with `spmd_axis_name=CANDIDATE`; 1 where there is no stack.
    """
    if mesh is None:
        return WHERE_IT_IS
    along = functools.partial(along_rows, mesh, rows="rows" if candidates > 1 else "batch")
    return Spread(along, functools.partial(gathered, mesh))


def gathered(mesh: Mesh, tree: PyTree[jax.Array]) -> PyTree[jax.Array]:
    """Inside a compiled program: a tree's arrays whole on each device, but for candidates where they are mapped."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole(mesh)), tree)


def cut_for_merging(mesh: Mesh, pair: dict[str, Any]) -> dict[str, NamedSharding]:
    """Where a linear's factors [N, L, rank, in] and [N, L, out, rank] lie for a merge: on all devices, the first by its
    columns and the second by its rows, with all N on each. Their products [N, L, out, in], a layer's at a time, for
    which that layer's part of the first is gathered, then lie on all devices by rows: a merge exchanges no deltas, but
    what its rule sums."""
    return {
        "a": sharding(mesh, (None, None, None, "merged"), pair["a"].shape),
        "b": sharding(mesh, (None, None, "merged", None), pair["b"].shape),
    }


def row_shards(mesh: Mesh | None, candidates: int, rows: int) -> int:
    """Among how many devices a batch's rows are cut, for a stack of so many candidates (1: there is none)."""
    if mesh is None:
        return 1
    shape = (candidates, rows)
    return rows // sharding(mesh, ("candidate", "batch"), shape).shard_shape(shape)[1]


def spread_rows(params: PyTree[Any], *arrays: Any, candidates: int = 1) -> Any:
    """Arrays of rows (the first axis), cut among the devices that share a batch where the base weights lie on several.

    Args:
      candidates: that read these rows, each of them all; they have the candidates' axis. One has no use for it.

    Returns:
      The arrays, as they are where there is one device.
    """
    mesh = mesh_of(params)
    if mesh is None:
        return arrays
    names = [("rows" if candidates > 1 else "batch", *(None,) * (np.ndim(x) - 1)) for x in arrays]
    return tuple(
        put(x, sharding(mesh, own, np.shape(x))) for x, own in zip(arrays, names, strict=True)
    )  # fmt: skip


def filled_number(mesh: Mesh, candidates: int) -> int:
    """How many candidates are evaluated for so many: a multiple of the candidate axis. But one alone stays alone, and
    that axis cuts its rows."""
    return candidates if candidates == 1 else candidates + -candidates % mesh.shape[CANDIDATE]


def filled(params: PyTree[Any], lora: PyTree[jax.Array] | None) -> PyTree[jax.Array] | None:
    """A stack of adapters [N, layers, ...] with adapters of zeros behind them (`filled_number`), so that each device
    along the mesh's candidate axis has its own; as it is where there is one device."""
    mesh = mesh_of(params)
    if mesh is None or lora is None:
        return lora

    def leaf(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        more = jnp.pad(x, [(0, filled_number(mesh, x.shape[0]) - x.shape[0]), *[(0, 0)] * (x.ndim - 1)])
        names = (None, None, "features") if _names(path)[-1] == "a" else (None, "features", None)
        return put(more, sharding(mesh, ("candidate", *names), more.shape))

    return jax.tree_util.tree_map_with_path(leaf, lora)


def idle(mesh: Mesh, candidates: int, rows: int) -> list[str]:
    """Warnings about devices that do the same work as others, because training's candidates or a step's rows do not
    divide among them."""
    found, shape = [], mesh.shape
    if shape[CANDIDATE] > 1 and not cut_by("candidate", candidates, shape):
        found.append(
            f"{CANDIDATE}={shape[CANDIDATE]} does not divide {candidates} candidates that train together: each of "
            "these devices trains all of them"
        )
    left = [axis for axis in RULES["rows"] if shape[axis] > 1 and axis not in cut_by("rows", rows, shape)]
    if left:
        named = ", ".join(f"{axis}={shape[axis]}" for axis in left)
        found.append(f"{named} does not divide the {rows} rows of a step: these devices all train on the same rows")
    return found
