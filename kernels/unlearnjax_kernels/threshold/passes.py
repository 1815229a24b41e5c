"""The k-th largest magnitude of entries that are not all in a CPU's memory at once, in a part of a pass and one pass.

A sample says between which two magnitudes the k-th lies. One pass over everything counts the entries above, and keeps
those between: a few thousandths, of which the k-th is then selected. Both bounds are entries of the sample, and what
equals one is counted apart: where many entries are equal, as the differences of bfloat16 weights are, it is often the
k-th itself.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from unlearnjax_kernels.threshold.host import finished, kth, magnitude_bits, scratch, workers
from unlearnjax_kernels.threshold.xla import NOTHING, Search

Passes = Callable[[int], Iterable[np.ndarray]]
"""passes(1): all entries, as arrays [N, ...] one after another. passes(n): about one in n of them, from everywhere."""

_SAMPLE = 1 << 22  # entries of each candidate, or up to twice as many
_DEVIATIONS = 8  # between the sample's quantile and a bound: neighbouring entries are alike
_SHARE = 1e-3  # of the sample between them, at least
_CHUNK = 1 << 18
_HELD = 1 << 22  # entries between the bounds that are kept apart; of more, equal ones are counted


@dataclass
class _Bracket:
    """Of one candidate: the bounds, and what lies above, on and between them."""

    low: int
    high: int
    above: int = 0
    on_low: int = 0
    on_high: int = 0
    values: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    recent: list[np.ndarray] = field(default_factory=list)
    held: int = 0  # entries in `recent`

    def add(self, x: np.ndarray) -> None:
        bits = scratch(x.size)
        magnitude_bits(x, bits)
        over, under = bits > self.high, bits < self.high
        above, below = int(np.count_nonzero(over)), int(np.count_nonzero(under))
        self.above += above
        self.on_high += bits.size - above - below
        if self.low == self.high:
            return
        self.on_low += int(np.count_nonzero(bits == self.low))
        self.recent.append(bits[under & (bits > self.low)])
        self.held += self.recent[-1].size
        if self.held > _HELD:
            self._gather()

    def _gather(self) -> None:
        new, counts = np.unique(np.concatenate([np.zeros(0, np.uint32), *self.recent]), return_counts=True)
        values, counts = np.concatenate([self.values, new]), np.concatenate([self.counts, counts])
        order = np.argsort(values, kind="stable")
        self.values, first = np.unique(values[order], return_index=True)
        self.counts = np.add.reduceat(counts[order], first) if first.size else self.counts
        self.recent, self.held = [], 0

    def kth(self, k: int) -> int | None:
        """None where it does not lie between the bounds."""
        missing = k - self.above
        if missing <= 0:
            return None
        if missing <= self.on_high:
            return self.high
        missing -= self.on_high
        self._gather()
        reach = np.cumsum(self.counts[::-1])
        if reach.size and missing <= reach[-1]:
            return int(self.values[::-1][np.searchsorted(reach, missing)])
        missing -= int(reach[-1]) if reach.size else 0
        return self.low if missing <= self.on_low else None


def through(leaves: Sequence[np.ndarray]) -> Passes:
    """Arrays in memory in chunks that stay in a core's cache."""

    def passes(one_in: int) -> Iterator[np.ndarray]:
        for leaf in leaves:
            flat = leaf.reshape(len(leaf), -1)
            for start in range(0, flat.shape[1], _CHUNK):
                yield flat[:, start : start + _CHUNK : one_in]

    return passes


def memory(size: int, candidates: int) -> int:
    """About how many bytes `found` takes for entries that no sample misjudges."""
    sample = min(size, 2 * _SAMPLE)
    return candidates * (8 * sample + 24 * int(4 * _SHARE * size))


def found(passes: Passes, keep: np.ndarray, size: int) -> Search | None:
    """The search for each candidate's threshold, finished (see `host.found`); None where the sample led astray.

    Args:
        keep: int [N, 2]: how many entries of each to keep, in limbs.
        size: entries of each candidate in all.
    """
    keep = np.asarray(keep, np.int64)
    counts = ((keep[:, 1] << 16) + keep[:, 0]).tolist()
    share = max(1 << max(size // _SAMPLE, 1).bit_length() - 1, 1)
    sampled: list[list[np.ndarray]] = [[np.zeros(0, np.uint32)] for _ in counts]
    for leaf in passes(share):
        for i, own in enumerate(sampled):
            bits = np.empty(leaf[i].size, np.uint32)
            magnitude_bits(leaf[i], bits)
            own.append(bits)
    if share == 1:  # few entries: the sample is all of them
        lows = workers().map(lambda own, k: kth(np.concatenate(own), k), sampled, counts)
        return finished(np.array(list(lows), np.uint32))
    bounds = workers().map(lambda own, k: _bounds(np.concatenate(own), k / size), sampled, counts)
    brackets = [_Bracket(*pair) for pair in bounds]
    del sampled
    for leaf in passes(1):
        for _ in workers().map(lambda bracket, i, leaf=leaf: bracket.add(leaf[i]), brackets, range(len(brackets))):
            pass
    chosen = [_chosen(bracket, k, size) for bracket, k in zip(brackets, counts, strict=True)]
    return None if None in chosen else finished(np.array(chosen, np.uint32))


def _chosen(bracket: _Bracket, k: int, size: int) -> int | None:
    if k <= 0:
        return NOTHING
    return 0 if k >= size else bracket.kth(k)


def _bounds(bits: np.ndarray, share: float) -> tuple[int, int]:
    """Patterns that the `share` largest entries' smallest lies between, both included."""
    count = bits.size
    if not count:
        return 0, NOTHING
    margin = max(_DEVIATIONS * math.sqrt(count * share * (1 - share)), _SHARE * count, 8) if share < 1 else 0
    first = math.floor(share * count - margin)  # ranks, from the largest
    last = math.ceil(share * count + margin)
    places = [count - 1 - min(max(rank, 0), count - 1) for rank in (last, first)]
    bits.partition(sorted(set(places)))
    low, high = (int(bits[place]) for place in places)
    return (0 if last >= count else low), (NOTHING if first < 0 else high)
