"""Keys and values of the slots written so far, and how a layer writes and reads its own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float, Int

from unlearnjax.models.config import ModelConfig


class Cache(NamedTuple):
    """All layers' keys and values. All rows write the same slots: pad prompts on the left.

    Each layer has its own arrays where layers are unrolled; where they are scanned, all share one with an axis of
    layers in front. Unrolled, a call writes in place and reads without a copy, because the arrays have the very shape
    of the products' operands: XLA fuses any reshape between write and read with a second write, into a copy.
    """

    keys: tuple[Float[Array, "*layers batch kv_heads head_dim slots"], ...]
    values: tuple[Float[Array, "*layers batch kv_heads slots head_dim"], ...]
    segments: Int[Array, "batch slots"]  # 0 marks padding and slots not written yet
    length: Int[Array, ""]

    @property
    def slots(self) -> int:
        return self.segments.shape[-1]


class Slots(NamedTuple):
    """A layer's view of the cache: its own arrays, or its place in those of all layers. `begin` slots are written."""

    keys: Float[Array, "*layers batch kv_heads head_dim slots"]
    values: Float[Array, "*layers batch kv_heads slots head_dim"]
    layer: Int[Array, ""] | None
    begin: Int[Array, ""]


def init_cache(config: ModelConfig, unroll: bool, batch: int, slots: int, dtype: Any) -> Cache:
    """An empty cache of `slots` positions for `batch` rows."""
    parts, lead = (config.layers, ()) if unroll else (1, (config.layers,))
    lead = (*lead, batch, config.kv_heads)
    keys = tuple(jnp.zeros((*lead, config.head_dim, slots), dtype) for _ in range(parts))
    values = tuple(jnp.zeros((*lead, slots, config.head_dim), dtype) for _ in range(parts))
    return Cache(keys, values, jnp.zeros((batch, slots), jnp.int32), jnp.zeros((), jnp.int32))


def extend(
    slots: Slots,
    keys: Float[Array, "batch kv_heads head_dim length"],
    values: Float[Array, "batch kv_heads length head_dim"],
) -> tuple[Slots, Array, Array]:
    """Write a call's keys and values; returns what was written to, and the keys and values to attend to.

    Written before they are read: the other way round XLA would copy the arrays to keep what is read. A call as long as
    the cache can only be the first one and attends to its own keys alone.
    """
    zero = jnp.zeros((), jnp.int32)
    first = (zero, zero) if slots.layer is None else (slots.layer, zero, zero)

    def write(old: Array, new: Array, place: tuple[Array, Array]) -> Array:
        return _write(old, new.reshape((1,) * (old.ndim - new.ndim) + new.shape), (*first, *place))

    written = slots._replace(
        keys=write(slots.keys, keys, (zero, slots.begin)), values=write(slots.values, values, (slots.begin, zero))
    )
    if values.shape[-2] == written.values.shape[-2]:
        return written, keys, values
    if slots.layer is None:
        return written, written.keys, written.values
    index = slots.layer
    keys, values = (jax.lax.dynamic_index_in_dim(x, index, keepdims=False) for x in (written.keys, written.values))
    return written, keys, values


@custom_vmap
def _write(old: Array, new: Array, place: tuple[Array, ...]) -> Array:
    return jax.lax.dynamic_update_slice(old, new.astype(old.dtype), place)


@_write.def_vmap
def _write_mapped(size: int, mapped: Any, old: Array, new: Array, place: tuple[Array, ...]) -> tuple[Array, bool]:
    # JAX's own rule makes a scatter of it, which XLA does not do in place.
    if any(jax.tree.leaves(mapped[2])):
        raise ValueError("all rows of all candidates must have written the same number of slots")
    old, new = (x if m else jnp.broadcast_to(x[None], (size, *x.shape)) for x, m in zip((old, new), mapped))
    return _write(old, new, (jnp.zeros((), jnp.int32), *place)), True
