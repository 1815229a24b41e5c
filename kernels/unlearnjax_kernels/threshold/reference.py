"""The k-th largest magnitude in numpy, by partial sorting: slow, obvious, and what the other back ends must equal."""

from collections.abc import Sequence

import numpy as np

NOTHING = np.uint32(0x7FFFFFFF)  # above the pattern of every number: `kept` is then empty


def magnitude_bits(x: np.ndarray) -> np.ndarray:
    """The float32 bit pattern of |x| as uint32; patterns of non-negative floats are ordered as the floats are."""
    return np.abs(x.astype(np.float32)).view(np.uint32)


def hits(x: np.ndarray, pivots: np.ndarray) -> np.ndarray:
    """See `api.hits`."""
    bits = magnitude_bits(x).reshape(len(x), 1, -1)
    return (bits >= pivots[:, :, None]).sum(axis=-1, dtype=np.int32)


def kth_magnitude(leaves: Sequence[np.ndarray], k: int) -> np.ndarray:
    """Per candidate, the pattern of the k-th largest magnitude over all leaves together.

    Args:
        leaves: arrays [N, ...] of any floating dtype; candidate i is the concatenation of all `leaf[i]`.
        k: how many entries to keep. 0 gives a pattern that keeps nothing, more than the number of entries
            gives 0, which keeps everything.

    Returns:
        uint32 [N]. Keeping `magnitude_bits(x) >= pattern` keeps k entries, and every further one of equal magnitude.
    """
    count = leaves[0].shape[0]
    flat = np.concatenate([magnitude_bits(leaf).reshape(count, -1) for leaf in leaves], axis=1)
    if k <= 0:
        return np.full(count, NOTHING)
    if k > flat.shape[1]:
        return np.zeros(count, np.uint32)
    position = flat.shape[1] - k
    return np.partition(flat, position, axis=1)[:, position]
