"""How the Pallas kernels see tensors of any shape: rows of 128 lanes, cut into blocks that fit a TPU core's memory."""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

LANES = 128
BLOCK_BYTES = 2 << 20  # of all candidates' blocks together; twice that is in flight, of 16 MiB and more
_SUBLANES = 32  # rows of a tile, for the narrowest dtype there may be


class Tiling(NamedTuple):
    """`rows` rows in blocks of `block` of them hold a tensor of `size` entries, padded."""

    size: int
    rows: int
    block: int

    @property
    def blocks(self) -> int:
        return self.rows // self.block


def tiling(shape: tuple[int, ...], arrays: int) -> Tiling:
    """For `arrays` arrays of this shape that are read together, 4 bytes an entry."""
    size = math.prod(shape)
    rows = max(-(-size // LANES), 1)
    most = max(BLOCK_BYTES // (arrays * LANES * 4) // _SUBLANES, 1) * _SUBLANES
    block = min(most, -(-rows // _SUBLANES) * _SUBLANES)
    return Tiling(size, -(-rows // block) * block, block)


def tiled(x: Array, tiles: Tiling, lead: int) -> Array:
    """The axes after the first `lead` as [rows, lanes], filled up with zeros."""
    flat = x.reshape(*x.shape[:lead], tiles.size)
    missing = tiles.rows * LANES - tiles.size
    if missing:
        flat = jnp.pad(flat, [(0, 0)] * lead + [(0, missing)])
    return flat.reshape(*x.shape[:lead], tiles.rows, LANES)


def untiled(x: Array, tiles: Tiling, shape: tuple[int, ...]) -> Array:
    """Back from [rows, lanes]."""
    return x.reshape(-1)[: tiles.size].reshape(shape)


def along_lanes(values: Array) -> Array:
    """[N] as [N, 1, lanes]: per-candidate numbers as a block in vector memory, which lowers under vmap too; scalars in
    scalar memory do not."""
    return jnp.broadcast_to(values[:, None, None], (values.shape[0], 1, LANES))
