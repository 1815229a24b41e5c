"""One decoder layer in Flax linen: linears with an optional low-rank adapter, norms, attention, gated MLP."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from unlearnjax.models.abstract import name_key
from unlearnjax.models.attention import FLASH_LEAST, attend, attend_causally
from unlearnjax.models.cache import Slots, extend
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.precision import precision
from unlearnjax.models.protocol import Dropout
from unlearnjax.models.rope import rotate

KEPT = OUTPUT, LOW_RANK = "linear's output", "low-rank input"  # names of what `remat="linears"` keeps


def project(x: Float[Array, "... inner"], weight: Float[Array, "out inner"]) -> Float[Array, "... out"]:
    """x @ weight.T with the weight left in Hugging Face's orientation."""
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), precision=precision(x.dtype))


def _mixed(x: Array) -> Array:
    """One round of a 32-bit mixer (xor-shift and multiply): every input bit moves about half of the output's."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    return (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)


def drop(x: Array, dropout: Dropout, name: str) -> Array:
    """Zero each entry with probability `rate` (exact to 2^-32) and scale the others by 1 / (1 - rate).

    An entry's bits are a hash of its place and the linear's key. JAX's own generator (threefry) took a sixth of a
    small step's time; masks need independence, not cryptography. The key's two words enter at different rounds, so
    that no key's sequence is another's shifted.
    """
    low, high = jax.random.key_data(name_key(dropout.key, name))
    place = jax.lax.iota(jnp.uint32, x.size).reshape(x.shape)
    bits = _mixed(_mixed(place ^ low) + high)
    bits = bits ^ (bits >> 16)
    # rate < 1, so that the product stays below 2^32.
    kept = bits >= (dropout.rate * 4294967296.0).astype(jnp.uint32)
    return jnp.where(kept, x / (1.0 - dropout.rate).astype(x.dtype), jnp.zeros_like(x))


def pick(x: Float[Array, "batch length features"], at: Int[Array, "batch reads"]) -> Array:
    """x at the positions `at`, [batch, reads, features]."""
    return jnp.take_along_axis(x, at[..., None], axis=1)


class Linear(nn.Module):
    """y = W x (+ bias) (+ b (a x) when the `lora` collection holds this module's `a` and `b`)."""

    features: int
    bias: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch length inner"], dropout: Dropout | None) -> Array:
        weight = self.param("weight", nn.initializers.lecun_normal(), (self.features, x.shape[-1]))
        y = project(x, weight)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + bias.reshape((1,) * (y.ndim - 1) + bias.shape)
        if self.has_variable("lora", "a"):
            a: Array = self.get_variable("lora", "a")
            b: Array = self.get_variable("lora", "b")
            dropped = x if dropout is None else drop(x, dropout, self.name or "linear")
            low = checkpoint_name(project(dropped, a.astype(x.dtype)), LOW_RANK)
            y = y + project(low, b.astype(x.dtype))
        return checkpoint_name(y, OUTPUT)


class Norm(nn.Module):
    """The norms of `ModelConfig.norm`, over the last axis and computed in float32."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*lead hidden"]) -> Float[Array, "*lead hidden"]:
        wide = x.astype(jnp.float32)
        if self.kind == "layer":
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        if self.kind == "layer":
            return wide.astype(x.dtype)
        start = nn.initializers.zeros if self.kind == "rms_offset" else nn.initializers.ones
        scale = self.param("scale", start, (x.shape[-1],))
        scale = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        if self.kind == "rms":
            return wide.astype(x.dtype) * scale
        scale = scale.astype(jnp.float32)
        return (wide * (1.0 + scale if self.kind == "rms_offset" else scale)).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    config: ModelConfig
    scores_at_once: int | None = None
    flash: bool = False  # the mask is the causal one: the fused kernel may be taken

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch length hidden"],
        rotation: tuple[Array, Array],
        mask: Bool[Array, "batch_or_1 length keys"],
        slots: Slots | None,
        dropout: Dropout | None,
        at: Int[Array, "batch reads"] | None = None,
    ) -> tuple[Array, Slots | None]:
        """Returns the output, and the slots with this call's keys and values.

        With `at` only these positions ask, and the output has them alone; all positions are keys all the same.
        """
        c = self.config
        batch = x.shape[0]
        asking, cos, sin = x, *rotation
        if at is not None:
            asking = pick(x, at)
            cos, sin = (jnp.take_along_axis(r, at[:, None, :, None], axis=2) for r in rotation)
            mask = pick(jnp.broadcast_to(mask, (batch, *mask.shape[1:])), at)

        def heads(name: str, count: int, x: Array) -> Array:
            y = Linear(count * c.head_dim, bias=c.qkv_bias, name=name)(x, dropout)
            if c.clip_qkv is not None:
                y = jnp.clip(y, -c.clip_qkv, c.clip_qkv)
            normed = None if name == "v" else c.qk_norm
            if normed == "whole":
                y = Norm(c.norm, c.norm_eps, name=f"{name}_norm")(y)
            y = y.reshape(batch, -1, count, c.head_dim)
            if normed == "head":
                y = Norm(c.norm, c.norm_eps, name=f"{name}_norm")(y)
            return y.transpose(0, 2, 1, 3)

        query = rotate(heads("q", c.heads, asking), cos, sin)
        key, values = rotate(heads("k", c.kv_heads, x), *rotation), heads("v", c.kv_heads, x)
        grouped = query.reshape(batch, c.kv_heads, c.heads // c.kv_heads, -1, c.head_dim)
        at_once = self.scores_at_once
        keys = jnp.swapaxes(key, -1, -2)
        if slots is not None:
            slots, keys, values = extend(slots, keys, values)
            at_once = at_once if keys.shape[3] == x.shape[1] else None  # blocks of a cache's rows would be copies
        if self.flash and at is None and x.shape[1] >= FLASH_LEAST:
            mixed = attend_causally(grouped, keys, values, c.attention_scale)
        else:
            mixed = attend(grouped, keys, values, mask, c.attention_scale, at_once)
        mixed = mixed.reshape(batch, c.heads, -1, c.head_dim).transpose(0, 2, 1, 3)
        mixed = mixed.reshape(batch, -1, c.heads * c.head_dim)
        return Linear(c.hidden_size, name="o")(mixed, dropout), slots


class MLP(nn.Module):
    """down(activation(gate x) * up x)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch length hidden"], dropout: Dropout | None) -> Array:
        wide = self.config.intermediate_size
        activation = jax.nn.gelu if self.config.activation == "gelu_tanh" else jax.nn.silu
        gate = Linear(wide, name="gate")(x, dropout)
        up = Linear(wide, name="up")(x, dropout)
        return Linear(self.config.hidden_size, name="down")(activation(gate) * up, dropout)
