"""Counts beyond 32 bits: two 16-bit limbs in int32, [low, high].

Counts of a whole model overflow 32 bits, and JAX's default integers are 32 bits wide. Limbs are added like any partial
sum (over leaves, chunks, shards), and carried only when compared.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32


def to_limbs(count: int | Int32[Array, "..."]) -> Any:
    """A (possibly negative) count as [low, high] limbs; a Python int may be as large as 2**46."""
    if isinstance(count, int):
        return np.array([count & 0xFFFF, count >> 16], np.int32)  # a constant: no program is run for it
    return jnp.stack([count & 0xFFFF, count >> 16], axis=-1)


def carry(limbs: Int32[Array, "... 2"]) -> Int32[Array, "... 2"]:
    """A sum of limbs with its low limb back in [0, 65536)."""
    low, high = limbs[..., 0], limbs[..., 1]
    return jnp.stack([low & 0xFFFF, high + (low >> 16)], axis=-1)


def at_least(count: Int32[Array, "... 2"], bound: Int32[Array, "... 2"]) -> Bool[Array, "..."]:
    """count >= bound, both in limbs."""
    return sign(count - bound) >= 0


def sign(count: Int32[Array, "... 2"]) -> Int32[Array, "..."]:
    """-1, 0 or 1: the sign of a count in limbs."""
    low, high = carry(count)[..., 0], carry(count)[..., 1]
    return jnp.where(high < 0, -1, jnp.where((high > 0) | (low > 0), 1, 0)).astype(jnp.int32)


def to_float(limbs: Int32[Array, "... 2"]) -> Float32[Array, "..."]:
    """The count, rounded."""
    return limbs[..., 1].astype(jnp.float32) * jnp.float32(65536) + limbs[..., 0].astype(jnp.float32)
