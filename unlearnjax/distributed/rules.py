"""Where every array lies: one table from logical axes to mesh axes, and what follows from it for each kind of tree."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from unlearnjax.distributed.mesh import CANDIDATE, DATA, FSDP, TENSOR, mesh_of
from unlearnjax.models.abstract import ArrayInfo, is_info

# A logical axis that is not here lies whole on every device.
RULES: dict[str, tuple[str, ...]] = {
    "candidate": (CANDIDATE,),
    "rows": (DATA, FSDP),
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


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """The mesh axes of each dimension: those of its rule, as many of them as divide it, each at most once."""
    used: set[str] = set()
    parts: list[tuple[str, ...] | str | None] = []
    for name, size in zip(axes, shape, strict=True):
        chosen: list[str] = []
        for axis in RULES.get(name or "", ()):
            if axis not in used and size % math.prod([mesh.shape[a] for a in (*chosen, axis)]) == 0:
                chosen.append(axis)
        used.update(chosen)
        parts.append(None if not chosen else chosen[0] if len(chosen) == 1 else tuple(chosen))
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


def along_rows(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Inside a compiled program: cut an array of rows among the devices that share a batch."""
    if mesh is None:
        return x
    names = ("rows", *(None,) * (x.ndim - 1))
    return jax.lax.with_sharding_constraint(x, sharding(mesh, names, x.shape))


def gathered(mesh: Mesh, tree: PyTree[jax.Array]) -> PyTree[jax.Array]:
    """Inside a compiled program: a tree's arrays whole on each device, but for candidates where they are mapped."""
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole(mesh)), tree)


def cut_for_merging(pair: dict[str, Any]) -> dict[str, Any]:
    """A linear's factors [N, L, rank, in] and [N, L, out, rank], so that their products [N, L, out, in] lie on all
    devices by rows, with all N on each: a merge then exchanges no deltas, but what its rule sums.

    As they are where they are on one device, and inside of a program.
    """
    mesh = None if isinstance(pair["b"], jax.core.Tracer) else mesh_of(pair)
    if mesh is None:
        return pair
    places = {
        "a": whole(mesh),
        "b": sharding(mesh, (None, None, "merged", None), pair["b"].shape),
    }
    return jax.device_put(pair, places)


def spread_rows(params: PyTree[Any], *arrays: Any) -> Any:
    """Arrays of rows (the first axis), cut among the devices that share a batch where the base weights lie on several.

    Returns them as they are where there is one device.
    """
    mesh = mesh_of(params)
    if mesh is None:
        return arrays
    names = [("rows", *(None,) * (np.ndim(x) - 1)) for x in arrays]
    return tuple(
        jax.device_put(x, sharding(mesh, own, np.shape(x))) for x, own in zip(arrays, names, strict=True)
    )  # fmt: skip
