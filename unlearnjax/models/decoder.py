"""The decoder's forward pass: embeddings, layers (unrolled or scanned), final norm. Hidden states out, never logits."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from unlearnjax.models.abstract import abstract_params
from unlearnjax.models.cache import Cache, Slots, init_cache
from unlearnjax.models.config import ModelConfig, Remat
from unlearnjax.models.layers import KEPT, MLP, Attention, Norm, pick
from unlearnjax.models.masks import causal_mask, window_mask
from unlearnjax.models.protocol import WHERE_IT_IS, Dropout, Model, Output, Spread, Taps
from unlearnjax.models.rope import rotations


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x)), with taps on both outputs and on the sum.

    OLMo-2 norms the outputs instead of the inputs, Gemma both; the taps are on what is added to x.
    """

    config: ModelConfig
    scores_at_once: int | None = None
    flash: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        rotation: Any,
        mask: Array,
        slots: Slots | None,
        dropout: Dropout | None,
        replace: dict[str, Any],
        at: Array | None = None,
    ) -> tuple[Array, Slots | None, dict[str, Array]]:
        c = self.config
        seen: dict[str, Array] = {}

        def tap(site: str, value: Array) -> Array:
            if site in replace:
                where, other = replace[site]
                value = jnp.where(where[..., None], other.astype(value.dtype), value)
            seen[site] = value
            return value

        def before(name: str, value: Array) -> Array:
            return value if c.norms == "after" else Norm(c.norm, c.norm_eps, name=f"{name}_norm")(value)

        def after(name: str, value: Array) -> Array:
            return value if c.norms == "before" else Norm(c.norm, c.norm_eps, name=f"{name}_post_norm")(value)

        attention = Attention(c, self.scores_at_once, self.flash, name="attention")
        attended, slots = attention(before("attention", x), rotation, mask, slots, dropout, at)
        x = x if at is None else pick(x, at)
        x = x + tap("attention", after("attention", attended))
        x = x + tap("mlp", after("mlp", MLP(c, name="mlp")(before("mlp", x), dropout)))
        return tap("hidden", x), slots, seen


class View(NamedTuple):
    """What a layer needs to know of the positions."""

    rotation: tuple[Array, Array]
    mask: Array


def _views(
    config: ModelConfig, positions: Array, mask: Array, cache: Cache | None, sliding: Sequence[bool]
) -> tuple[View, View]:
    """The views of layers that see everything, and of those that see a sliding window."""
    full = View(rotations(config.rope, config.head_dim, positions), mask)
    if config.window is None or not any(sliding):
        return full, full
    near = window_mask(config.window, positions.shape[1], cache)
    return full, View(rotations(config.local_rope or config.rope, config.head_dim, positions), mask & near)


def embedded(config: ModelConfig, params: PyTree[Array], tokens: Array) -> Array:
    """The hidden states that enter the first layer."""
    x: Array = params["embed"]["weight"][tokens]
    return x if config.embed_scale == 1.0 else x * jnp.asarray(config.embed_scale, x.dtype)


def final_norm(
    config: ModelConfig, params: PyTree[Array], x: Float[Array, "*lead hidden"]
) -> Float[Array, "*lead hidden"]:
    """What the head reads, of the last layer's output."""
    own = {"params": params["norm"]} if "norm" in params else {}
    return jnp.asarray(Norm(config.norm, config.norm_eps).apply(own, x))


def forward(
    config: ModelConfig,
    unroll: bool,
    remat: Remat,
    scores_at_once: int | None,
    flash: bool,
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
    at: Int[Array, "batch reads"] | None = None,
    spread: Spread = WHERE_IT_IS,
) -> Output:
    """The forward pass; `unlearnjax.models.protocol.Model` has the contract."""
    first, last = layers or (0, config.layers)
    batch, length = tokens.shape[:2]
    taps = taps or Taps()
    if at is not None and (taps.read or (taps.replace and last - first > 1)):
        raise ValueError("forward: `at` does not go with taps, but in a range of one layer with `replace`")
    if positions is None:
        start = jnp.zeros((), jnp.int32) if cache is None else cache.length
        positions = jnp.broadcast_to(start + jnp.arange(length, dtype=jnp.int32)[None], (batch, length))
    mask, segments_after = causal_mask(length, segments, cache)
    sliding = config.sliding[first:last] or (False,) * (last - first)
    full, local = _views(config, positions, mask, cache, sliding)

    x = spread.stream(embedded(config, params, tokens) if first == 0 else tokens)
    if taps.embed_add is not None:
        x = x + taps.embed_add.astype(x.dtype)

    # What is real never looks to the padding at its right, so without segments the mask is the causal one.
    causal = segments is None and cache is None and not any(sliding)
    layer = DecoderLayer(config, scores_at_once, flash and causal)

    def body(
        x: Array, slots: Slots | None, xs: tuple[Any, Any, Any], slides: bool | Array, at: Array | None
    ) -> tuple[Array, Slots | None, dict[str, Array]]:
        variables, replace, index = xs
        variables = {**variables, "lora": spread.adapter(variables["lora"])}
        if isinstance(slides, bool):
            view = local if slides else full
        else:
            view = jax.tree.map(lambda a, b: jnp.where(slides, a, b), local, full)
        dropped = None if dropout is None else Dropout(jax.random.fold_in(dropout.key, index), dropout.rate)
        x, slots, seen = layer.apply(variables, x, *view, slots, dropped, replace, at)  # type: ignore[misc]
        return spread.stream(x), slots, {site: seen[site] for site in taps.read}

    saving = _saving(remat, unroll)
    trees = {"params": params["layers"], "lora": {} if lora is None else lora["layers"]}
    indices = jnp.arange(first, last, dtype=jnp.int32)
    walk = _unrolled if unroll else _scanned
    x, cache_parts, read = walk(body, saving, x, cache, trees, taps.replace or {}, indices, (first, last), sliding, at)

    if last == config.layers:
        x = final_norm(config, params, x)
    after = None
    if cache is not None and segments_after is not None:
        after = Cache(*cache_parts, segments_after, cache.length + length)
    return Output(x, after, read)


def _saving(remat: Remat, unroll: bool) -> Callable[[Any], Any]:
    """What wraps a layer, so that its backward pass finds what it needs."""
    if remat == "none":
        return lambda step: step
    kept = jax.checkpoint_policies.save_only_these_names(*KEPT) if remat == "linears" else None
    # In a scan nothing can take the second pass for the first.
    return functools.partial(jax.checkpoint, policy=kept, prevent_cse=unroll)


def _unrolled(
    body: Any, saving: Any, x: Array, cache: Cache | None, trees: Any, replace: Any, indices: Array,
    layers: tuple[int, int], sliding: Sequence[bool], at: Array | None,
) -> tuple[Array, tuple[Any, Any], dict[str, Array]]:  # fmt: skip
    """The layers one after another; returns x, the cache's keys and values, and what was tapped."""
    first, last = layers
    keys, values = ([], []) if cache is None else (list(cache.keys), list(cache.values))
    outs = []
    for place, i in enumerate(range(first, last)):
        # What follows the last layer's keys and values is read at these positions only, and computed there only.
        asked = at if i == last - 1 else None
        variables = {name: layer_of(tree, i) for name, tree in trees.items()}
        xs = (variables, jax.tree.map(lambda leaf, place=place: leaf[place], replace), indices[place])
        slots = None if cache is None else Slots(keys[i], values[i], None, cache.length)
        x, slots, seen = saving(functools.partial(body, slides=sliding[place], at=asked))(x, slots, xs)
        outs.append(seen)
        if slots is not None:
            keys[i], values[i] = slots.keys, slots.values
    return x, (tuple(keys), tuple(values)), {site: jnp.stack([seen[site] for seen in outs]) for site in outs[0]}


def _scanned(
    body: Any, saving: Any, x: Array, cache: Cache | None, trees: Any, replace: Any, indices: Array,
    layers: tuple[int, int], sliding: Sequence[bool], at: Array | None,
) -> tuple[Array, tuple[Any, Any], dict[str, Array]]:  # fmt: skip
    """As `_unrolled`, in one scan."""
    first, last = layers
    if jax.tree.leaves(trees)[0].shape[0] != last - first:
        trees = jax.tree.map(lambda leaf: leaf[first:last], trees)
    alike = len(set(sliding)) == 1

    def step(carry: tuple[Array, Any], xs: Any) -> tuple[Any, Any]:
        x, stored = carry
        slots = None if cache is None else Slots(stored[0], stored[1], xs[0][2], cache.length)
        x, slots, seen = body(x, slots, xs[0], sliding[0] if alike else xs[1], None)
        return (x, None if slots is None else (slots.keys, slots.values)), seen

    stored = None if cache is None else (cache.keys[0], cache.values[0])
    xs = ((trees, replace, indices), jnp.asarray(sliding, bool))
    (x, stored), read = jax.lax.scan(saving(step), (x, stored), xs)
    # A scan over all but the last layer would copy the stacked weights, and one of many layers gains little.
    x = x if at is None else pick(x, at)
    return x, ((), ()) if stored is None else ((stored[0],), (stored[1],)), read


def layer_of(tree: PyTree[Array], i: int) -> PyTree[Array]:
    """Layer i of a stack, or of layers taken apart."""
    return tree[i] if isinstance(tree, tuple) else jax.tree.map(lambda leaf: leaf[i], tree)


def apart(config: ModelConfig, unroll: bool, tree: PyTree[Array] | None, axis: int = 0) -> PyTree[Array] | None:
    """A tree (base weights or adapter) with its stacked layers taken apart where layers are unrolled.

    A loop whose body takes them apart copies every weight at every turn.
    """
    if tree is None or not unroll:
        return tree

    def one(i: int) -> PyTree[Array]:
        return jax.tree.map(lambda leaf: jax.lax.index_in_dim(leaf, i, axis, keepdims=False), tree["layers"])

    return {**tree, "layers": tuple(one(i) for i in range(config.layers))}


def head(params: PyTree[Array]) -> Float[Array, "vocab hidden"]:
    """The output embedding; the input embedding where they are tied."""
    return params["head"]["weight"] if "head" in params else params["embed"]["weight"]


UNROLLED = 8  # layers up to which they are unrolled by default
# Float32 scores of one row of 256 tokens and 8 heads: 2 MiB, about a CPU core's cache.
CPU_SCORES_AT_ONCE = 2**19


def default_remat(unrolled: bool) -> Remat:
    """See `build`."""
    return "none" if unrolled else "full"


def build(
    config: ModelConfig, *, unroll: bool | None = None, remat: Remat | None = None, scores_at_once: int | None = None,
    flash: bool = False,
) -> Model:  # fmt: skip
    """A decoder as functions.

    Args:
      config: the model's sizes.
      unroll: unroll the layers (faster steps, slower compiles) or scan them. Default: unrolled up to UNROLLED.
      remat: what the backward pass recomputes of a layer: nothing (`none`), what lies between its linears, whose
        outputs are kept (`linears`), or all of it (`full`), which keeps the layer's input alone. Default: `none` where
        layers are unrolled, else `full`.
      scores_at_once: attention goes through the rows in blocks of about so many scores. Default: all rows at once,
        but CPU_SCORES_AT_ONCE where JAX's default device is a CPU.
      flash: attention by cuDNN's fused kernel, which forms no scores in memory, where it can be: without segments,
        cache or sliding window, for rows of FLASH_LEAST tokens or more. The caller asks `flash_suits` before.

    Raises:
      ValueError: another `remat`.
    """
    unroll = config.layers <= UNROLLED if unroll is None else unroll
    remat = default_remat(unroll) if remat is None else remat
    if remat not in get_args(Remat):
        raise ValueError(f"build: remat is one of {', '.join(get_args(Remat))}, not {remat!r}")
    if scores_at_once is None and jax.default_backend() == "cpu":
        scores_at_once = CPU_SCORES_AT_ONCE
    run = functools.partial(forward, config, unroll, remat, scores_at_once, flash)
    cache = functools.partial(init_cache, config, unroll)
    split = functools.partial(apart, config, unroll)
    rebuilt = functools.partial(
        build, config, unroll=unroll, remat=remat, scores_at_once=scores_at_once, flash=flash
    )  # fmt: skip
    return Model(
        config, run, functools.partial(abstract_params, config), head, cache, split, rebuilt, remat, flash
    )  # fmt: skip
