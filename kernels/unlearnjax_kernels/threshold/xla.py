"""The k-th largest magnitude in XLA: bisection on the 31 magnitude bits of float32.

The largest pattern t with `count(pattern >= t) >= k` is built bit by bit from the top: 31 rounds, each one pass that
counts. A count is all a round needs from the data, and counts add, so the same rounds serve one array, a tree of
arrays, the chunks of a stream and the shards of a mesh (psum). Nothing is sorted, copied or rounded.

Counts of a whole model overflow 32 bits, and JAX's default integers are 32 bits wide. They travel as two 16-bit limbs
in int32, [low, high]: limbs are added like any partial sum, and carried only when compared.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32, UInt32

BITS = 31
MAX_LEAF = 2**31 - 1  # entries per candidate that one int32 count can hold


class Search(NamedTuple):
    """Where the bisection stands: the bits found so far, and the bit (a power of two) to decide next."""

    pattern: UInt32[Array, "N"]
    bit: UInt32[Array, ""]


def magnitude_bits(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """The float32 bit pattern of |x|. Compared as integers, denormals stay distinct even where floats flush them."""
    return jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) & jnp.uint32(0x7FFFFFFF)


def to_limbs(count: int | Int32[Array, "..."]) -> Int32[Array, "... 2"]:
    """A (possibly negative) count as [low, high] limbs; a Python int may be as large as 2**46."""
    if isinstance(count, int):
        return jnp.asarray(np.array([count & 0xFFFF, count >> 16], np.int32))
    return jnp.stack([count & 0xFFFF, count >> 16], axis=-1)


def carry(limbs: Int32[Array, "... 2"]) -> tuple[Int32[Array, "..."], Int32[Array, "..."]]:
    """(low, high) of a sum of limbs, with low back in [0, 65536)."""
    low, high = limbs[..., 0], limbs[..., 1]
    return low & 0xFFFF, high + (low >> 16)


def at_least(count: Int32[Array, "... 2"], bound: Int32[Array, "2"]) -> Bool[Array, "..."]:
    """count >= bound, both in limbs."""
    low, high = carry(count)
    bound_low, bound_high = carry(bound)
    return (high > bound_high) | ((high == bound_high) & (low >= bound_low))


def sign(count: Int32[Array, "... 2"]) -> Int32[Array, "..."]:
    """-1, 0 or 1: the sign of a count in limbs."""
    low, high = carry(count)
    return jnp.where(high < 0, -1, jnp.where((high > 0) | (low > 0), 1, 0)).astype(jnp.int32)


def search(candidates: int) -> Search:
    """The search before its first round, for N candidates."""
    return Search(jnp.zeros(candidates, jnp.uint32), jnp.uint32(1 << (BITS - 1)))


def count(x: Float[Array, "N ..."], state: Search) -> Int32[Array, "N 2"]:
    """One round's counts for one leaf: per candidate, how many magnitudes reach the pattern being tried.

    Unrolled over candidates: XLA makes one pass of it, several times faster on CPU than reducing beside a leading axis.

    Raises:
        ValueError: the leaf holds 2**31 entries or more per candidate.
    """
    if x.size // max(x.shape[0], 1) > MAX_LEAF:
        raise ValueError(f"a leaf of shape {x.shape} has 2**31 entries or more per candidate; split it along an axis")
    trial = state.pattern | state.bit
    counts = [jnp.sum(magnitude_bits(x[i]) >= trial[i], dtype=jnp.int32) for i in range(x.shape[0])]
    return to_limbs(jnp.stack(counts))


def narrow(state: Search, counts: Int32[Array, "N 2"], k: Int32[Array, "2"]) -> Search:
    """The search after one round, given the counts summed over everything and k in limbs."""
    pattern = jnp.where(at_least(counts, k), state.pattern | state.bit, state.pattern)
    return Search(pattern, state.bit >> jnp.uint32(1))


def kth_magnitude(leaves: Sequence[Float[Array, "N ..."]], k: int | Int32[Array, "..."]) -> UInt32[Array, "N"]:
    """All rounds at once over a list of leaves; see `reference.kth_magnitude`. `k`: int, traced int32, or limbs [2]."""
    return _all_rounds(list(leaves), k if not isinstance(k, int) and k.ndim == 1 else to_limbs(k))


@jax.jit
def _all_rounds(leaves: list[Float[Array, "N ..."]], k: Int32[Array, "2"]) -> UInt32[Array, "N"]:
    def round_(_: Int32[Array, ""], state: Search) -> Search:
        counts = count(leaves[0], state)
        for leaf in leaves[1:]:
            counts = counts + count(leaf, state)
        return narrow(state, counts, k)

    return jax.lax.fori_loop(0, BITS, round_, search(leaves[0].shape[0])).pattern
