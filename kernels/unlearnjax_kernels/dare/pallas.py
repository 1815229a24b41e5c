"""Random keeping as a TPU (Mosaic) kernel: the bits are made where they are used, from the entries' places."""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Float32, UInt32

from unlearnjax_kernels.dare.xla import chance_limit, mixed
from unlearnjax_kernels.tiling import LANES, tiled, tiling, untiled

_SIGN = 0x80000000


def _kernel(x_ref, numbers_ref, out_ref) -> None:  # type: ignore[no-untyped-def]
    block = x_ref.shape[0]
    seed, own, start, limit, everything = (numbers_ref[i : i + 1] for i in range(5))
    row = jax.lax.broadcasted_iota(jnp.uint32, (block, LANES), 0) + (pl.program_id(0) * block).astype(jnp.uint32)
    lane = jax.lax.broadcasted_iota(jnp.uint32, (block, LANES), 1)
    place = start + row * jnp.uint32(LANES) + lane
    bits = mixed(mixed(place ^ seed) + own)
    # Compared as signed numbers, which is what the hardware has, with both sides moved by 2**31.
    signed = lambda x: jax.lax.bitcast_convert_type(x ^ jnp.uint32(_SIGN), jnp.int32)  # noqa: E731
    kept = (signed(bits) < signed(limit)) | (everything != 0)
    out_ref[...] = jnp.where(kept, x_ref[...].astype(jnp.float32), jnp.float32(0)).astype(out_ref.dtype)


def drop(
    x: Float[Array, "..."],
    seed: UInt32[Array, "2"],
    candidate: int | UInt32[Array, ""],
    density: Float32[Array, ""],
    start: UInt32[Array, ""],
    interpret: bool = False,
) -> Float[Array, "..."]:
    """See `api.drop`."""
    tiles = tiling(x.shape, 2)
    numbers = jnp.stack([
        seed[0],
        mixed(jnp.asarray(candidate).astype(jnp.uint32) ^ seed[1]),
        start,
        chance_limit(density),
        (density >= 1).astype(jnp.uint32),
    ])  # fmt: skip
    block = pl.BlockSpec((tiles.block, LANES), lambda i: (i, 0))
    out = pl.pallas_call(
        _kernel,
        grid=(tiles.blocks,),
        in_specs=[block, pl.BlockSpec((5, LANES), lambda i: (0, 0))],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct((tiles.rows, LANES), x.dtype),
        interpret=interpret,
    )(tiled(x, tiles, 0), jnp.broadcast_to(numbers[:, None], (5, LANES)))
    return untiled(out, tiles, x.shape)
