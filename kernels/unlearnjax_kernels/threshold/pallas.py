"""The counting pass of `threshold` as a TPU (Mosaic) kernel: one read of each entry, all pivots."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int32, UInt32

from unlearnjax_kernels.tiling import LANES, tiled, tiling


def _kernel(x_ref, pivots_ref, counts_ref) -> None:  # type: ignore[no-untyped-def]
    @pl.when(pl.program_id(0) == 0)
    def _() -> None:
        counts_ref[...] = jnp.zeros(counts_ref.shape, jnp.int32)

    for i in range(x_ref.shape[0]):
        bits = jax.lax.bitcast_convert_type(x_ref[i].astype(jnp.float32), jnp.int32) & jnp.int32(0x7FFFFFFF)
        for j in range(pivots_ref.shape[1]):
            reach = (bits >= pivots_ref[i, j : j + 1]).astype(jnp.int32)
            counts_ref[i, j : j + 1] += jnp.sum(reach, axis=0, keepdims=True, dtype=jnp.int32)


def hits(x: Float[Array, "N ..."], pivots: UInt32[Array, "N P"], interpret: bool = False) -> Int32[Array, "N P"]:
    """See `api.hits`."""
    (number, count), size = pivots.shape, x[0].size
    tiles = tiling(x.shape[1:], number)
    limits = jnp.broadcast_to(jax.lax.bitcast_convert_type(pivots, jnp.int32)[:, :, None], (number, count, LANES))
    lanes = pl.pallas_call(
        _kernel,
        grid=(tiles.blocks,),
        in_specs=[
            pl.BlockSpec((number, tiles.block, LANES), lambda i: (0, i, 0)),
            pl.BlockSpec((number, count, LANES), lambda i: (0, 0, 0)),
        ],
        # Every block adds to the same counts: a TPU core takes its grid one step after another.
        out_specs=pl.BlockSpec((number, count, LANES), lambda i: (0, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((number, count, LANES), jnp.int32),
        interpret=interpret,
    )(tiled(x, tiles, 1), limits)
    # The zeros that fill up the last rows reach no other pivot than 0.
    return jnp.where(pivots == 0, jnp.int32(size), jnp.sum(lanes, axis=-1, dtype=jnp.int32))


def hits_interpreted(x: Float[Array, "N ..."], pivots: UInt32[Array, "N P"]) -> Int32[Array, "N P"]:
    """The kernel run by Pallas's interpreter, on any machine."""
    return hits(x, pivots, interpret=True)
