"""Softmax attention of grouped queries, on arrays; scores and softmax are float32."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from unlearnjax.models.precision import precision


def attend(
    query: Float[Array, "batch kv_heads group length head_dim"],
    key: Float[Array, "batch kv_heads head_dim keys"],
    value: Float[Array, "batch kv_heads keys head_dim"],
    mask: Bool[Array, "batch_or_1 length keys"],
    scale: float,
    scores_at_once: int | None = None,
) -> Float[Array, "batch kv_heads group length head_dim"]:
    """softmax(scale * q k + mask) v.

    Args:
      scores_at_once: rows are attended to in blocks of about so many scores, and the backward pass forms a block's
        scores again instead of keeping them: on a CPU the blocks stay in the caches. None: all rows at once, and the
        probabilities are kept.
    """
    batch, kv_heads, group, length, _ = query.shape
    if scores_at_once is None:
        return _attend(query, key, value, mask, scale)
    block = max(1, scores_at_once // (kv_heads * group * length * key.shape[3]))
    if block >= batch:
        return _attend(query, key, value, mask, scale)

    @jax.checkpoint
    def row(x: tuple[Array, Array, Array, Array | None]) -> Array:
        q, k, v, m = x
        own = mask[0] if m is None else m
        return _attend(q[None], k[None], v[None], own[None], scale)[0]

    return jax.lax.map(row, (query, key, value, None if mask.shape[0] == 1 else mask), batch_size=block)


FLASH_LEAST = 128  # tokens of a row below which scores are few, and XLA forms them


def flash_suits(head_dim: int, dtype: jnp.dtype, lengths: Iterable[int]) -> bool:
    """Whether JAX's default device can take cuDNN's fused attention, forward and backward, for rows of these lengths:
    NVIDIA GPUs from Ampere on, bfloat16 or float16, a cuDNN that compiles it. Rows below FLASH_LEAST do not ask it."""
    device = _device()
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    major = int(str(device.compute_capability).split(".")[0])
    if major < 8 or dtype not in (jnp.bfloat16, jnp.float16) or head_dim % 8 or head_dim > 128:
        return False
    asked = sorted({n for n in lengths if n >= FLASH_LEAST})
    return bool(asked) and all(_compiles(head_dim, jnp.dtype(dtype).name, n) for n in asked)


def _device() -> Any:
    return jax.devices()[0]


@functools.cache
def _compiles(head_dim: int, dtype: str, length: int) -> bool:
    x = jax.ShapeDtypeStruct((1, 1, 1, length, head_dim), dtype)
    key, value = (jax.ShapeDtypeStruct((1, 1, *tail), dtype) for tail in ((head_dim, length), (length, head_dim)))

    def total(query: Array, key: Array, value: Array) -> Array:
        return attend_causally(query, key, value, 1.0).astype(jnp.float32).sum()

    try:
        jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(x, key, value).compile()
    except Exception:  # cuDNN is missing, too old, or has no kernel for it: each says so in its own way
        return False
    return True


def attend_causally(
    query: Float[Array, "batch kv_heads group length head_dim"],
    key: Float[Array, "batch kv_heads head_dim length"],
    value: Float[Array, "batch kv_heads length head_dim"],
    scale: float,
) -> Float[Array, "batch kv_heads group length head_dim"]:
    """`attend` with the causal mask, by cuDNN's fused kernel: bfloat16 or float16, on a GPU."""
    batch, kv_heads, group, length, width = query.shape
    rows = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    mixed = jax.nn.dot_product_attention(
        rows(query.reshape(batch, kv_heads * group, length, width)), rows(jnp.swapaxes(key, -1, -2)), rows(value),
        scale=scale, is_causal=True, implementation="cudnn",
    )  # fmt: skip
    return rows(mixed).reshape(query.shape)


def _attend(query: Array, key: Array, value: Array, mask: Array, scale: float) -> Array:
    exact = precision(query.dtype)
    scores = jnp.einsum("bkgtd,bkds->bkgts", query, key, precision=exact, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * scale, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
    return jnp.einsum("bkgts,bksd->bkgtd", probabilities, value, precision=exact)
