"""Sign consensus as the rest of the code calls it: all candidates at once, or one at a time.

votes = start(shape, agreeing)
votes = add(votes, delta, weight, agreeing)   for each candidate
mean  = finish(votes, needed, agreeing, conflict)
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32

from unlearnjax_kernels.consensus import pallas, reference, xla
from unlearnjax_kernels.consensus.xla import Votes, finish, start

Implementation = Literal["xla", "pallas", "pallas_interpret", "reference"]
__all__ = ["Implementation", "Votes", "add", "consensus", "finish", "start"]


def consensus(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    needed: Int32[Array, ""] | int,
    *,
    agreeing: bool = False,
    conflict: bool = False,
    implementation: Implementation | None = None,
) -> Float32[Array, "..."]:
    """The mean of the entries on whose sign enough candidates agree (NegMerge 2410.05583, section 3.3), 0 elsewhere.

    An entry is kept where at least `needed` of the w_i x_i are positive, or at least as many negative. Its value is
    sum_i w_i x_i / sum_i |w_i|, and 0 where that has the losing sign; `agreeing`: the same over the candidates of the
    winning sign alone. `conflict`: the mean of all where too few agree (table 3), 0 where enough do.

    Args:
      deltas: [N, ...], any floating dtype.
      weights: w.
      needed: more than half of the candidates whose weight is not 0; an int or int32 [] (traced or not).
      implementation: None is "xla" everywhere: one fusion that reads each candidate once. "pallas" is the TPU kernel
        (no one has timed it against XLA's fusion yet); "reference" needs concrete arrays.

    Returns:
      float32 [...].

    Raises:
      ValueError: an unknown implementation; `agreeing` and `conflict` together.
    """
    if agreeing and conflict:
        raise ValueError("where the candidates are in conflict there is no winning sign: give agreeing or conflict")
    if implementation == "reference":
        found = reference.consensus(np.asarray(deltas), np.asarray(weights), int(needed), agreeing, conflict)
        return jnp.asarray(found)
    limit = jnp.asarray(needed, jnp.int32)
    if implementation in (None, "xla"):
        return xla.consensus(deltas, weights, limit, agreeing, conflict)
    if implementation in ("pallas", "pallas_interpret"):
        return pallas.consensus(deltas, weights, limit, agreeing, conflict, implementation == "pallas_interpret")
    raise ValueError(f"unknown implementation {implementation!r}; valid: xla, pallas, pallas_interpret, reference")


def add(
    votes: Votes,
    delta: Float[Array, "..."],
    weight: Float32[Array, ""],
    *,
    agreeing: bool = False,
    implementation: Implementation | None = None,
) -> Votes:
    """The votes with one more candidate's.

    Raises:
      ValueError: an implementation that there is not: "pallas" only counts for a mean of all.
    """
    if implementation in (None, "xla"):
        return xla.add(votes, delta, weight, agreeing)
    if implementation in ("pallas", "pallas_interpret") and not agreeing:
        return pallas.add(votes, delta, weight, implementation == "pallas_interpret")
    raise ValueError(f"no implementation {implementation!r} of this; valid: xla, and for a mean of all pallas")
