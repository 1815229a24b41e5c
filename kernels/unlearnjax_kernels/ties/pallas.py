"""Trim, elect and average as a TPU (Mosaic) kernel: each block of every candidate is read once, and one is written."""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, Int32, UInt32

from unlearnjax_kernels.tiling import LANES, along_lanes, tiled, tiling, untiled


def _kernel(x_ref, thresholds_ref, numbers_ref, tie_ref, out_ref, *, by_sign: bool) -> None:  # type: ignore[no-untyped-def]
    number = x_ref.shape[0]
    weights, votes, shares = ([numbers_ref[k, i] for i in range(number)] for k in range(3))  # [1, lanes] each
    kept = []
    for i in range(number):
        x = x_ref[i].astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(0x7FFFFFFF)
        kept.append(jnp.where(bits >= thresholds_ref[i], x, jnp.float32(0)))
    total = jnp.zeros(out_ref.shape, jnp.float32)
    for i, x in enumerate(kept):
        vote = votes[i] * x
        # Not jnp.sign: its lowering asks the attached device for its generation, so nothing compiles without one.
        total = total + ((vote > 0).astype(jnp.float32) - (vote < 0).astype(jnp.float32) if by_sign else vote)
    positive = (total > 0) | ((total == 0) & (tie_ref[...] > 0))
    value, divisor = jnp.zeros(out_ref.shape, jnp.float32), jnp.zeros(out_ref.shape, jnp.float32)
    for i, x in enumerate(kept):
        vote = votes[i] * x
        agrees = (positive & (vote > 0)) | (~positive & (vote < 0))
        value = value + jnp.where(agrees, weights[i] * x, jnp.float32(0))
        divisor = divisor + jnp.where(agrees, shares[i], jnp.float32(0))
    out_ref[...] = value / jnp.where(divisor == 0, jnp.float32(1), divisor)


def elect_mean(
    deltas: Float[Array, "N ..."],
    thresholds: UInt32[Array, "N"],
    weights: Float32[Array, "N"],
    votes: Float32[Array, "N"],
    shares: Float32[Array, "N"],
    tie: Int32[Array, ""],
    by_sign: bool,
    interpret: bool = False,
) -> Float32[Array, "..."]:
    """See `api.elect_mean`."""
    number, shape = deltas.shape[0], deltas.shape[1:]
    tiles = tiling(shape, number + 1)
    numbers = jnp.stack([along_lanes(x.astype(jnp.float32)) for x in (weights, votes, shares)])
    whole = lambda *dims: pl.BlockSpec(dims, lambda i: (0,) * len(dims))  # noqa: E731
    out = pl.pallas_call(
        functools.partial(_kernel, by_sign=by_sign),
        grid=(tiles.blocks,),
        in_specs=[
            pl.BlockSpec((number, tiles.block, LANES), lambda i: (0, i, 0)),
            whole(number, 1, LANES),
            whole(3, number, 1, LANES),
            whole(1, LANES),
        ],
        out_specs=pl.BlockSpec((tiles.block, LANES), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((tiles.rows, LANES), jnp.float32),
        interpret=interpret,
    )(
        tiled(deltas, tiles, 1),
        along_lanes(jax.lax.bitcast_convert_type(thresholds, jnp.int32)),
        numbers,
        jnp.broadcast_to(tie.astype(jnp.int32), (1, LANES)),
    )
    return untiled(out, tiles, shape)
