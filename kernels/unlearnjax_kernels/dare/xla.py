"""The counter-based bits in XLA: integer arithmetic on an iota, which fuses into whatever uses them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32, UInt32


class Part(NamedTuple):
    """Which part of a tensor an array holds, for code that sees one shard or chunk of it.

    whole: the tensor's shape. start: the part's first index along each axis (traced or not).
    """

    whole: tuple[int, ...]
    start: Sequence[int | Int32[Array, ""]]


def mixed(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """See `reference.mixed`."""
    x = (x ^ (x >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ (x >> jnp.uint32(16))


def places(shape: tuple[int, ...], part: Part | None = None) -> UInt32[Array, "..."]:
    """The row-major place of each entry in its whole tensor, modulo 2^32."""
    whole, start = (shape, [0] * len(shape)) if part is None else part
    result = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        index = jax.lax.broadcasted_iota(jnp.uint32, shape, axis) + jnp.asarray(start[axis]).astype(jnp.uint32)
        result = result + index * jnp.uint32(stride % 2**32)
        stride *= whole[axis]
    return result


def bits(
    seed: UInt32[Array, "2"], candidate: int | UInt32[Array, ""], places: UInt32[Array, "..."]
) -> UInt32[Array, "..."]:
    """See `reference.bits`."""
    own = mixed(jnp.asarray(candidate).astype(jnp.uint32) ^ seed[1])
    return mixed(mixed(places ^ seed[0]) + own)


def kept(
    seed: UInt32[Array, "2"],
    candidate: int | UInt32[Array, ""],
    places: UInt32[Array, "..."],
    density: Float32[Array, "..."],
) -> Bool[Array, "..."]:
    """See `reference.kept`; the density may differ from entry to entry."""
    return (bits(seed, candidate, places) < chance_limit(density)) | (density >= 1)


def chance_limit(density: Float32[Array, "..."]) -> UInt32[Array, "..."]:
    """Bits below it occur with this probability (below 1: nothing is left out at 1, which is compared apart)."""
    # The product with 2^32 is exact, and below 2^32 where it is converted.
    return (jnp.minimum(density, jnp.float32(1 - 2**-24)) * jnp.float32(2**32)).astype(jnp.uint32)
