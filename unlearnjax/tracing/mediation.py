"""Causal mediation of a fact (ROME, 2202.05262, section 2.1): every restoration of many facts in one program.

A corrupted run adds noise to the embeddings of a fact's subject. Each restoration runs it again with one activation of
the clean run put back, and asks how probable the answer has become. One forward pass each would repeat most of the
work; here

- what lies before the subject is run once: no noise reaches it, and restoring it changes nothing;
- a restoration at layer l enters at layer l with the corrupted run's hidden states, so that one pass over the layers
  carries a batch of restorations that grows on its way up;
- a restoration at position t runs from t on (in blocks of a few positions): before it are the corrupted run's keys;
- windows that begin at the same layer are one row until the first of them ends;
- only the last position meets the vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree
from unlearnjax_kernels.vocab_logsumexp import vocab_logsumexp

from unlearnjax.models.cache import Cache
from unlearnjax.models.protocol import Model, Taps

KINDS = ("hidden", "mlp", "attention")
BLOCK = 4  # positions that are restored side by side, and so run from the same one on


class Facts(NamedTuple):
    """Facts of like length, cut where their subjects begin.

    `before` is padded on the left and `rest` on the right. `noise` is added to the embeddings of `rest`: zero but at
    the subject's tokens, which come first.
    """

    before: Int[Array, "facts before"]
    before_length: Int[Array, " facts"]
    rest: Int[Array, "facts rest"]
    rest_length: Int[Array, " facts"]
    noise: Float[Array, "facts draws rest hidden"]


class Mediated(NamedTuple):
    """Probabilities (float32) of the token that the clean run finds most probable, over the draws of noise their mean.

    `restored[kind]` has an entry per position of `rest` and layer; beyond a fact's length they mean nothing. Restoring
    a position before the subject leaves `corrupted`.
    """

    answer: Int[Array, " facts"]
    clean: Float[Array, " facts"]
    corrupted: Float[Array, " facts"]
    restored: dict[str, Float[Array, "facts rest layers"]]


def window_of(layer: int, layers: int, window: int) -> tuple[int, int]:
    """The layers [first, stop) that are restored around one: half of the window below it, itself and the rest above.

    ROME's code, trace_with_patch's window: [layer - window // 2, layer + ceil(window / 2)), cut at both ends.
    """
    return max(0, layer - window // 2), min(layers, layer + (window + 1) // 2)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def mediate(model: Model, params: PyTree[Array], facts: Facts, kinds: tuple[str, ...], window: int) -> Mediated:
    """The clean and the corrupted run, and every restoration.

    Args:
      model: a decoder whose layers are unrolled. params: its weights, as `model.apart` gives them.
      kinds: `hidden` puts a layer's output back; `mlp` and `attention` what this sub-layer adds to the residual stream,
        in a window of layers.
      window: how many layers.
    """
    layers = model.config.layers
    sites = tuple(kind for kind in kinds if kind != "hidden")
    start = _before(model, params, facts)
    clean = _clean(model, params, facts, start, ("hidden", *sites))
    logits_at = functools.partial(_last, length=facts.rest_length)
    logits = _logits(model, params, logits_at(clean.hidden))
    answer = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    chance = jax.nn.softmax(logits, axis=-1)
    p_clean = jnp.take_along_axis(chance, answer[:, None], axis=1)[:, 0]

    draws = facts.noise.shape[1]
    wide = functools.partial(jnp.repeat, repeats=draws, axis=0)
    corrupted = model.forward(
        params, None, wide(facts.rest), positions=wide(_positions(facts)), cache=_wide(start, draws),
        taps=Taps(read=("hidden",), embed_add=_flat(facts.noise, 2)),
    )  # fmt: skip
    ask = functools.partial(_probability, model, params, facts, answer)
    p_corrupted = ask(_unflat(corrupted.hidden, facts.noise.shape[:2]), 0)
    assert corrupted.cache is not None

    restored = {}
    for kind in kinds:
        own = _Kind(kind, layers, window)
        run = functools.partial(_restore, model, params, facts, own, clean.taps, corrupted.taps, corrupted.cache)
        blocks = []
        for first in range(0, facts.rest.shape[1], BLOCK):
            hidden = run(first, min(BLOCK, facts.rest.shape[1] - first))
            blocks.append(ask(hidden, first))  # [facts, rows, positions]
        rows = jnp.swapaxes(jnp.concatenate(blocks, axis=2), 1, 2)
        scores = [rows[:, :, own.row_of[layer]] for layer in range(layers) if layer in own.row_of]
        if kind == "hidden":
            # Above the last layer nothing mixes positions: putting the last one back is the clean run.
            last = jnp.arange(facts.rest.shape[1])[None] == facts.rest_length[:, None] - 1
            scores.append(jnp.where(last, p_clean[:, None], p_corrupted[:, None]))
        restored[kind] = jnp.stack(scores, axis=-1)
    return Mediated(answer, p_clean, p_corrupted, restored)


@functools.partial(jax.jit, static_argnums=0)
def first_tokens(model: Model, params: PyTree[Array], facts: Facts) -> tuple[Array, Array]:
    """The most probable next token of each fact's prompt, and its probability: the clean run alone."""
    clean = _clean(model, params, facts, _before(model, params, facts), ())
    logits = _logits(model, params, _last(clean.hidden, facts.rest_length))
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)


class _Kind:
    """Which rows the pass up the layers carries: (first, stop) of the layers whose sub-layer is restored.

    For `hidden` a row is the layer it enters at, and nothing is restored after that.
    """

    def __init__(self, kind: str, layers: int, window: int) -> None:
        self.kind = kind
        if kind == "hidden":
            wanted = [(layer + 1, layer + 1) for layer in range(layers - 1)]
        else:
            wanted = [window_of(layer, layers, window) for layer in range(layers)]
        self.rows: list[tuple[int, int]] = []
        self.trunk: dict[int, tuple[int, int]] = {}  # by first layer: the longest, which the others leave on their way
        for first, stop in sorted(set(wanted)):
            self.trunk[first] = max(self.trunk.get(first, (first, stop)), (first, stop))
        for layer in range(layers):
            self.rows += self.entering(layer, set(wanted))
        self.row_of = {layer: self.rows.index(row) for layer, row in enumerate(wanted)}

    def entering(self, layer: int, wanted: set[tuple[int, int]]) -> list[tuple[int, int]]:
        """The rows that start at a layer: a trunk at its first one, others where their window has ended."""
        return sorted(row for row in wanted if (row[0] if row == self.trunk[row[0]] else row[1]) == layer)


def _restore(
    model: Model, params: PyTree[Array], facts: Facts, kind: _Kind, clean: dict[str, Array],
    corrupted: dict[str, Array], cache: Cache, first: int, count: int,
) -> Array:  # fmt: skip
    """Hidden states after the last layer, [facts, rows, positions restored, draws, rest - first, hidden]."""
    many, draws, length = facts.noise.shape[:3]
    seen = length - first
    own = jnp.arange(seen)[None] == jnp.arange(count)[:, None]  # [position restored, position]
    noisy = {layer: _unflat(x, (many, draws))[:, None, None, :, first:] for layer, x in enumerate(corrupted["hidden"])}
    state: Array | None = None
    rows: list[tuple[int, int]] = []
    everything = set(kind.rows)
    for layer in range(model.config.layers):
        new = kind.entering(layer, everything)
        if new and layer > 0:
            entering = []
            for row in new:
                if row != kind.trunk[row[0]]:
                    assert state is not None
                    entering.append(state[:, rows.index(kind.trunk[row[0]])][:, None])
                    continue
                x = jnp.broadcast_to(noisy[layer - 1], (many, 1, count, draws, *noisy[0].shape[-2:]))
                if kind.kind == "hidden":
                    value = clean["hidden"][layer - 1][:, None, None, None, first:]
                    x = jnp.where(own[None, None, :, None, :, None], value, x)
                entering.append(x)
            state = jnp.concatenate([*([] if state is None else [state]), *entering], axis=1)
        rows += new
        if not rows:
            continue
        shape = (many, len(rows), count, draws)
        replace = None
        active = jnp.asarray([row == kind.trunk[row[0]] and row[0] <= layer < row[1] for row in rows])
        if kind.kind != "hidden" and any(row == kind.trunk[row[0]] and row[0] <= layer < row[1] for row in rows):
            where = active[None, :, None, None, None] & own[None, None, :, None]
            value = clean[kind.kind][layer][:, None, None, None, first:]
            hidden = value.shape[-1]
            replace = {
                kind.kind: (
                    _flat(jnp.broadcast_to(where, (*shape, seen)), 4)[None],
                    _flat(jnp.broadcast_to(value, (*shape, seen, hidden)), 4)[None],
                )
            }
        spread = functools.partial(_spread, shape=shape)
        positions = spread((_positions(facts)[:, first:])[:, None, None, None])
        noise = None
        if layer == 0:
            entered = spread(facts.rest[:, None, None, None, first:])
            noise = spread(facts.noise[:, None, None, :, first:])
        else:
            assert state is not None
            entered = _flat(state, 4)
        at = None
        if layer == model.config.layers - 1 and replace is None:
            last = jnp.clip(facts.rest_length - 1 - first, 0, seen - 1)
            at = spread(last[:, None, None, None])[:, None]
        out = model.forward(
            params, None, entered, positions=positions, cache=_cut(cache, layer, shape, draws, length - first),
            taps=Taps(embed_add=noise, replace=replace), layers=(layer, layer + 1), at=at,
        )  # fmt: skip
        state = _unflat(out.hidden, shape)
    assert state is not None
    return state


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
    """[facts, 1 or rows, 1 or positions, 1 or draws, ...] to one batch."""
    return _flat(jnp.broadcast_to(x, (*shape, *x.shape[4:])), 4)


def _cut(cache: Cache, layer: int, shape: tuple[int, ...], draws: int, tail: int) -> Cache:
    """The corrupted run's cache without its last `tail` positions, one row per restoration; of one layer only."""

    def one(x: Array) -> Array:
        return _spread(_unflat(x, (shape[0], draws))[:, None, None], shape)

    slots = cache.slots
    written = jnp.where(jnp.arange(slots)[None] < slots - tail, cache.segments, 0)

    def parts(arrays: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(one(x) if i == layer else x for i, x in enumerate(arrays))

    return Cache(parts(cache.keys), parts(cache.values), one(written), jnp.asarray(slots - tail, jnp.int32))


def _before(model: Model, params: PyTree[Array], facts: Facts) -> Cache:
    """The cache after what comes before the subject, with room for the rest."""
    many, width = facts.before.shape
    dtype = model.head(params).dtype
    cache = model.init_cache(many, width + facts.rest.shape[1], dtype)
    if width == 0:
        return cache
    place = jnp.arange(width, dtype=jnp.int32)[None] - (width - facts.before_length[:, None])
    out = model.forward(
        params, None, facts.before, positions=jnp.maximum(place, 0), segments=(place >= 0).astype(jnp.int32),
        cache=cache,
    )  # fmt: skip
    assert out.cache is not None
    return out.cache


def _clean(model: Model, params: PyTree[Array], facts: Facts, start: Cache, read: Sequence[str]):  # type: ignore[no-untyped-def]
    return model.forward(
        params, None, facts.rest, positions=_positions(facts), cache=start, taps=Taps(read=tuple(read))
    )


def _positions(facts: Facts) -> Int[Array, "facts rest"]:
    return facts.before_length[:, None] + jnp.arange(facts.rest.shape[1], dtype=jnp.int32)[None]


def _wide(cache: Cache, draws: int) -> Cache:
    """Each row `draws` times."""
    many = functools.partial(jnp.repeat, repeats=draws, axis=0)
    keys, values = (tuple(map(many, x)) for x in (cache.keys, cache.values))
    return Cache(keys, values, many(cache.segments), cache.length)


def _flat(x: Array, axes: int) -> Array:
    return x.reshape(-1, *x.shape[axes:])


def _unflat(x: Array, shape: tuple[int, ...]) -> Array:
    return x.reshape(*shape, *x.shape[1:])


def _last(hidden: Float[Array, "facts length hidden"], length: Int[Array, " facts"]) -> Float[Array, "facts hidden"]:
    return jnp.take_along_axis(hidden, length[:, None, None] - 1, axis=1)[:, 0]


def _logits(model: Model, params: PyTree[Array], hidden: Float[Array, "facts hidden"]) -> Float[Array, "facts vocab"]:
    return jnp.einsum("fh,vh->fv", hidden, model.head(params), precision="highest").astype(jnp.float32)


def _probability(
    model: Model, params: PyTree[Array], facts: Facts, answer: Array, hidden: Array, first: int
) -> Float[Array, "facts *rows"]:
    """The answer's at the last position, its mean over draws; `hidden` is [facts, *rows, draws, rest - first, hidden],
    or has that position alone."""
    lead = hidden.ndim - 3
    if hidden.shape[-2] > 1:
        last = jnp.clip(facts.rest_length - 1 - first, 0, hidden.shape[-2] - 1)
        last = last.reshape(-1, *(1,) * (lead + 2))
        hidden = jnp.take_along_axis(hidden, last, axis=-2)
    at_last = hidden[..., 0, :]
    head = model.head(params)
    row = head[answer].reshape(-1, *(1,) * lead, head.shape[1])
    target = jnp.sum(at_last.astype(jnp.float32) * row.astype(jnp.float32), axis=-1)
    return jnp.mean(jnp.exp(target - vocab_logsumexp(at_last, head)), axis=-1)
