"""Model folders onto a mesh, in parallel: every process reads its share of the rows, and devices exchange what is cut
otherwise."""

import functools
import hashlib
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from unlearnjax.distributed.processes import require_same, several
from unlearnjax.distributed.rules import sharding
from unlearnjax.io.safetensors import Checkpoint
from unlearnjax.models.families import Source

AT_ONCE = 8  # arrays that are read at a time: as many stay in host memory beside their devices
SAMPLE = 1024  # bytes of each tensor that hosts compare

Index = tuple[slice, ...]


def read_piece(checkpoint: Checkpoint, name: str, index: Index) -> np.ndarray:
    """Part of a tensor, of step 1. Whole rows are read at once; else each row's part is copied from the mapped file."""
    shape = checkpoint.shape(name)
    bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
    if all(stop - start == size for (start, stop), size in zip(bounds[1:], shape[1:], strict=True)):
        rows = bounds[0][1] - bounds[0][0] if shape else 1
        out = np.empty((rows, *shape[1:]), checkpoint.dtype(name)) if shape else np.empty((), checkpoint.dtype(name))
        begin = bounds[0][0] * math.prod(shape[1:]) if shape else 0
        checkpoint.read_into(out.reshape(-1), name, begin)
        return out
    return checkpoint.read(name)[index]


def _shard(checkpoint: Checkpoint, source: Source, index: Index) -> np.ndarray:
    """One device's part of one of our arrays."""
    info = source.info
    bounds = [part.indices(size)[:2] for part, size in zip(index, info.shape, strict=True)]
    layers, inner = (range(*bounds[0]), bounds[1:]) if source.stacked else (range(1), bounds)
    if source.rows is not None:
        first = source.rows[0]
        inner = [(inner[0][0] + first, inner[0][1] + first), *inner[1:]]
    out = np.empty([stop - start for start, stop in bounds], info.dtype)
    for place, layer in enumerate(layers):
        part = read_piece(checkpoint, source.names[layer], tuple(slice(*b) for b in inner))
        (out[place] if source.stacked else out)[...] = part
    return out


def as_read(place: NamedSharding, source: Source) -> NamedSharding:
    """An array's sharding by rows of its tensors, on as many devices: what lies together in a file. A part of each row
    would cost as much as the whole, since a disk gives pages. `place` itself where rows do not divide among them."""
    first = 1 if source.stacked else 0
    parts = [() if p is None else (p,) if isinstance(p, str) else tuple(p) for p in place.spec]
    axes = tuple(axis for axis in place.mesh.axis_names if any(axis in own for own in parts[first:]))
    by = math.prod([place.mesh.shape[axis] for axis in axes])
    if not any(parts[first + 1 :]) or any(parts[:first]) or source.info.shape[first] % by:
        return place
    return NamedSharding(place.mesh, PartitionSpec(*(None,) * first, axes))


def _sample(checkpoint: Checkpoint) -> str:
    """A digest of what the tensors are and of their first bytes: what was trained differently differs there."""
    found = hashlib.sha256()
    for name in sorted(checkpoint.files):
        found.update(f"{name} {checkpoint.dtype(name)} {checkpoint.shape(name)}\n".encode())
        found.update(checkpoint.read(name).reshape(-1).view(np.uint8)[:SAMPLE].data)
    return found.hexdigest()


def load_on(mesh: Mesh, checkpoint: Checkpoint, wanted: Sequence[Source]) -> list[Array]:
    """The arrays of `wanted`, each laid on the mesh by the rules (`unlearnjax.distributed.rules`).

    Devices that hold the same part of an array share what is read.

    Args:
      checkpoint: tensors whose names and shapes were checked.

    Raises:
      UserError: the job's processes see different checkpoints.
    """
    if several():
        require_same({str(checkpoint.folder): _sample(checkpoint)})

    def one(source: Source) -> tuple[Array, NamedSharding]:
        read: dict[Any, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            key = tuple((s.start, s.stop) for s in index)
            if key not in read:
                read[key] = _shard(checkpoint, source, index)
            return read[key]

        place = sharding(mesh, source.info.axes, source.info.shape)
        read_by = as_read(place, source) if several() else place  # one process reads all of it
        return jax.make_array_from_callback(source.info.shape, read_by, part), place

    with ThreadPoolExecutor(AT_ONCE, "read") as pool:
        # Devices exchange in the order of `wanted`: threads would meet in another one in each process.
        return [x if x.sharding == place else _moved(place)(x) for x, place in pool.map(one, wanted)]


@functools.cache
def _moved(place: NamedSharding) -> Any:
    return jax.jit(lambda x: x, out_shardings=place, donate_argnums=0)
