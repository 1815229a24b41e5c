"""Digests of arrays where they lie: equal weights have the same on any mesh, and none is gathered for it."""

import hashlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

AXES = (0x01000193, 0x2C1B3C6D, 0x297A2D39, 0x45D9F3B1, 0x119DE1F3)  # odd: of a place's coordinates


def digest_of(arrays: Iterable[tuple[str, Any]]) -> str:
    """Of arrays with their names, dtypes and shapes, as 64 hexadecimal digits.

    Host arrays go in as their bytes. Of each of jax's arrays come two sums modulo 2^32 over its entries' bits, mixed
    with their places: they do not depend on the order of summing, so not on the devices. Two arrays that differ share
    both by chance once in 2^64; this is no protection against arrays that were made to.

    Args:
      arrays: names, and arrays of at most 5 axes, or numbers. All processes of a job must give the same ones.
    """
    found, leaves = hashlib.sha256(), [(name, x if isinstance(x, jax.Array) else np.asarray(x)) for name, x in arrays]
    # All are given to the devices before the first is waited for.
    sums = [_sums(x) if isinstance(x, jax.Array) and x.size else None for _, x in leaves]
    for (name, leaf), own in zip(leaves, sums, strict=True):
        found.update(f"{name} {np.dtype(leaf.dtype)} {leaf.shape}\n".encode())
        if own is not None:
            found.update(np.asarray(own.addressable_data(0)).tobytes())
        elif leaf.size:
            found.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return found.hexdigest()


@jax.jit
def _sums(x: jax.Array) -> jax.Array:
    """uint32 [2]."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if x.dtype.itemsize == 8:
        bits = lax.bitcast_convert_type(x, jnp.uint32)  # a last axis of two more
    else:
        bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    bits = bits.reshape(1) if bits.ndim == 0 else bits
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        place += lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * jnp.uint32(AXES[axis])
    one = _mixed(bits * jnp.uint32(0x9E3779B1) ^ place)
    two = (one << 13 | one >> 19) * (one >> 3 | jnp.uint32(1))
    # One reduction of both: XLA's CPU code is twenty times faster than for one after the other.
    nothing = (jnp.uint32(0), jnp.uint32(0))
    return jnp.stack(lax.reduce((one, two), nothing, lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(bits.ndim))))


def _mixed(x: jax.Array) -> jax.Array:
    """A bijection of 32 bits that spreads each over all (MurmurHash3's last step)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
