"""Model folders onto a mesh: every process reads the bytes of its own devices' shards and no others, in parallel."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from unlearnjax.distributed.rules import sharding
from unlearnjax.io.safetensors import Checkpoint
from unlearnjax.models.families import Source

AT_ONCE = 8  # arrays that are read at a time: as many stay in host memory beside their devices

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


def load_on(mesh: Mesh, checkpoint: Checkpoint, wanted: Sequence[Source]) -> list[Array]:
    """The arrays of `wanted`, each laid on the mesh by the rules (`unlearnjax.distributed.rules`).

    Devices that hold the same part of an array share what is read.

    Args:
      checkpoint: tensors whose names and shapes were checked.
    """

    def one(source: Source) -> Array:
        read: dict[Any, np.ndarray] = {}

        def part(index: Any) -> np.ndarray:
            key = tuple((s.start, s.stop) for s in index)
            if key not in read:
                read[key] = _shard(checkpoint, source, index)
            return read[key]

        place = sharding(mesh, source.info.axes, source.info.shape)
        return jax.make_array_from_callback(source.info.shape, place, part)

    with ThreadPoolExecutor(AT_ONCE, "read") as pool:
        return list(pool.map(one, wanted))
