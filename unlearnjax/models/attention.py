"""Softmax attention of grouped queries, on arrays; scores and softmax are float32."""

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


def flash_suits(head_dim: int, dtype: jnp.dtype) -> bool:
    """Whether JAX's default device has cuDNN's fused attention for such heads: NVIDIA GPUs from Ampere on."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    major = int(str(device.compute_capability).split(".")[0])
    return major >= 8 and dtype in (jnp.bfloat16, jnp.float16) and head_dim % 8 == 0 and head_dim <= 128


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
