"""Sign consensus as TPU (Mosaic) kernels: each block of every candidate is read once, and one is written.

The arithmetic is `xla.add`'s and `xla.finish`'s, on blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int32

from unlearnjax_kernels.consensus import xla
from unlearnjax_kernels.consensus.xla import Votes
from unlearnjax_kernels.tiling import LANES, along_lanes, tiled, tiling, untiled


def _kernel(x_ref, weights_ref, needed_ref, out_ref, *, agreeing: bool, conflict: bool) -> None:  # type: ignore[no-untyped-def]
    votes = xla.start(out_ref.shape, agreeing, jnp.int32)
    for i in range(x_ref.shape[0]):
        votes = xla.add(votes, x_ref[i], weights_ref[i], agreeing)
    out_ref[...] = xla.finish(votes, needed_ref[...], agreeing, conflict)


def consensus(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    needed: Int32[Array, ""],
    agreeing: bool,
    conflict: bool,
    interpret: bool = False,
) -> Float32[Array, "..."]:
    """See `api.consensus`."""
    number, shape = deltas.shape[0], deltas.shape[1:]
    tiles = tiling(shape, number + 1)
    out = pl.pallas_call(
        functools.partial(_kernel, agreeing=agreeing, conflict=conflict),
        grid=(tiles.blocks,),
        in_specs=[
            pl.BlockSpec((number, tiles.block, LANES), lambda i: (0, i, 0)),
            pl.BlockSpec((number, 1, LANES), lambda i: (0, 0, 0)),
            pl.BlockSpec((1, LANES), lambda i: (0, 0)),
        ],
        out_specs=pl.BlockSpec((tiles.block, LANES), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((tiles.rows, LANES), jnp.float32),
        interpret=interpret,
    )(
        tiled(deltas, tiles, 1),
        along_lanes(weights.astype(jnp.float32)),
        jnp.broadcast_to(needed.astype(jnp.int32), (1, LANES)),
    )
    return untiled(out, tiles, shape)


def _add_kernel(x_ref, weight_ref, up_ref, ups_ref, downs_ref, new_up, new_ups, new_downs) -> None:  # type: ignore[no-untyped-def]
    x = weight_ref[...] * x_ref[...].astype(jnp.float32)
    new_up[...] = up_ref[...] + x
    # Compared as float32 and counted as int32: masks of one width cannot select among numbers of another.
    new_ups[...] = (ups_ref[...].astype(jnp.int32) + (x > 0).astype(jnp.int32)).astype(ups_ref.dtype)
    new_downs[...] = (downs_ref[...].astype(jnp.int32) + (x < 0).astype(jnp.int32)).astype(downs_ref.dtype)


def add(votes: Votes, delta: Float[Array, "..."], weight: Float32[Array, ""], interpret: bool = False) -> Votes:
    """`xla.add` for a mean of all candidates, written over the votes it is given (where they are donated)."""
    shape = delta.shape
    tiles = tiling(shape, 5)
    block = pl.BlockSpec((tiles.block, LANES), lambda i: (i, 0))
    old = [tiled(part, tiles, 0) for part in (votes.up, votes.ups, votes.downs)]
    up, ups, downs = pl.pallas_call(
        _add_kernel,
        grid=(tiles.blocks,),
        in_specs=[block, pl.BlockSpec((1, LANES), lambda i: (0, 0)), block, block, block],
        out_specs=[block] * 3,
        out_shape=[jax.ShapeDtypeStruct(part.shape, part.dtype) for part in old],
        input_output_aliases={2: 0, 3: 1, 4: 2},
        interpret=interpret,
    )(tiled(delta, tiles, 0), jnp.broadcast_to(weight.astype(jnp.float32), (1, LANES)), *old)
    up, ups, downs = (untiled(part, tiles, shape) for part in (up, ups, downs))
    return votes._replace(up=up, ups=ups, downs=downs, up_share=votes.up_share + jnp.abs(weight))
