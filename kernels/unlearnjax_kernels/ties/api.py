"""Trim, elect and average as the rest of the code calls it."""

from collections.abc import Sequence
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, UInt32

from unlearnjax_kernels.ties import pallas, reference, xla

Implementation = Literal["xla", "pallas", "pallas_interpret", "reference"]


def elect_mean(
    deltas: Float[Array, "N ..."] | Sequence[Float[Array, "..."]],
    thresholds: UInt32[Array, "N"] | None,
    weights: Float32[Array, "N"],
    votes: Float32[Array, "N"],
    shares: Float32[Array, "N"],
    tie: Int32[Array, ""] | int = 1,
    *,
    by_sign: bool = False,
    implementation: Implementation | None = None,
) -> Float32[Array, "..."]:
    """The disjoint mean of TIES (2306.01708, section 3), with what its published codes do differently as arguments.

    With x_i the delta of candidate i where its magnitude reaches the threshold, else 0: the elected sign is that of
    sum_i v_i x_i (`by_sign`: of sum_i sign(v_i x_i)), or `tie`'s where that is 0. A candidate agrees where v_i x_i has
    the elected sign. The result is sum w_i x_i / sum s_i over those that agree; undivided where the latter is 0.

    Args:
      deltas: [N, ...], any floating dtype; or N arrays of one shape.
      thresholds: float32 bit patterns, as `threshold.kth_magnitude` gives them; None: nothing is trimmed.
      weights, votes, shares: w, v and s.
      tie: 1 or -1; an int, or int32 [] (traced or not). With 0, no sign is elected: as -1.
      implementation: None is "xla" everywhere: one fusion that reads each candidate once. "pallas" is the TPU kernel
        for arrays [N, ...] (no one has timed it against XLA's fusion yet); "reference" needs concrete arrays.

    Returns:
      float32 [...].

    Raises:
      ValueError: an unknown implementation.
    """
    if implementation in (None, "xla"):
        return xla.elect_mean(deltas, thresholds, weights, votes, shares, jnp.asarray(tie, jnp.int32), by_sign)
    stacked = deltas if not isinstance(deltas, Sequence) else jnp.stack(list(deltas))
    limits = jnp.zeros(len(weights), jnp.uint32) if thresholds is None else thresholds
    if implementation == "reference":
        x, t, w, v, s = (np.asarray(part) for part in (stacked, limits, weights, votes, shares))
        return jnp.asarray(reference.elect_mean(x, t, w, v, s, int(tie), by_sign))
    if implementation in ("pallas", "pallas_interpret"):
        interpret = implementation == "pallas_interpret"
        sign = jnp.asarray(tie, jnp.int32)
        return pallas.elect_mean(stacked, limits, weights, votes, shares, sign, by_sign, interpret)
    raise ValueError(f"unknown implementation {implementation!r}; valid: xla, pallas, pallas_interpret, reference")
