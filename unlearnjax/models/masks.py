"""Which keys each query sees. Keys are the slots of the cache, or without one this call's own positions."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from unlearnjax.models.cache import Cache


def causal_mask(
    length: int, segments: Int[Array, "batch length"] | None, cache: Cache | None
) -> tuple[Bool[Array, "batch_or_1 length keys"], Int[Array, "batch slots"] | None]:
    """The mask of `length` queries, and the cache's segments after this call (segments without a cache).

    Attention stays inside a segment. A padding query (segment 0) sees only padding, so its softmax row stays finite;
    its output is never read.
    """
    query = jnp.arange(length, dtype=jnp.int32)[:, None]
    if cache is None:
        causal = (jnp.arange(length, dtype=jnp.int32)[None] <= query)[None]
        if segments is None:
            return causal, None
        return causal & (segments[:, :, None] == segments[:, None, :]), segments
    own = jnp.ones((cache.segments.shape[0], length), jnp.int32) if segments is None else segments.astype(jnp.int32)
    after = jax.lax.dynamic_update_slice(cache.segments, own, (jnp.zeros((), jnp.int32), cache.length))
    causal = jnp.arange(cache.slots, dtype=jnp.int32)[None] <= cache.length + query
    return causal[None] & (own[:, :, None] == after[:, None, :]), after


def window_mask(window: int, length: int, cache: Cache | None) -> Bool[Array, "1 length keys"]:
    """Which of `causal_mask`'s keys lie less than `window` positions back."""
    begin, keys = (0, length) if cache is None else (cache.length, cache.slots)
    query = begin + jnp.arange(length, dtype=jnp.int32)[:, None]
    return (query - jnp.arange(keys, dtype=jnp.int32)[None] < window)[None]
