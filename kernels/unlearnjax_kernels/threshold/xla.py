"""The k-th largest magnitude in XLA: a sample says where to look, passes that count close in on it.

Patterns of non-negative floats are ordered as the floats are, so the search is over integers. Its state is a bracket:
`count(pattern >= low) >= k > count(pattern >= high)`. A first, cheap pass takes a histogram of a sample and aims
`PIVOTS` patterns around the place of the k-th; every pass after it counts how many magnitudes reach each pivot, and the
bracket shrinks to two neighbouring pivots. Inside it the entries are taken to be spread evenly, so the next pivots sit
around the interpolated place at distances of the standard error: a bracket of n entries shrinks to about sqrt(n). Four
passes do for millions of entries. Where they lie otherwise (ties, mostly) and a pass shrank the bracket to no less than
a quarter, the next one cuts it evenly, so there are never more than a few dozen.

The sample only aims; what decides are exact counts. They add, so the same passes serve one array, a tree of arrays, the
chunks of a stream and the shards of a mesh (psum). Nothing is sorted, copied or rounded.
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
_OFFSETS = np.array([[-1.5, -0.4, 0.4, 1.5]], np.float32)  # in standard errors: 3 to 5 passes, fewest of those tried
_EVENLY = np.array([[0.2, 0.4, 0.6, 0.8]], np.float32)
_BIN_BITS = 19  # a bin of the sample's histogram: the exponent and four bits of the mantissa
_BINS = 1 << (31 - _BIN_BITS)
_SAMPLE = 16384
_ROWS = 16  # rows whose hits are added up in one byte per pivot, vectorised, before they are summed
_BLOCKED = 1 << 16  # entries from which that pays


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
    """What the next pass compares with."""
    evenly: Bool[Array, "N"]
    """Whether they cut the bracket evenly."""
    coarse: Bool[Array, "N"]
    """Whether the entries seem to be bfloat16 numbers, whose patterns are multiples of 2**16."""


class Sample(NamedTuple):
    """What a sample of the entries says; adds over leaves, chunks and shards."""

    histogram: Float32[Array, "N bins"]
    """About how many entries there are in each bin."""
    spread: Float32[Array, ""]
    """The sum of stride * size: what the variance of a share is in proportion to."""
    fine: Float32[Array, "N"]
    """How many of the sampled entries are no bfloat16 numbers."""


def magnitude_bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """The float32 bit pattern of |x|. Compared as integers, denormals stay distinct even where floats flush them."""
    if x.dtype == jnp.bfloat16:  # its pattern is the upper half: integer operations, which vectorise
        half = jax.lax.bitcast_convert_type(x, jnp.uint16) & jnp.uint16(0x7FFF)
        return half.astype(jnp.uint32) << jnp.uint32(16)
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) & jnp.uint32(0x7FFFFFFF)


def search(candidates: int, size: int) -> Search:
    """The search before its first pass: N candidates of `size` entries each."""
    low = jnp.zeros(candidates, jnp.uint32)
    total = jnp.broadcast_to(to_limbs(size), (candidates, 2))
    pivots = jnp.zeros((candidates, PIVOTS), jnp.uint32)
    no = jnp.zeros(candidates, bool)
    return Search(low, low + jnp.uint32(NOTHING + 1), total, jnp.zeros_like(total), pivots, no, no)


def sample(x: Float[Array, "N ..."]) -> Sample:
    """One leaf's sample, with a stride along each axis: no reshape, which would undo a sharding."""
    size = x.size // max(x.shape[0], 1)
    strides, wanted = [], max(size // _SAMPLE, 1)
    for place, dim in enumerate(x.shape[1:]):
        strides.append(max(min(round(wanted ** (1 / (len(x.shape) - 1 - place))), dim), 1))
        wanted = max(wanted // strides[-1], 1)
    stride = math.prod(strides)

    def one(row: Float[Array, "..."]) -> tuple[Float32[Array, "bins"], Float32[Array, ""]]:
        part = magnitude_bits(row[tuple(slice(None, None, s) for s in strides)]).reshape(-1)
        bins = (part >> jnp.uint32(_BIN_BITS)).astype(jnp.int32)
        histogram = jnp.zeros(_BINS, jnp.float32).at[bins].add(jnp.float32(size / max(part.size, 1)))
        return histogram, jnp.sum((part & jnp.uint32(0xFFFF)) != 0, dtype=jnp.float32)

    found = [one(x[i]) for i in range(x.shape[0])]
    histograms, fine = (jnp.stack(parts) for parts in zip(*found, strict=True))
    return Sample(histograms, jnp.float32(stride * size), fine)


def aim(state: Search, found: Sample, k: Int32[Array, "N 2"]) -> Search:
    """The search with its first pivots, given the sample summed over everything and k in limbs."""
    size, rank = to_float(state.at_low), to_float(k)
    share = rank / jnp.maximum(size, 1)
    # No less than one stride's entries, else a k at an end would be aimed at with certainty.
    error = jnp.sqrt(jnp.maximum(share * (1 - share), 1 / jnp.maximum(size, 1)) * found.spread)
    ranks = jnp.clip(rank[:, None] - _OFFSETS * error[:, None], 0.5, jnp.maximum(size, 1)[:, None] - 0.5)
    reach = jnp.cumsum(found.histogram[:, ::-1], axis=1)[:, ::-1]  # entries in this bin and above
    place = jnp.sum(reach[:, None, :] >= ranks[:, :, None], axis=-1, dtype=jnp.int32) - 1
    place = jnp.clip(place, 0, _BINS - 1)
    inside = jnp.take_along_axis(reach, place, axis=1) - ranks
    width = jnp.maximum(jnp.take_along_axis(found.histogram, place, axis=1), jnp.float32(1e-6))
    part = jnp.clip(inside / width, 0.0, 0.999) * jnp.float32(1 << _BIN_BITS)
    pivots = (place.astype(jnp.uint32) << jnp.uint32(_BIN_BITS)) + part.astype(jnp.uint32)
    coarse = found.fine == 0
    pivots = jnp.where(coarse[:, None], _to_coarse(pivots), pivots)
    state = state._replace(pivots=jnp.clip(pivots, 1, NOTHING), coarse=coarse)
    # k = 0 keeps nothing: there is nothing to search.
    none = sign(k) <= 0
    return state._replace(low=jnp.where(none, jnp.uint32(NOTHING), state.low))


def _to_coarse(pattern: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The nearest multiple of 2**16."""
    return (pattern + jnp.uint32(0x8000)) & jnp.uint32(0xFFFF0000)


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
    if size >= _BLOCKED and jax.device_count() == 1:  # it reshapes, which would gather an array that is sharded
        rows = x if isinstance(x, jax.Array) else [x[i] for i in range(x.shape[0])]
        return jax.lax.platform_dependent(rows, pivots, cpu=_blocked, default=_plain)
    return _plain(x, pivots)


def _plain(x: Any, pivots: UInt32[Array, "N P"]) -> Int32[Array, "N P"]:
    """Unrolled over candidates and pivots: sums that share their input, which XLA fuses."""
    bits = [magnitude_bits(x[i]) for i in range(pivots.shape[0])]
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
    before, after = to_float(state.at_low - state.at_high), to_float(at_low - at_high)
    evenly = ~state.evenly & (after * 4 > before)
    finished = done(state, k)
    low, at_low = jnp.where(finished, state.low, low), jnp.where(finished[:, None], state.at_low, at_low)
    state = state._replace(low=low, high=high, at_low=at_low, at_high=at_high, evenly=evenly)
    return state._replace(pivots=_next_pivots(state, k))


def _pick(
    place: Int32[Array, "N"], patterns: UInt32[Array, "N Q"], own: Int32[Array, "N 2"], counts: Int32[Array, "N P 2"]
) -> tuple[UInt32[Array, "N"], Int32[Array, "N 2"]]:
    counts = jnp.concatenate([own[:, None], counts], axis=1)
    chosen = jnp.take_along_axis(patterns, place[:, None], axis=1)[:, 0]
    return chosen, jnp.take_along_axis(counts, place[:, None, None], axis=1)[:, 0]


def _next_pivots(state: Search, k: Int32[Array, "N 2"]) -> UInt32[Array, "N P"]:
    width = (state.high - state.low)[:, None]
    entries = jnp.maximum(to_float(state.at_low - state.at_high), 1)
    share = to_float(state.at_low - k) / entries
    error = jnp.sqrt(jnp.maximum(share * (1 - share), 1 / entries) / entries)
    places = jnp.where(state.evenly[:, None], _EVENLY, share[:, None] + _OFFSETS * error[:, None])
    steps = (jnp.clip(places, 0.0, 1.0) * width.astype(jnp.float32)).astype(jnp.uint32)
    steps = jnp.clip(steps, jnp.uint32(1), jnp.maximum(width - jnp.uint32(1), jnp.uint32(1)))
    pivots = state.low[:, None] + steps
    # All entries between two multiples of 2**16 are at the lower one: a pivot just above it settles that.
    rounded = jnp.where(width > jnp.uint32(0x10000), _to_coarse(pivots), pivots)
    rounded = jnp.concatenate([state.low[:, None] + jnp.uint32(1), rounded[:, 1:]], axis=1)
    return jnp.where(state.coarse[:, None], rounded, pivots)


def done(state: Search, k: Int32[Array, "N 2"]) -> Bool[Array, "N"]:
    """Whether `low` keeps what the k-th largest magnitude itself would keep."""
    return (sign(state.at_low - k) <= 0) | (state.high - state.low <= jnp.uint32(1))


def solve(
    state: Search,
    k: Int32[Array, "N 2"],
    sampled: Callable[[], Sample],
    counted: Callable[[Search], Int32[Array, "N P 2"]],
) -> Search:
    """All passes: `sampled` and `counted` go over the data."""
    state = aim(state, sampled(), k)
    return jax.lax.while_loop(
        lambda state: ~jnp.all(done(state, k)), lambda state: narrow(state, counted(state), k), state
    )


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

    state = solve(
        search(candidates, size),
        keep,
        lambda: over(sample),
        lambda state: over(lambda leaf: to_limbs(hits(leaf, state.pivots))),
    )
    # The search stops as soon as its threshold keeps the right entries: the smallest of them is the k-th.
    smallest = [jnp.stack([_smallest(leaf[i], state.low[i]) for leaf in leaves]).min() for i in range(candidates)]
    return jnp.where(at_least(to_limbs(size)[None], keep), jnp.stack(smallest), jnp.uint32(0))


def _smallest(x: Float[Array, "..."], low: UInt32[Array, ""]) -> UInt32[Array, ""]:
    bits = jax.lax.bitcast_convert_type(magnitude_bits(x), jnp.int32)  # signed minima vectorise
    reaching = jnp.where(bits >= jax.lax.bitcast_convert_type(low, jnp.int32), bits, jnp.int32(NOTHING))
    return jax.lax.bitcast_convert_type(jnp.min(reaching, initial=jnp.int32(NOTHING)), jnp.uint32)
