"""The threshold operation as the rest of the code calls it: one entry point, and the rounds it is made of."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from unlearnjax_kernels.threshold import pallas, reference, xla
from unlearnjax_kernels.threshold.limbs import at_least, sign, to_limbs
from unlearnjax_kernels.threshold.xla import (
    MAX_LEAF,
    Sample,
    Search,
    aim,
    count,
    done,
    magnitude_bits,
    narrow,
    sample,
    search,
)

Implementation = Literal["xla", "pallas", "pallas_interpret", "reference"]

__all__ = [
    "MAX_LEAF",
    "Implementation",
    "Sample",
    "Search",
    "aim",
    "at_least",
    "count",
    "done",
    "hits",
    "kth_magnitude",
    "magnitude_bits",
    "narrow",
    "sample",
    "search",
    "sign",
    "to_float",
    "to_limbs",
]


def kth_magnitude(
    x: Float[Array, "N ..."] | Sequence[Float[Array, "N ..."]],
    k: int | Int32[Array, "..."],
    *,
    implementation: Implementation | None = None,
) -> UInt32[Array, "N"]:
    """Per candidate, the float32 bit pattern of the exact k-th largest magnitude.

    Args:
        x: one array [N, ...], or several that are ranked together (a tree's leaves); any floating dtype.
        k: entries to keep: an int, or a traced int32 (its limbs [2] for counts beyond 32 bits).
            0 gives a pattern that keeps nothing; the number of entries or more gives one that keeps everything.
        implementation: None is "xla" everywhere; "pallas" counts in the TPU kernel (no one has timed it against XLA
            yet); "reference" needs concrete arrays and a concrete k.

    Returns:
        uint32 [N]. `magnitude_bits(x[i]) >= pattern[i]` keeps exactly k entries plus all that tie with the k-th.

    Raises:
        ValueError: no array given, an unknown implementation, or a leaf with 2**31 entries or more per candidate.
    """
    leaves: list[Array] = [x] if hasattr(x, "shape") else list(x)  # type: ignore[list-item]
    if not leaves:
        raise ValueError("kth_magnitude needs at least one array")
    if implementation == "reference":
        return jnp.asarray(reference.kth_magnitude([np.asarray(leaf) for leaf in leaves], int(k)))
    return xla.kth_magnitude(leaves, k, _counter(implementation))


def hits(
    x: Float[Array, "N ..."], pivots: UInt32[Array, "N P"], *, implementation: Implementation | None = None
) -> Int32[Array, "N P"]:
    """One pass of the search over one leaf: per candidate, how many magnitudes reach each of its pivots.

    Raises:
        ValueError: an unknown implementation, or a leaf with 2**31 entries or more per candidate.
    """
    if implementation == "reference":
        return jnp.asarray(reference.hits(np.asarray(x), np.asarray(pivots)))
    return _counter(implementation)(x, pivots)


def _counter(implementation: Implementation | None) -> xla.Hits:
    if implementation in (None, "xla"):
        return xla.hits
    if implementation == "pallas":
        return pallas.hits
    if implementation == "pallas_interpret":
        return pallas.hits_interpreted
    raise ValueError(f"unknown implementation {implementation!r}; valid: xla, pallas, pallas_interpret, reference")


def to_float(pattern: UInt32[Array, "N"]) -> Float[Array, "N"]:
    """The magnitude a pattern stands for (NaN for the pattern that keeps nothing)."""
    return jnp.asarray(pattern).view(jnp.float32)
