"""The threshold operation as the rest of the code calls it: one entry point, and the rounds it is made of."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from unlearnjax_kernels.threshold import reference, xla
from unlearnjax_kernels.threshold.xla import (
    BITS,
    MAX_LEAF,
    Search,
    at_least,
    count,
    magnitude_bits,
    narrow,
    search,
    sign,
    to_limbs,
)

Implementation = Literal["xla", "reference"]

__all__ = [
    "BITS",
    "MAX_LEAF",
    "Implementation",
    "Search",
    "at_least",
    "count",
    "kth_magnitude",
    "magnitude_bits",
    "narrow",
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
        implementation: None picks the fastest there is; "reference" needs concrete arrays and a concrete k.

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
    if implementation in (None, "xla"):
        return xla.kth_magnitude(leaves, k)
    raise ValueError(f"unknown implementation {implementation!r}; valid: reference, xla")


def to_float(pattern: UInt32[Array, "N"]) -> Float[Array, "N"]:
    """The magnitude a pattern stands for (NaN for the pattern that keeps nothing)."""
    return jnp.asarray(pattern).view(jnp.float32)
