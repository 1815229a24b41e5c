"""Causal mediation of a fact (ROME, 2202.05262, section 2.1): every restoration of many facts in one program.

A corrupted run adds noise to the embeddings of a fact's subject. Each restoration runs it again with one activation of
the clean run put back, and asks how probable the answer has become. One forward pass each would repeat most of the
work; here

- what lies before the subject is run once: no noise reaches it, and restoring it changes nothing;
- a restoration enters at its lowest layer, with the corrupted run's hidden states;
- the windows of layers that begin at the first one share what they have in common: each leaves the next one's run;
- a restoration at position t runs from t on (in blocks of a few positions): before it are the corrupted run's keys;
- the last layer and the vocabulary are asked at the last position only.

The restorations of a block run one layer and kind after another, each over all facts, draws and positions of the block.
The program holds one layer's code per block, whatever the model's depth: a pass that carries all restorations up the
layers together does the same work, and took minutes to compile. Prompts end together, so that the rows of a block are
as long as what they have to run: the blocks are those of the distance to the end, narrow where it is short.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
from unlearnjax_kernels.vocab_logsumexp import vocab_logsumexp

from unlearnjax.models.cache import Cache
from unlearnjax.models.config import ModelConfig, replace
from unlearnjax.models.decoder import build, embedded, final_norm, head
from unlearnjax.models.protocol import Output, Taps

KINDS = ("hidden", "mlp", "attention")


class Facts(NamedTuple):
    """Prompts of like length, padded on the left, and cut where no subject has begun yet.

    `length` is that of a whole prompt; `rest` may begin with padding too. `noise` is added to the embeddings of `rest`:
    zero but at the subject's tokens.
    """

    before: Int[Array, "facts before"]
    rest: Int[Array, "facts rest"]
    length: Int[Array, " facts"]
    noise: Float[Array, "facts draws rest hidden"]


class Mediated(NamedTuple):
    """Probabilities (float32) of the token that the clean run finds most probable, over the draws of noise their mean.

    `restored[kind]` has an entry per position of `rest` and layer; those of padding mean nothing. Restoring a position
    before the subject leaves `corrupted`.
    """

    answer: Int[Array, " facts"]
    clean: Float[Array, " facts"]
    corrupted: Float[Array, " facts"]
    restored: dict[str, Float[Array, "facts rest layers"]]


def blocks(rest: int) -> list[tuple[int, int]]:
    """(first position, how many) of those restored side by side, which all run from the first of them to the end.

    How many grows with their distance to the end: a tenth to a fifth of the work is for positions before a restored
    one, and a long prompt does not have many more blocks than a short one.
    """
    found, done = [], 0
    while done < rest:
        many = min(max(2, (1 << done.bit_length()) // 4), rest - done)
        done += many
        found.append((rest - done, many))
    return found


def window_of(layer: int, layers: int, window: int) -> tuple[int, int]:
    """The layers [first, stop) that are restored around one: half of the window below it, itself and the rest above.

    ROME's code, trace_with_patch's window: [layer - window // 2, layer + ceil(window / 2)), cut at both ends.
    """
    return max(0, layer - window // 2), min(layers, layer + (window + 1) // 2)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def mediate(config: ModelConfig, params: PyTree[Array], facts: Facts, kinds: tuple[str, ...], window: int) -> Mediated:
    """The clean and the corrupted run, and every restoration.

    Args:
      params: the decoder's weights, layers stacked.
      kinds: `hidden` puts a layer's output back; `mlp` and `attention` what this sub-layer adds to the residual stream,
        in a window of layers.
      window: how many layers.
    """
    start = _before(config, params, facts)
    clean = _clean(config, params, facts, start, KINDS)
    logits = _logits(params, clean.hidden[:, -1])
    answer = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    p_clean = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), answer[:, None], axis=1)[:, 0]

    draws, length = facts.noise.shape[1:3]
    wide = functools.partial(jnp.repeat, repeats=draws, axis=0)
    noise = _flat(facts.noise, 2)
    positions, segments = _places(facts)
    corrupted = build(config, unroll=False).forward(
        params, None, wide(facts.rest), positions=wide(positions), segments=wide(segments),
        cache=jax.tree.map(_repeated(draws), start), taps=Taps(read=("hidden",), embed_add=noise),
    )  # fmt: skip
    assert corrupted.cache is not None
    entered = embedded(config, params, wide(facts.rest))
    entering = jnp.concatenate([(entered + noise.astype(entered.dtype))[None], corrupted.taps["hidden"][:-1]])
    p_corrupted = _probability(params, answer, _unflat(corrupted.hidden[:, -1], facts.noise.shape[:2]))

    plan = _plan(kinds, config.layers, window)
    entering = entering.reshape(config.layers, -1, draws, *entering.shape[2:])
    runs = _Runs(config, params, facts, answer, clean.taps, entering, corrupted.cache)
    parts = [runs.block(plan, first, many) for first, many in reversed(blocks(length))]
    found = jnp.concatenate(parts, axis=2)  # [restored layer of a kind, facts, positions]
    restored, begin = {}, 0
    for kind in kinds:
        count = config.layers - (kind == "hidden")
        own = jnp.moveaxis(found[begin : begin + count], 0, -1)
        begin += count
        if kind == "hidden":
            # Above the last layer nothing mixes positions: putting the last one back is the clean run.
            last = jnp.arange(length) == length - 1
            own = jnp.concatenate([own, jnp.where(last, p_clean[:, None], p_corrupted[:, None])[..., None]], axis=-1)
        restored[kind] = own
    return Mediated(answer, p_clean, p_corrupted, restored)


@functools.partial(jax.jit, static_argnums=0)
def first_tokens(config: ModelConfig, params: PyTree[Array], facts: Facts) -> tuple[Array, Array]:
    """The most probable next token of each fact's prompt, and its probability: the clean run alone."""
    clean = _clean(config, params, facts, _before(config, params, facts), ())
    logits = _logits(params, clean.hidden[:, -1])
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.max(jax.nn.softmax(logits, axis=-1), axis=-1)


class _Plan(NamedTuple):
    """Restorations of a position, one per entry: the layer they enter at, and the layers [low, high) at which the
    sub-layer `site` (of KINDS) is put back; for `hidden` the state that enters is put back and nothing after it.

    `shared`: the state that enters is the one kept by the entry before. `keep`: the layer whose entering state is kept
    for the next entry, or -1.
    """

    enter: Int[Array, " n"]
    low: Int[Array, " n"]
    high: Int[Array, " n"]
    site: Int[Array, " n"]
    shared: Int[Array, " n"]
    keep: Int[Array, " n"]


def _plan(kinds: tuple[str, ...], layers: int, window: int) -> _Plan:
    """In the order of the kinds, and of layers in each; the last layer's output is not among them."""
    rows = []
    for kind in kinds:
        site = KINDS.index(kind)
        if kind == "hidden":
            rows += [(layer + 1, 0, 0, site, 0, -1) for layer in range(layers - 1)]
            continue
        kept = -1
        for layer in range(layers):
            low, high = window_of(layer, layers, window)
            before, kept = kept, min(high, layers - 1) if low == 0 else -1
            shared = low == 0 and before >= 0
            rows.append((before if shared else low, low, high, site, int(shared), kept))
    return _Plan(*jnp.asarray(rows, jnp.int32).reshape(-1, 6).T)


class _Runs(NamedTuple):
    """What all restorations share: `clean[site]` is [layers, facts, rest, hidden], `entering` what enters each layer in
    the corrupted run, [layers, facts, draws, rest, hidden], and `cache` that run's."""

    config: ModelConfig
    params: PyTree[Array]
    facts: Facts
    answer: Int[Array, " facts"]
    clean: dict[str, Float[Array, "layers facts rest hidden"]]
    entering: Float[Array, "layers facts draws rest hidden"]
    cache: Cache

    def block(self, plan: _Plan, first: int, count: int) -> Float[Array, "n facts positions"]:
        """The answer's probabilities with each of `count` positions from `first` on restored."""
        if plan.enter.shape[0] == 0:
            return jnp.zeros((0, self.facts.rest.shape[0], count), jnp.float32)
        length, last = self.facts.rest.shape[1], self.config.layers - 1
        own = jnp.arange(length - first)[None] == jnp.arange(count)[:, None]  # [position restored, position]

        def one(kept: Array, row: _Plan) -> tuple[Array, Array]:
            x = _layer_of(self.entering, row.enter)[:, None, :, first:]  # [facts, positions, draws, rest, hidden]
            put = _layer_of(self.clean["hidden"], jnp.maximum(row.enter - 1, 0))[:, None, None, first:]
            x = jnp.where(own[None, :, None, :, None] & (row.site == 0), put, x)
            x = jnp.where(row.shared == 1, kept, x)

            def up(layer: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
                x, kept = carry
                return self._run(layer, x, row, own, first, last=False), jnp.where(layer == row.keep, x, kept)

            x, kept = jax.lax.fori_loop(row.enter, last, up, (x, kept))
            kept = jnp.where(row.keep == last, x, kept)
            x = self._run(jnp.asarray(last), x, row, own, first, last=True)[..., 0, :]
            return kept, _probability(self.params, self.answer, final_norm(self.config, self.params, x))

        many, draws = self.entering.shape[1:3]
        nothing = jnp.zeros((many, count, draws, length - first, self.entering.shape[-1]), self.entering.dtype)
        return jax.lax.scan(one, nothing, plan)[1]

    def _run(
        self, layer: Array, x: Float[Array, "facts positions draws rest hidden"], row: _Plan,
        own: Bool[Array, "positions rest"], first: int, *, last: bool,
    ) -> Array:  # fmt: skip
        """One layer; the last one's output at the last position only."""
        shape = x.shape[:3]
        spread = functools.partial(_spread, shape=shape)
        end = x.shape[3] - 1
        place = slice(end, None) if last else slice(None)
        inside = (row.low <= layer) & (layer < row.high)
        taps = {}
        for site in ("mlp", "attention"):
            value = _layer_of(self.clean[site], layer)[:, first:][:, place]
            active = inside & (row.site == KINDS.index(site))
            taps[site] = (spread((own[:, place] & active)[None, :, None])[None], spread(value[:, None, None])[None])
        cache = self._cut(layer, shape, first)
        weights = jax.tree.map(lambda leaf: _layer_of(leaf, layer), self.params["layers"])
        positions, segments = (spread(part[:, None, None, first:]) for part in _places(self.facts))

        def run(slides: bool) -> Array:
            # A model of three layers, whose middle one is run with this layer's weights: no embedding and no norm.
            middle = replace(self.config, layers=3, sliding=(slides,) * 3 if self.config.sliding else ())
            return build(middle, unroll=True).forward(
                {"layers": (None, weights, None)}, None, _flat(x, 3), cache=cache, taps=Taps(replace=taps),
                positions=positions, segments=segments, layers=(1, 2),
                at=jnp.full((math.prod(shape), 1), end, jnp.int32) if last else None,
            ).hidden  # fmt: skip

        kinds = set(self.config.sliding) or {False}
        if len(kinds) == 1:
            out = run(kinds.pop())
        else:
            out = jax.lax.cond(jnp.asarray(self.config.sliding)[layer], lambda: run(True), lambda: run(False))
        return _unflat(out, shape)

    def _cut(self, layer: Array, shape: tuple[int, ...], first: int) -> Cache:
        """A layer of the corrupted run's cache up to position `first`, one row per restoration."""
        draws, slots = shape[2], self.cache.slots
        begin = slots - self.facts.rest.shape[1] + first

        def one(x: Array) -> Array:
            return _spread(_unflat(x, (shape[0], draws))[:, None], shape)

        written = jnp.where(jnp.arange(slots)[None] < begin, self.cache.segments, 0)
        keys, values = (one(_layer_of(x[0], layer)) for x in (self.cache.keys, self.cache.values))
        return Cache((None, keys, None), (None, values, None), one(written), jnp.asarray(begin, jnp.int32))  # type: ignore[arg-type]


def _layer_of(x: Array, layer: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
    """[facts, 1 or positions, 1 or draws, ...] to one batch."""
    return _flat(jnp.broadcast_to(x, (*shape, *x.shape[3:])), 3)


def _before(config: ModelConfig, params: PyTree[Array], facts: Facts) -> Cache:
    """The cache after what comes before the subject, with room for the rest."""
    many, width = facts.before.shape
    model = build(config, unroll=False)
    cache = model.init_cache(many, width + facts.rest.shape[1], head(params).dtype)
    if width == 0:
        return cache
    positions, segments = _places(facts, before=True)
    out = model.forward(params, None, facts.before, positions=positions, segments=segments, cache=cache)
    assert out.cache is not None
    return out.cache


def _clean(config: ModelConfig, params: PyTree[Array], facts: Facts, start: Cache, read: tuple[str, ...]) -> Output:
    positions, segments = _places(facts)
    return build(config, unroll=False).forward(
        params, None, facts.rest, positions=positions, segments=segments, cache=start, taps=Taps(read=read)
    )


def _repeated(draws: int):  # type: ignore[no-untyped-def]
    """Each row of a scanned cache's arrays `draws` times."""

    def one(x: Array) -> Array:
        return jnp.repeat(x, draws, axis=1 if x.ndim > 2 else 0) if x.ndim else x

    return one


def _places(facts: Facts, *, before: bool = False) -> tuple[Int[Array, "facts part"], Int[Array, "facts part"]]:
    """Positions and segments of `rest`, or of what comes before it."""
    width, rest = facts.before.shape[1], facts.rest.shape[1]
    slots = jnp.arange(width, dtype=jnp.int32) if before else width + jnp.arange(rest, dtype=jnp.int32)
    place = slots[None] - (width + rest - facts.length[:, None])
    return jnp.maximum(place, 0), (place >= 0).astype(jnp.int32)


def _flat(x: Array, axes: int) -> Array:
    return x.reshape(-1, *x.shape[axes:])


def _unflat(x: Array, shape: tuple[int, ...]) -> Array:
    return x.reshape(*shape, *x.shape[1:])


def _logits(params: PyTree[Array], hidden: Float[Array, "facts hidden"]) -> Float[Array, "facts vocab"]:
    return jnp.einsum("fh,vh->fv", hidden, head(params), precision="highest", preferred_element_type=jnp.float32)


def _probability(
    params: PyTree[Array], answer: Int[Array, " facts"], hidden: Float[Array, "facts *more draws hidden"]
) -> Float[Array, "facts *more"]:
    """The answer's, its mean over draws, where `hidden` are the final states at the last position."""
    weights = head(params)
    row = weights[answer].reshape(-1, *(1,) * (hidden.ndim - 2), weights.shape[1])
    target = jnp.sum(hidden.astype(jnp.float32) * row.astype(jnp.float32), axis=-1)
    return jnp.mean(jnp.exp(target - vocab_logsumexp(hidden, weights)), axis=-1)
