"""Trim, elect and average in XLA: unrolled over candidates, so that everything is one elementwise fusion."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32, UInt32

from unlearnjax_kernels.threshold.xla import magnitude_bits


def elect_mean(
    deltas: Float[Array, "N ..."] | Sequence[Float[Array, "..."]],
    thresholds: UInt32[Array, "N"] | None,
    weights: Float32[Array, "N"],
    votes: Float32[Array, "N"],
    shares: Float32[Array, "N"],
    tie: Int32[Array, ""],
    by_sign: bool,
) -> Float32[Array, "..."]:
    """See `api.elect_mean`."""
    number, none = weights.shape[0], jnp.float32(0)
    xs = [deltas[i].astype(jnp.float32) for i in range(number)]
    if thresholds is not None:
        xs = [jnp.where(magnitude_bits(x) >= thresholds[i], x, none) for i, x in enumerate(xs)]
    voted = [votes[i] * x for i, x in enumerate(xs)]
    # Left to right, as everywhere: a sum's order is part of its value.
    total = sum((jnp.sign(v) if by_sign else v for v in voted[1:]), jnp.sign(voted[0]) if by_sign else voted[0])
    positive = (total > 0) | ((total == 0) & (tie > 0))
    agrees = [jnp.where(positive, v > 0, v < 0) for v in voted]
    values = [jnp.where(agree, weights[i] * x, none) for i, (agree, x) in enumerate(zip(agrees, xs, strict=True))]
    divisors = [jnp.where(agree, shares[i], none) for i, agree in enumerate(agrees)]
    value, divisor = sum(values[1:], values[0]), sum(divisors[1:], divisors[0])
    return value / jnp.where(divisor == 0, jnp.float32(1), divisor)
