"""The k-th largest magnitude in XLA: a sample says where to look, passes that count close in on it.

Patterns of non-negative floats are ordered as the floats are, so the search is over integers. Its state is a bracket:
`count(pattern >= low) >= k > count(pattern >= high)`. Every pass counts how many magnitudes reach each of `PIVOTS`
patterns inside the bracket, and the bracket shrinks to two neighbouring ones. They are chosen so that it shrinks fast:

- first, around the quantile of a sample of at least 16384 entries, at distances of its standard error;
- then, if the entries in the bracket are spread evenly, the k-th is where interpolation says, up to another standard
  error: a bracket of n entries shrinks to about sqrt(n). Two pivots assume that.
- If many entries are equal, as the differences of bfloat16 weights are, it is not. The other two pivots are then the
  edges of the bin, of 4096 that cut the bracket, in which the sample has its quantile: twice, and they hold one value.
- On a CPU the sample of a small bracket is nearly all there is in it: then its quantile is taken for the k-th.
- Where a pass shrank the bracket little all the same, the next one cuts it evenly.

Three to seven passes do for millions of entries. Few entries need no sample: sixteen pivots that cut the bracket evenly
find the threshold in eight passes, by a program that compiles in a third of the time.

The sample only aims; what decides are exact counts. They add, so the
same passes serve one array, a tree of arrays, the chunks of a stream and the shards of a mesh (psum). Nothing is
sorted, copied or rounded.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from unlearnjax_kernels.threshold.limbs import at_least, carry, sign, to_float, to_limbs

MAX_LEAF = 2**31 - 1  # entries per candidate that one int32 count can hold
PIVOTS = 4
NOTHING = 0x7FFFFFFF  # above the pattern of every number
_FIRST = np.array([[-3.0, -0.6, 0.6, 3.0]], np.float32)  # in standard errors
_LATER = np.array([[-2.5, -0.8, 0.8, 2.5]], np.float32)
_SMALL = 1 << 14  # entries in all, below which there is no sample and there are ...
_MANY_PIVOTS = 16  # ... so many pivots
_BINS = 4096
_SAMPLE = 16384  # entries, at least
_SEEN = 8  # of them in the bracket, from which its bins mean something
_MANY = 0.2  # of those, in one bin of 4096: entries that are equal
_FEW = 64  # entries in a bracket, which the sample need not see
_ROWS = 16  # rows whose hits are added up in one byte per pivot, vectorised, before they are summed
_BLOCKED = 1 << 16  # entries from which that pays
_FOLDS = 8  # of the rows' largest entries, one is looked at ...
_FOLDED = 1 << 17  # ... where there are more of them than this

Hits = Callable[[Float[Array, "N ..."], UInt32[Array, "N P"]], Int32[Array, "N P"]]


class Search(NamedTuple):
    """Where the search for the k-th largest stands, for N candidates."""

    low: UInt32[Array, "N"]
    """At least k entries reach it: once done, the threshold."""
    high: UInt32[Array, "N"]
    """Fewer than k entries reach it."""
    at_low: Int32[Array, "N 2"]
    """How many reach `low`, in limbs."""
    at_high: Int32[Array, "N 2"]
    pivots: UInt32[Array, "N P"]
    """What the next pass compares with. Their number says, at compile time, whether a sample aims them."""
    evenly: Bool[Array, "N"]
    """Whether they are to cut the bracket evenly."""


class Sample(NamedTuple):
    """What a sample of the entries says of the bracket; adds over leaves, chunks and shards."""

    histogram: Float32[Array, "N bins"]
    """About how many entries there are in each of its bins."""
    seen: Float32[Array, "N"]
    """How many of the sampled entries lie in it."""
    spread: Float32[Array, ""]
    """The sum of stride * size: what the variance of a share is in proportion to."""


def magnitude_bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """The float32 bit pattern of |x|. Compared as integers, denormals stay distinct even where floats flush them."""
    if x.dtype == jnp.bfloat16:  # its pattern is the upper half: integer operations, which vectorise
        half = jax.lax.bitcast_convert_type(x, jnp.uint16) & jnp.uint16(0x7FFF)
        return half.astype(jnp.uint32) << jnp.uint32(16)
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) & jnp.uint32(0x7FFFFFFF)


def search(candidates: int, size: int) -> Search:
    """The search before its first pass: N candidates of `size` entries each."""
    # In numpy: constants, for which no program is run.
    low = np.zeros(candidates, np.uint32)
    total = np.tile(to_limbs(size), (candidates, 1))
    pivots = np.zeros((candidates, PIVOTS if size >= _SMALL else _MANY_PIVOTS), np.uint32)
    constants = (low, low + np.uint32(NOTHING + 1), total, np.zeros_like(total), pivots, np.zeros(candidates, bool))
    return Search(*constants)  # type: ignore[arg-type]


def _shift(state: Search) -> UInt32[Array, "N"]:
    """A bin of the bracket is 2**shift patterns wide."""
    width = jnp.maximum(state.high - state.low, jnp.uint32(1)) - jnp.uint32(1)
    return jnp.maximum(jnp.uint32(32) - jax.lax.clz(width), jnp.uint32(12)) - jnp.uint32(12)


def sample(x: Float[Array, "N ..."], state: Search) -> Sample:
    """One leaf's sample of the bracket."""
    if state.pivots.shape[1] != PIVOTS:
        nothing = jnp.zeros(x.shape[0], jnp.float32)
        return Sample(jnp.zeros((x.shape[0], 0), jnp.float32), nothing, jnp.float32(0))
    size = x.size // max(x.shape[0], 1)
    if size < _BLOCKED or jax.device_count() != 1:
        return _strided(x, state)
    rows = x if isinstance(x, jax.Array) else [x[i] for i in range(x.shape[0])]

    def on_cpu(rows: Any, state: Search) -> Sample:
        whole = jnp.any(state.high - state.low > jnp.uint32(NOTHING))
        return jax.lax.cond(whole, lambda: _strided(x, state), lambda: _gathered(rows, state))

    return jax.lax.platform_dependent(rows, state, cpu=on_cpu, default=lambda rows, state: _strided(x, state))


def _gathered(x: Any, state: Search) -> Sample:
    """For a CPU, once the bracket is small: nearly all of its entries where they are few, a good many where they are
    not, which is worth half a pass. Of the entries that share a place in `_ROWS` rows the largest in the bracket is
    taken, elementwise; then, of a large tensor, the largest of `_FOLDS` of those, if hardly any can meet there, or else
    the first of them."""
    shift = _shift(state)
    entries = to_float(state.at_low - state.at_high)

    width = x[0].size // _ROWS
    folds = _FOLDS if width >= _FOLDED else 1
    few = entries * 16 <= width // folds

    def largest(row: Float[Array, "..."], low: UInt32[Array, ""], high: UInt32[Array, ""]) -> Int32[Array, "W"]:
        """Distances from the bracket's lower end, -1 where there is no entry."""
        flat = row.reshape(-1)
        first, last = (jax.lax.bitcast_convert_type(x, jnp.int32) for x in (low, high - jnp.uint32(1)))
        found = jnp.full(width, -1, jnp.int32)
        for start in range(0, _ROWS * width, width):
            part = jax.lax.slice(flat, (start,), (start + width,))
            bits = jax.lax.bitcast_convert_type(magnitude_bits(part), jnp.int32)
            found = jnp.maximum(found, jnp.where((bits >= first) & (bits <= last), bits - first, jnp.int32(-1)))
        return found

    def folded(found: Int32[Array, "W"], few: Bool[Array, ""]) -> Int32[Array, "M"]:
        part = found.size // folds
        parts = [jax.lax.slice(found, (i * part,), (i * part + part,)) for i in range(folds)]
        return jnp.where(few, functools.reduce(jnp.maximum, parts), parts[0])

    def histogram(
        found: Int32[Array, "M"], shift: UInt32[Array, ""], few: Bool[Array, ""]
    ) -> tuple[Float32[Array, "bins"], Float32[Array, ""]]:
        bins = jnp.where(found < 0, jnp.int32(_BINS), found >> shift.astype(jnp.int32))
        weight = jnp.where(few, jnp.float32(1), jnp.float32(folds))
        counts = jnp.zeros(_BINS, jnp.float32).at[bins].add(weight, mode="drop")
        return counts, jnp.sum(found >= 0, dtype=jnp.float32)

    if isinstance(x, list):
        found = jnp.stack([largest(row, state.low[i], state.high[i]) for i, row in enumerate(x)])
    else:
        found = jax.lax.map(lambda item: largest(*item), (x, state.low, state.high))
    # Loops of their own: fused with what follows, all that leads to an entry would be computed once for each use.
    if folds > 1:
        found = jax.lax.map(lambda item: folded(*item), (found, few))
    histograms, seen = jax.lax.map(lambda item: histogram(*item), (found, shift, few))
    return Sample(histograms, seen, jnp.float32(0))


def _strided(x: Float[Array, "N ..."], state: Search) -> Sample:
    """With a stride along each axis: no reshape, which would undo a sharding."""
    size = x.size // max(x.shape[0], 1)
    strides, wanted = [], max(size // _SAMPLE, 1)
    for place, dim in enumerate(x.shape[1:]):
        strides.append(max(min(round(wanted ** (1 / (len(x.shape) - 1 - place))), dim), 1))
        wanted = max(wanted // strides[-1], 1)
    places = tuple(slice(None, None, stride) for stride in strides)
    shift = _shift(state)

    parts = jnp.stack([magnitude_bits(x[i][places]).reshape(-1) for i in range(x.shape[0])])
    low, high = state.low[:, None], state.high[:, None]
    inside = (parts >= low) & (parts < high)
    bins = jnp.where(inside, (parts - low) >> shift[:, None], jnp.uint32(_BINS)).astype(jnp.int32)
    weight = jnp.float32(size / max(parts.shape[1], 1))
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    histograms = jnp.zeros((x.shape[0], _BINS), jnp.float32).at[rows, bins].add(weight, mode="drop")
    seen = jnp.sum(inside, axis=1, dtype=jnp.float32)
    return Sample(histograms, seen, jnp.float32(math.prod(strides) * size))


def aim(state: Search, found: Sample, k: Int32[Array, "N 2"]) -> Search:
    """The search with the pivots of its next pass, given the sample summed over everything and k in limbs."""
    # k = 0 keeps nothing: there is nothing to search.
    low = jnp.where(sign(k) <= 0, jnp.uint32(NOTHING), state.low)
    state = state._replace(low=low)
    evenly = _at(state, np.arange(1, 1 + state.pivots.shape[1], dtype=np.float32)[None] / (1 + state.pivots.shape[1]))
    pivots = evenly if state.pivots.shape[1] != PIVOTS else _aimed(state, found, k, evenly)
    last = jnp.maximum(state.high, jnp.uint32(1)) - jnp.uint32(1)
    return state._replace(pivots=jnp.clip(pivots, jnp.minimum(low + jnp.uint32(1), last)[:, None], last[:, None]))


def _aimed(state: Search, found: Sample, k: Int32[Array, "N 2"], evenly: UInt32[Array, "N P"]) -> UInt32[Array, "N P"]:
    """The pivots that the sample suggests."""
    entries = jnp.maximum(to_float(state.at_low - state.at_high), 1)[:, None]
    wanted = to_float(k - state.at_high)[:, None]
    share = jnp.clip(wanted / entries, 0.0, 1.0)
    variance = jnp.maximum(share * (1 - share), 1 / entries) / entries
    # Entries in this bin and above. Ranks count from the largest, so zeros that fill up a piece do not matter.
    reach = jnp.cumsum(found.histogram[:, ::-1], axis=1)[:, ::-1]
    missing = jnp.maximum(entries - reach[:, :1], 0) + 1
    ranks = jnp.concatenate(
        [wanted - _FIRST * jnp.sqrt(variance * entries * found.spread), wanted, wanted + missing, wanted - missing],
        axis=1,
    )
    ranks = jnp.clip(ranks, 0.5, entries - 0.5)
    place = jnp.clip(jnp.sum(reach[:, None, :] >= ranks[:, :, None], axis=-1, dtype=jnp.int32) - 1, 0, _BINS - 1)
    held, at = (jnp.take_along_axis(x, place, axis=1) for x in (found.histogram, reach))
    step = (jnp.uint32(1) << _shift(state))[:, None]
    edges = state.low[:, None] + place.astype(jnp.uint32) * step
    inside = jnp.clip((at - ranks) / jnp.maximum(held, jnp.float32(1e-6)), 0.0, 0.999) * step.astype(jnp.float32)

    first = (edges + inside.astype(jnp.uint32))[:, :PIVOTS]
    quantile, above, below = (edges[:, i : i + 1] for i in (PIVOTS, PIVOTS + 1, PIVOTS + 2))
    around = _at(state, 1 - share + _LATER * jnp.sqrt(variance))
    equal = (found.seen >= _SEEN)[:, None] & (held[:, PIVOTS : PIVOTS + 1] >= _MANY * reach[:, :1])
    outer = jnp.where(equal, jnp.concatenate([quantile, quantile + step], axis=1), around[:, ::3])
    later = jnp.concatenate([outer, around[:, 1:3]], axis=1)
    # The sample is nearly all there is: the quantile's bin, and what the missing ones may move it by.
    nearly = jnp.concatenate([above, quantile, quantile + step, below + step], axis=1)
    later = jnp.where((found.seen[:, None] * 1.25) >= entries, nearly, later)

    whole = (state.high - state.low > jnp.uint32(NOTHING))[:, None]
    return jnp.where(whole, first, jnp.where(state.evenly[:, None], evenly, later))


def _at(state: Search, places: Float32[Array, "_ P"] | np.ndarray) -> UInt32[Array, "N P"]:
    """The patterns at these shares of the bracket's width."""
    width = (state.high - state.low)[:, None].astype(jnp.float32)
    return state.low[:, None] + (jnp.clip(places, 0.0, 1.0) * width).astype(jnp.uint32)


def count(x: Float[Array, "N ..."], state: Search) -> Int32[Array, "N P 2"]:
    """One pass over one leaf: per candidate, how many magnitudes reach each pivot.

    Raises:
        ValueError: the leaf holds 2**31 entries or more per candidate.
    """
    return to_limbs(hits(x, state.pivots))


def hits(x: Float[Array, "N ..."], pivots: UInt32[Array, "N P"]) -> Int32[Array, "N P"]:
    """See `api.hits`."""
    size = x.size // max(x.shape[0], 1)
    if size > MAX_LEAF:
        raise ValueError(f"a leaf of shape {x.shape} has 2**31 entries or more per candidate; split it along an axis")
    if (
        size >= _BLOCKED and pivots.shape[1] == PIVOTS and jax.device_count() == 1
    ):  # it reshapes, which would gather an array that is sharded
        rows = x if isinstance(x, jax.Array) else [x[i] for i in range(x.shape[0])]
        return jax.lax.platform_dependent(rows, pivots, cpu=_blocked, default=_plain)
    return _plain(x, pivots)


def _plain(x: Any, pivots: UInt32[Array, "N P"]) -> Int32[Array, "N P"]:
    """Unrolled over candidates and pivots: sums that share their input, which XLA fuses."""
    bits = [magnitude_bits(x[i]) for i in range(pivots.shape[0])]
    if pivots.shape[1] > PIVOTS:  # few entries
        reach = jax.vmap(lambda bits, pivot: jnp.sum(bits >= pivot, dtype=jnp.int32), in_axes=(None, 0))
        return jnp.stack([reach(b, p) for b, p in zip(bits, pivots, strict=True)])
    counts = [[jnp.sum(b >= p, dtype=jnp.int32) for p in row] for b, row in zip(bits, pivots, strict=True)]
    return jnp.stack([jnp.stack(row) for row in counts])


def _blocked(x: Any, pivots: UInt32[Array, "N P"]) -> Int32[Array, "N P"]:
    """For a CPU, where LLVM vectorises elementwise loops but not counting reductions: rows are compared with all pivots
    and added up in the four bytes of an int32, elementwise; then the bytes are summed. Twice as fast as `_plain` is
    with a single pivot."""

    def one(row: Float[Array, "..."], pivots: UInt32[Array, "P"]) -> Int32[Array, "P"]:
        flat = row.reshape(-1)
        width = flat.size // _ROWS
        # Signed, as AVX2 compares; patterns are below 2**31.
        limits = jax.lax.bitcast_convert_type(pivots, jnp.int32)
        hits = jnp.zeros(width, jnp.int32)
        for start in range(0, _ROWS * width, width):
            part = jax.lax.slice(flat, (start,), (start + width,))
            bits = jax.lax.bitcast_convert_type(magnitude_bits(part), jnp.int32)
            for j in range(PIVOTS):
                hits = hits + jnp.where(bits >= limits[j], jnp.int32(1 << 8 * j), jnp.int32(0))
        # Without the barrier both steps become one reduction, which is not vectorised.
        parts = jax.lax.bitcast_convert_type(jax.lax.optimization_barrier(hits), jnp.uint8)
        rest = magnitude_bits(flat[_ROWS * width :])[:, None] >= pivots[None]
        return jnp.sum(parts, axis=0, dtype=jnp.int32) + jnp.sum(rest, axis=0, dtype=jnp.int32)

    if isinstance(x, list):
        return jnp.stack([one(row, pivots[i]) for i, row in enumerate(x)])
    return jax.lax.map(lambda pair: one(*pair), (x, pivots))  # one copy of the program, as fast


def narrow(state: Search, counts: Int32[Array, "N P 2"], k: Int32[Array, "N 2"]) -> Search:
    """The search after one pass, given the counts summed over everything and k in limbs."""
    counts = carry(counts)
    reach = at_least(counts, k[:, None])
    # The bracket's own ends compete with the pivots: one may lie outside.
    lows = jnp.concatenate([state.low[:, None], jnp.where(reach, state.pivots, jnp.uint32(0))], axis=1)
    highs = jnp.concatenate([state.high[:, None], jnp.where(reach, jnp.uint32(NOTHING + 1), state.pivots)], axis=1)
    low, at_low = _pick(jnp.argmax(lows, axis=1), lows, state.at_low, counts)
    high, at_high = _pick(jnp.argmin(highs, axis=1), highs, state.at_high, counts)
    entries = to_float(at_low - at_high)
    slow = entries * 4 > to_float(state.at_low - state.at_high)
    narrower = (state.high - state.low) >> jnp.uint32(4) > high - low
    # A few equal entries that the sample does not see can only be found by halving, so to speak.
    evenly = slow & ~narrower & (~state.evenly | (entries <= _FEW))
    finished = done(state, k)
    low, at_low = jnp.where(finished, state.low, low), jnp.where(finished[:, None], state.at_low, at_low)
    return state._replace(low=low, high=high, at_low=at_low, at_high=at_high, evenly=evenly)


def _pick(
    place: Int32[Array, "N"], patterns: UInt32[Array, "N Q"], own: Int32[Array, "N 2"], counts: Int32[Array, "N P 2"]
) -> tuple[UInt32[Array, "N"], Int32[Array, "N 2"]]:
    counts = jnp.concatenate([own[:, None], counts], axis=1)
    chosen = jnp.take_along_axis(patterns, place[:, None], axis=1)[:, 0]
    return chosen, jnp.take_along_axis(counts, place[:, None, None], axis=1)[:, 0]


def done(state: Search, k: Int32[Array, "N 2"]) -> Bool[Array, "N"]:
    """Whether `low` keeps what the k-th largest magnitude itself would keep."""
    return (sign(state.at_low - k) <= 0) | (state.high - state.low <= jnp.uint32(1))


def kth_magnitude(
    leaves: Sequence[Float[Array, "N ..."]], k: int | Int32[Array, "..."], hits: Hits = hits
) -> UInt32[Array, "N"]:
    """All passes at once over a list of leaves; see `reference.kth_magnitude`. `k`: int, traced int32, or limbs [2]."""
    return _all_passes(list(leaves), k if not isinstance(k, int) and k.ndim == 1 else to_limbs(k), hits)


@functools.partial(jax.jit, static_argnums=2)
def _all_passes(leaves: list[Float[Array, "N ..."]], k: Int32[Array, "2"], hits: Hits) -> UInt32[Array, "N"]:
    candidates = leaves[0].shape[0]
    keep = jnp.broadcast_to(k, (candidates, 2))
    size = sum(leaf.size // max(candidates, 1) for leaf in leaves)
    add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731

    def over(statistic: Callable[[Array], Any]) -> Any:
        total = statistic(leaves[0])
        for leaf in leaves[1:]:
            total = add(total, statistic(leaf))
        return total

    def one_pass(state: Search) -> Search:
        state = aim(state, over(lambda leaf: sample(leaf, state)), keep)
        return narrow(state, over(lambda leaf: to_limbs(hits(leaf, state.pivots))), keep)

    state = jax.lax.while_loop(lambda state: ~jnp.all(done(state, keep)), one_pass, search(candidates, size))
    # The search stops as soon as its threshold keeps the right entries: the smallest of them is the k-th.
    smallest = [jnp.stack([_smallest(leaf[i], state.low[i]) for leaf in leaves]).min() for i in range(candidates)]
    return jnp.where(at_least(to_limbs(size)[None], keep), jnp.stack(smallest), jnp.uint32(0))


def _smallest(x: Float[Array, "..."], low: UInt32[Array, ""]) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(magnitude_bits(x), jnp.int32)  # signed minima vectorise
    reaching = jnp.where(bits >= jax.lax.bitcast_convert_type(low, jnp.int32), bits, jnp.int32(NOTHING))
    return jax.lax.bitcast_convert_type(jnp.min(reaching, initial=jnp.int32(NOTHING)), jnp.uint32)
