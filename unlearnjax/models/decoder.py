"""The decoder's forward pass: embeddings, layers (unrolled or scanned), final norm. Hidden states out, never logits."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from unlearnjax.models.abstract import abstract_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.layers import MLP, Attention, Norm
from unlearnjax.models.protocol import Cache, Dropout, Model, Output, Taps
from unlearnjax.models.rope import rotations


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), with taps on both outputs and on the sum."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Array, rotation: Any, mask: Array, stored: Any, dropout: Dropout | None, replace: dict[str, Any]
    ) -> tuple[Array, tuple[Array, Array], dict[str, Array]]:
        c = self.config
        seen: dict[str, Array] = {}

        def tap(site: str, value: Array) -> Array:
            if site in replace:
                where, other = replace[site]
                value = jnp.where(where[..., None], other.astype(value.dtype), value)
            seen[site] = value
            return value

        normed = Norm(c.norm, c.norm_eps, name="attention_norm")(x)
        attended, new = Attention(c, name="attention")(normed, rotation, mask, stored, dropout)
        x = x + tap("attention", attended)
        x = x + tap("mlp", MLP(c, name="mlp")(Norm(c.norm, c.norm_eps, name="mlp_norm")(x), dropout))
        return tap("hidden", x), new, seen


def init_cache(config: ModelConfig, batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache of `slots` positions for `batch` rows."""
    shape = (config.layers, batch, config.kv_heads, slots, config.head_dim)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32)
    )


def _attention_mask(length: int, segments: Array | None, cache: Cache | None) -> tuple[Array, Array | None]:
    """Which slots each query sees, [batch or 1, length, slots], and the cache's segments after this call."""
    start: Array | int = 0
    slots, keys = length, segments
    if cache is not None:
        slots, start = cache.keys.shape[3], cache.length
        written = jnp.ones((cache.segments.shape[0], length), jnp.int32) if segments is None else segments
        keys = jax.lax.dynamic_update_slice(
            cache.segments, written.astype(jnp.int32), (jnp.zeros((), jnp.int32), start)
        )
        segments = written
    causal = jnp.arange(slots, dtype=jnp.int32)[None, :] <= start + jnp.arange(length, dtype=jnp.int32)[:, None]
    if segments is None or keys is None:
        return causal[None], None
    # A padding query (segment 0) sees only padding, so its softmax row stays finite and its output is never read.
    return causal[None] & (segments[:, :, None] == keys[:, None, :]), keys


def forward(
    config: ModelConfig,
    unroll: bool,
    remat: bool,
    params: PyTree[Array],
    lora: PyTree[Array] | None,
    tokens: Int[Array, "batch length"] | Float[Array, "batch length hidden"],
    *,
    positions: Int[Array, "batch length"] | None = None,
    segments: Int[Array, "batch length"] | None = None,
    cache: Cache | None = None,
    taps: Taps | None = None,
    layers: tuple[int, int] | None = None,
    dropout: Dropout | None = None,
) -> Output:
    """The forward pass; `unlearnjax.models.protocol.Model` has the contract."""
    first, last = layers or (0, config.layers)
    batch, length = tokens.shape[:2]
    taps = taps or Taps()
    if positions is None:
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        positions = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    rotation = rotations(config.rope, config.head_dim, positions)
    mask, cached_segments = _attention_mask(length, segments, cache)

    x = params["embed"]["weight"][tokens] if first == 0 else tokens
    if taps.embed_add is not None:
        x = x + taps.embed_add.astype(x.dtype)

    layer = DecoderLayer(config)
    whole = (first, last) == (0, config.layers)
    stacked = {
        "params": params["layers"],
        "lora": {} if lora is None else lora["layers"],
    }
    if not whole:
        stacked = jax.tree.map(lambda leaf: leaf[first:last], stacked)

    def body(carry: tuple[Array, Any], xs: tuple[Any, Any, Array]) -> tuple[tuple[Array, Any], Any]:
        x, stored = carry
        variables, replace, index = xs
        here = None if stored is None else (stored[0][index], stored[1][index], stored[2])
        dropped = None if dropout is None else Dropout(jax.random.fold_in(dropout.key, index), dropout.rate)
        x, (key, value), seen = layer.apply(variables, x, rotation, mask, here, dropped, replace)  # type: ignore[misc]
        if stored is not None:
            zero = jnp.zeros((), jnp.int32)
            at = (index, zero, zero, stored[2], zero)
            stored = (
                jax.lax.dynamic_update_slice(stored[0], key[None], at),
                jax.lax.dynamic_update_slice(stored[1], value[None], at),
                stored[2],
            )
        return (x, stored), {site: seen[site] for site in taps.read}

    step = jax.checkpoint(body) if remat else body
    carry = (x, None if cache is None else (cache.keys, cache.values, cache.length))
    xs = (stacked, taps.replace or {}, jnp.arange(first, last, dtype=jnp.int32))
    (x, stored), read = jax.lax.scan(step, carry, xs, unroll=max(last - first, 1) if unroll else 1)

    if last == config.layers:
        norm_params = {"params": params["norm"]} if "norm" in params else {}
        x = jnp.asarray(Norm(config.norm, config.norm_eps).apply(norm_params, x))
    after = None
    if cache is not None and stored is not None and cached_segments is not None:
        after = Cache(stored[0], stored[1], cached_segments, cache.length + length)
    return Output(x, after, read)


def head(params: PyTree[Array]) -> Float[Array, "vocab hidden"]:
    """The output embedding; the input embedding where they are tied."""
    return params["head"]["weight"] if "head" in params else params["embed"]["weight"]


def build(config: ModelConfig, *, unroll: bool | None = None, remat: bool = False) -> Model:
    """A decoder as functions.

    Args:
      config: the model's sizes.
      unroll: unroll the layers (faster steps, slower compiles) or scan them. Default: unrolled up to 8 layers.
      remat: recompute each layer in the backward pass instead of keeping its activations.
    """
    unroll = config.layers <= 8 if unroll is None else unroll
    return Model(
        config, functools.partial(forward, config, unroll, remat), functools.partial(abstract_params, config), head
    )
