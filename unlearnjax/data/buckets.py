"""Length buckets: a few fixed widths, so that few programs are compiled and little is padding."""

import numpy as np


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def choose_widths(lengths: np.ndarray, count: int, multiple: int = 1) -> list[int]:
    """At most `count` widths that hold every length with the least padding; each a multiple of `multiple`.

    Exact, by dynamic programming over the distinct rounded lengths.
    """
    rounded = np.asarray([round_up(int(n), multiple) for n in lengths])
    widths, counts = np.unique(rounded, return_counts=True)
    m, rows = len(widths), np.concatenate([[0], np.cumsum(counts)])
    # best[j] after k rounds: least total width of the rows up to widths[j - 1] with k buckets, the last ending there.
    best = np.full(m + 1, np.inf)
    best[0] = 0.0
    cuts = []
    for _ in range(min(count, m)):
        cost = best[:, None] + (rows[None, :] - rows[:, None]) * np.concatenate([[0], widths])[None, :]
        cost[np.tril_indices(m + 1)] = np.inf
        cost[0, 0] = 0.0
        cuts.append(np.argmin(cost, axis=0))
        best = np.min(cost, axis=0)
    chosen, end = [], m
    for cut in reversed(cuts):
        if end == 0:
            break
        chosen.append(int(widths[end - 1]))
        end = int(cut[end])
    return sorted(chosen)


def fit(length: int, widths: list[int]) -> int:
    """The smallest of `widths` (ascending) that holds `length`; the largest if none does."""
    return widths[min(int(np.searchsorted(widths, length)), len(widths) - 1)]
