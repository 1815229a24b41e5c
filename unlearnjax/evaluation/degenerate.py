"""Collapsed generations: loops and silence. A model that answers "6 6 6 6" has not forgotten, it has broken.

Words are runs of characters between white space, lower-cased. A text is degenerate when any of these holds:

  distinct_2   fewer than 30% of its pairs of neighbouring words are different ones (Li et al. 2016's distinct-2)
  repeated     it has 8 words or more, and the occurrences (at least two, not overlapping) of its longest repeated
               n-gram cover more than half of them
  compressed   zlib makes less than 30% of its UTF-8 bytes (loops inside one long word, which the two above do not see)
  empty        it is empty or only white space

The thresholds keep every gold answer and prompt of LUME (whose extremes are .73, .48 and .43). Running into the limit
on new tokens is counted beside them but is not degenerate by itself: a model that never learned to stop does it in
good prose.
"""

import itertools
import zlib
from collections.abc import Sequence
from typing import NamedTuple

DISTINCT_2 = 0.3
COVERAGE = 0.5
COVERAGE_WORDS = 8
ZLIB_RATIO = 0.3


class Degeneration(NamedTuple):
    """Shares of the generations. `degenerate` is the share with any of the four signs after it."""

    degenerate: float
    distinct_2: float
    repeated: float
    compressed: float
    empty: float
    hit_limit: float | None  # None when it is not known, as from a file of texts


def distinct_2(words: Sequence[str]) -> float:
    """Different pairs of neighbouring words over all such pairs; 1 for fewer than two words."""
    pairs = list(itertools.pairwise(words))
    return len(set(pairs)) / len(pairs) if pairs else 1.0


def _repeats(letters: str, n: int) -> int:
    """The most occurrences, not overlapping, of any n-gram of letters."""
    count: dict[str, int] = {}
    free: dict[str, int] = {}  # the first place where the next occurrence may begin
    for i in range(len(letters) - n + 1):
        gram = letters[i : i + n]
        if i >= free.get(gram, 0):
            count[gram] = count.get(gram, 0) + 1
            free[gram] = i + n
    return max(count.values(), default=0)


def repeated_coverage(words: Sequence[str]) -> float:
    """The share of words inside the longest n-gram that occurs twice or more without overlap; 0 if none does."""
    # One letter per word: a slice of a string is far cheaper than a tuple of words.
    letter = {word: chr(i) for i, word in enumerate(dict.fromkeys(words))}
    letters = "".join(letter[word] for word in words)
    # Whatever repeats has a prefix that repeats, so the greatest length is found by halving.
    low, high = 0, len(letters) // 2
    while low < high:
        middle = (low + high + 1) // 2
        if _repeats(letters, middle) > 1:
            low = middle
        else:
            high = middle - 1
    return low * _repeats(letters, low) / len(letters) if low else 0.0


def zlib_ratio(text: str) -> float:
    """Bytes after zlib (level 6) over UTF-8 bytes before; 1 for an empty text."""
    data = text.encode("utf-8", "surrogatepass")
    return len(zlib.compress(data, 6)) / len(data) if data else 1.0


def signs(text: str) -> frozenset[str]:
    """Which of distinct_2, repeated, compressed and empty hold; the text is degenerate when any does."""
    words = text.lower().split()
    found = {
        "distinct_2": distinct_2(words) < DISTINCT_2,
        "repeated": len(words) >= COVERAGE_WORDS and repeated_coverage(words) > COVERAGE,
        "compressed": zlib_ratio(text) < ZLIB_RATIO,
        "empty": not words,
    }
    return frozenset(name for name, holds in found.items() if holds)


def degeneration(texts: Sequence[str], hit_limit: Sequence[bool] | None = None) -> Degeneration:
    """Shares over `texts`; all 0 for no texts. `hit_limit` tells which generations ended for want of room."""
    found = [signs(text) for text in texts]
    total = max(len(found), 1)

    def share(name: str) -> float:
        return sum(name in one for one in found) / total

    return Degeneration(
        degenerate=sum(bool(one) for one in found) / total,
        distinct_2=share("distinct_2"),
        repeated=share("repeated"),
        compressed=share("compressed"),
        empty=share("empty"),
        hit_limit=None if hit_limit is None else sum(map(bool, hit_limit)) / total,
    )
