"""The k-th largest magnitude of arrays in a CPU's memory, by numpy's vectorised quickselect.

Outside of a program this is several times faster than counting inside one (unlearnjax_kernels.threshold.xla), which
reads all entries again in every pass, and there is nothing to compile. It needs a scratch array of one candidate's
entries for each thread.
"""

import functools
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax.numpy as jnp
import numpy as np

from unlearnjax_kernels.threshold.xla import NOTHING, Search

_MAGNITUDE = np.uint32(0x7FFFFFFF)
KEPT = 1 << 24  # entries of scratch that a thread keeps (64 MiB); more are better searched in passes
_own = threading.local()
_CHUNK = 1 << 16  # entries that stay in a core's cache


def threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache  # a child of a fork has no threads, and makes its own
def workers() -> ThreadPoolExecutor:
    """A thread for each core."""
    return ThreadPoolExecutor(threads(), "threshold")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=workers.cache_clear)


def found(leaves: Sequence[np.ndarray], keep: np.ndarray) -> Search:
    """The search for each candidate's threshold, finished.

    Args:
        leaves: [N, ...] each, of any floating dtype; a candidate's entries in all of them are ranked together.
        keep: int [N, 2]: how many entries of each to keep, in limbs.

    Returns:
        A `Search` without pivots, by which `settled` knows it.
    """
    keep = np.asarray(keep, np.int64)
    counts = (keep[:, 1] << 16) + keep[:, 0]
    one = lambda i, k: _kth([leaf[i] for leaf in leaves], k)  # noqa: E731
    return finished(np.array(list(workers().map(one, range(counts.size), counts.tolist())), np.uint32))


def finished(low: np.ndarray) -> Search:
    """The search that has found these patterns."""
    nothing = np.zeros((low.size, 2), np.int32)
    pivots, evenly = np.zeros((low.size, 0), np.uint32), np.zeros(low.size, bool)
    return Search(low, low + np.uint32(1), nothing, nothing, pivots, evenly)  # type: ignore[arg-type]


def settled(search: Search) -> bool:
    """Whether `found` has found it: known by the shapes, so that a program need not contain a search at all."""
    return search.pivots.shape[1] == 0


def _kth(parts: Sequence[np.ndarray], k: int) -> int:
    bits = scratch(sum(part.size for part in parts))
    place = 0
    for part in parts:
        magnitude_bits(part, bits[place : place + part.size])
        place += part.size
    return kth(bits, k)


def kth(bits: np.ndarray, k: int) -> int:
    """The k-th largest of these patterns, which are moved about; k as in `reference.kth_magnitude`."""
    if k <= 0:
        return NOTHING
    if k >= bits.size:
        return 0
    bits.partition(bits.size - k)
    return int(bits[bits.size - k])


def scratch(size: int) -> np.ndarray:
    """Uninitialised memory. A thread keeps what is not very large: the first touch of new memory takes longer than all
    the rest."""
    if size > KEPT:
        return np.empty(size, np.uint32)
    if getattr(_own, "bits", None) is None or _own.bits.size < size:
        _own.bits = np.empty(size, np.uint32)
    return _own.bits[:size]


def magnitude_bits(x: np.ndarray, out: np.ndarray) -> None:
    """The float32 bit patterns of |x|, row-major, into `out`."""
    flat = x.reshape(-1)
    if flat.dtype == np.float32:
        np.bitwise_and(flat.view(np.uint32), _MAGNITUDE, out=out)
        return
    for start in range(0, flat.size, _CHUNK):
        part, own = flat[start : start + _CHUNK], out[start : start + _CHUNK]
        if flat.dtype == jnp.bfloat16:  # the upper half of a float32's pattern
            np.left_shift(part.view(np.uint16), 16, out=own, dtype=np.uint32)
            np.bitwise_and(own, _MAGNITUDE, out=own)
        else:
            np.bitwise_and(part.astype(np.float32).view(np.uint32), _MAGNITUDE, out=own)
