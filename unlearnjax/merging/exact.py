"""Keeping exactly k entries: of those that tie with the k-th largest magnitude, the ones at the lowest places stay.

It is a second search, after that for the threshold: for the place before which just enough of the tied entries lie.
Counts of tied entries before a place add over the pieces of a tensor and the shards of a mesh as the threshold's do.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32
from unlearnjax_kernels.dare import api as dare
from unlearnjax_kernels.threshold import api as threshold
from unlearnjax_kernels.threshold import host

from unlearnjax.merging.protocol import Draws, candidates

PIVOTS = 16  # in eight passes they find one place of 2**32


class Cut(NamedTuple):
    """Of the entries at the threshold, those at a place (row-major, in their tensor) before `end` stay."""

    end: UInt32[Array, "N"]
    start: UInt32[Array, "N"] | None
    """Until it is found: a place before which too few lie. None: the host has found it (see `host`)."""


def begin(candidates: int, size: int) -> Cut:
    """The search before its first pass."""
    return Cut(np.full(candidates, size, np.uint32), np.zeros(candidates, np.uint32))  # type: ignore[arg-type]


def places_of(draws: Draws, shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Where the entries lie in their tensor."""
    return dare.places(shape, draws.part)


def count(deltas: Float[Array, "N ..."], search: threshold.Search, cut: Cut, draws: Draws) -> Int32[Array, "N P"]:
    """How many tied entries lie before each pivot."""
    places = places_of(draws, deltas.shape[1:])
    pivots = _pivots(cut)
    found = []
    for i, delta in enumerate(candidates(deltas)):
        at = threshold.magnitude_bits(delta) == search.low[i]
        before = jax.vmap(lambda pivot, at=at: jnp.sum(at & (places < pivot), dtype=jnp.int32))
        found.append(before(pivots[i]))
    return jnp.stack(found)


def _pivots(cut: Cut) -> UInt32[Array, "N P"]:
    assert cut.start is not None
    shares = (np.arange(1, PIVOTS + 1, dtype=np.float32) / (PIVOTS + 1))[None]
    width = (cut.end - cut.start)[:, None].astype(jnp.float32)
    inner = jnp.asarray(cut.start)[:, None] + jnp.ceil(shares * width).astype(jnp.uint32)
    return jnp.clip(inner, jnp.asarray(cut.start)[:, None], jnp.asarray(cut.end)[:, None])


def narrow(cut: Cut, counts: Int32[Array, "N P"], search: threshold.Search, keep: Int32[Array, "N 2"]) -> Cut:
    """The search after a pass, given the counts summed over everything."""
    assert cut.start is not None
    pivots = _pivots(cut)
    wanted = jnp.asarray(keep - search.at_high)  # of the tied ones, in limbs: those above are all kept
    enough = threshold.at_least(threshold.to_limbs(counts), wanted[:, None])
    # Where the threshold keeps just k entries it need not be anyone's magnitude, and all that reach it stay.
    exact = (threshold.sign(search.at_low - keep) <= 0)[:, None]
    enough = enough & ~exact
    end = jnp.min(jnp.where(enough, pivots, jnp.asarray(cut.end)[:, None]), axis=1)
    start = jnp.max(jnp.where(enough, jnp.uint32(0), pivots), axis=1)
    return Cut(end, jnp.maximum(jnp.minimum(start, end - jnp.uint32(1)), cut.start))


def done(cut: Cut) -> Bool[Array, ""]:
    """Whether no place is left between the ends."""
    assert cut.start is not None
    return jnp.all(cut.end - cut.start <= jnp.uint32(1))


def at_once(leaves: Sequence[np.ndarray], low: np.ndarray, keep: np.ndarray) -> Cut:
    """The same, for arrays in a CPU's memory that lie one after another, and thresholds that are k-th magnitudes."""
    size = sum(leaf[0].size for leaf in leaves)
    wanted = np.asarray(keep, np.int64)
    ends = []
    for i, pattern in enumerate(np.asarray(low)):
        above, found, place = 0, [np.zeros(0, np.int64)], 0
        for leaf in leaves:
            bits = host.scratch(leaf[i].size)
            host.magnitude_bits(leaf[i], bits)
            above += int(np.count_nonzero(bits > pattern))
            found.append(np.flatnonzero(bits == pattern) + place)
            place += bits.size
        places, missing = np.concatenate(found), int((wanted[i, 1] << 16) + wanted[i, 0]) - above
        ends.append(int(places[missing - 1]) + 1 if 0 < missing <= places.size else size)
    return Cut(np.array(ends, np.uint32), None)  # type: ignore[arg-type]


def stays(bits: UInt32[Array, "..."], pattern: Any, end: Any, places: UInt32[Array, "..."]) -> Bool[Array, "..."]:
    """Which entries are kept."""
    return (bits > pattern) | ((bits == pattern) & (places < end))
