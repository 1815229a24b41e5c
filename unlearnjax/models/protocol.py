"""What a model is to the rest of the library: pure functions over arrays, hidden states out, never logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, PyTree

from unlearnjax.models.cache import Cache
from unlearnjax.models.config import ModelConfig, Remat


class Variables(NamedTuple):
    """What an adapter makes of the base parameters. `lora` has the adapter's scale folded into `b`, or is None."""

    params: PyTree[Array]
    lora: PyTree[Array] | None = None


class Taps(NamedTuple):
    """Activations to read or to replace: arrays given to the forward pass, not hooks.

    Sites are `attention` and `mlp` (what a sub-layer adds to the residual stream, so
    after its norm where a family norms outputs) and `hidden` (a layer's output).
    `embed_add` is added to the embeddings (noise on a subject's tokens). `replace[site]` is (where, value): bool
    [layers, batch, length] and float [layers, batch, length, hidden]. The layer axis is that of the range being run.
    """

    read: tuple[str, ...] = ()
    embed_add: Float[Array, "batch length hidden"] | None = None
    replace: dict[str, tuple[Bool[Array, "layers batch length"], Float[Array, "layers batch length hidden"]]] | None = (
        None
    )


class Dropout(NamedTuple):
    """Dropout on the adapters' inputs. The masks depend on key, layer and linear only. `rate` may be traced."""

    key: Array
    rate: Float[Array, ""]


def _as_it_is(x: PyTree[Array]) -> PyTree[Array]:
    return x


class Spread(NamedTuple):
    """Where arrays lie among devices, as functions that say so inside a compiled program.

    `stream`: of the hidden states that enter the first layer, and of each layer's output. `adapter`: of a layer's
    low-rank factors, before they are used.
    """

    stream: Callable[[Array], Array] = _as_it_is
    adapter: Callable[[PyTree[Array]], PyTree[Array]] = _as_it_is


WHERE_IT_IS = Spread()


class Output(NamedTuple):
    """`hidden` is after the final norm when the range reaches the last layer. `taps[site]` is [layers, ...]."""

    hidden: Float[Array, "batch length hidden"]
    cache: Cache | None
    taps: dict[str, Float[Array, "layers batch length hidden"]]


class Model(NamedTuple):
    """A causal decoder as functions.

    `forward(params, lora, tokens, *, positions, segments, cache, taps, layers, dropout, at, spread) ->
    Output`:
      tokens: int [batch, length]; or, when `layers` starts above 0, the hidden states [batch, length, hidden] that
        enter its first layer.
      positions: int [batch, length], default 0, 1, ...; segments: int [batch, length], attention stays inside a
        segment and 0 is padding (left padding, right padding and packing are all just segments).
      layers: (start, stop), default all. Composing two ranges gives the whole, so stopping a gradient between them
        stops the backward pass there.
      at: int [batch, reads], the positions whose hidden states are wanted: `hidden` is [batch, reads, hidden]. Where
        layers are unrolled, the last one's work is done for them alone. Not with taps; but in a range of one layer with
        `replace`, whose positions then are those of `at`.
      spread: where arrays lie among devices.
    `init_cache(batch, slots, dtype)`: an empty cache.
    `apart(tree, axis=0)`: base weights or an adapter as a loop over calls wants them. `forward` takes them too.
    `rebuilt(unroll=, remat=, flash=)`: the same decoder with other choices of `unlearnjax.models.decoder.build`: layers
      unrolled for adapters that give them taken apart, or another way through the memory. `remat`, `flash`: its own.
    `abstract(dtype)`: the abstract parameter tree. `head(params)`: the output embedding, [vocab, hidden].
    """

    config: ModelConfig
    forward: Callable[..., Output]
    abstract: Callable[[Any], PyTree]
    head: Callable[[PyTree], Array]
    init_cache: Callable[[int, int, Any], Cache]
    apart: Callable[..., PyTree]
    rebuilt: Callable[..., "Model"]
    remat: Remat
    flash: bool
