"""Rotary position embeddings (RoFormer, 2104.09864, eq. 34), half-split as in GPT-NeoX, with Llama 3's scaling."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from unlearnjax.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> np.ndarray:
    """Inverse wavelengths, float32 [head_dim // 2]."""
    inverse = 1.0 / (rope.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim))
    if rope.kind == "linear":
        inverse = inverse / rope.factor
    elif rope.kind == "llama3":
        # Long waves are stretched by `factor`, short ones kept, those between interpolated.
        turns = rope.original_positions * inverse / (2 * math.pi)
        low, high = rope.low_frequency_factor, rope.high_frequency_factor
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        inverse = (1 - smooth) * inverse / rope.factor + smooth * inverse
    return inverse.astype(np.float32)


def rotations(rope: Rope, head_dim: int, positions: Int[Array, "batch length"]) -> tuple[Array, Array]:
    """Cosines and sines in float32, each [batch, 1, length, head_dim]."""
    angles = (
        positions.astype(jnp.float32)[:, None, :, None] * jnp.asarray(frequencies(rope, head_dim))[None, None, None]
    )
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(
    x: Float[Array, "batch heads length head_dim"], cos: Array, sin: Array
) -> Float[Array, "batch heads length head_dim"]:
    """Rotate queries or keys; computed in float32 and cast back."""
    wide = x.astype(jnp.float32)
    first, second = jnp.split(wide, 2, axis=-1)
    return (wide * cos + jnp.concatenate([-second, first], axis=-1) * sin).astype(x.dtype)
