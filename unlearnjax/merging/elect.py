"""Putting sparse deltas together: weighted sums, and the elections that leave out the entries of the losing sign.

Each takes the candidates as a list of float32 arrays of one shape, and weights [N].
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from unlearnjax.merging.protocol import Hyperparameter, total

Deltas = Sequence[Float32[Array, "..."]]

MAJORITY = Hyperparameter(
    "majority_sign_method",
    "elect by the sum of the values or by the number of signs",
    default="total",
    choices=("total", "frequency"),
)


def weighted_sum(deltas: Deltas, weights: Float32[Array, "N"]) -> Float32[Array, "..."]:
    """sum_i w_i x_i"""
    return total([weights[i] * delta for i, delta in enumerate(deltas)])


def divided(value: Float32[Array, "..."], weights: Float32[Array, "N"], least: float = 0.0) -> Float32[Array, "..."]:
    """value / sum_i w_i; undivided where that sum is `least` or less in magnitude, which only traced weights can be."""
    weight_sum = jnp.sum(weights)
    return value / jnp.where(jnp.abs(weight_sum) <= least, jnp.float32(1), weight_sum)


def relative(weights: Float32[Array, "N"]) -> Float32[Array, "N"]:
    """Weights over the largest: equal ones become exactly 1, so that opposite entries still cancel exactly."""
    largest = jnp.max(jnp.abs(weights))
    return weights / jnp.where(largest == 0, jnp.float32(1), largest)


def agreeing(
    deltas: Deltas,
    weights: Float32[Array, "N"],
    positive: Bool[Array, "..."],
    shares: Float32[Array, "N"] | None,
) -> Float32[Array, "..."]:
    """sum w_i x_i over the entries whose weighted sign is the elected one, over their summed shares.

    Args:
        positive: whether the elected sign is plus.
        shares: what each agreeing candidate adds to the divisor; None divides by nothing.
    """
    weighted = [weights[i] * delta for i, delta in enumerate(deltas)]
    agrees = [jnp.where(positive, value > 0, value < 0) for value in weighted]
    value = total([jnp.where(keep, x, jnp.float32(0)) for keep, x in zip(agrees, weighted, strict=True)])
    if shares is None:
        return value
    divisor = total([jnp.where(keep, shares[i], jnp.float32(0)) for i, keep in enumerate(agrees)])
    return value / jnp.where(divisor == 0, jnp.float32(1), divisor)


def paper(deltas: Deltas, weights: Float32[Array, "N"], majority: Array) -> Float32[Array, "..."]:
    """The mean of the entries that agree with the sign of the weighted sum; where that is 0, with `majority`'s.

    Only the weights' ratios matter, and a negative one enters its candidate negated.
    """
    parts = relative(weights)
    elected = weighted_sum(deltas, parts)
    positive = (elected > 0) | ((elected == 0) & (majority > 0))
    return agreeing(deltas, parts, positive, jnp.abs(parts))


def peft(deltas: Deltas, weights: Float32[Array, "N"], majority_sign_method: str) -> Float32[Array, "..."]:
    """PEFT's disjoint_merge: an unweighted vote in which 0 is plus, over the number of agreeing candidates."""
    votes = [jnp.sign(delta) for delta in deltas] if majority_sign_method == "frequency" else list(deltas)
    positive = total(votes) >= 0
    agrees = [jnp.where(positive, delta > 0, delta < 0) for delta in deltas]
    value = total([jnp.where(keep, weights[i] * deltas[i], jnp.float32(0)) for i, keep in enumerate(agrees)])
    number = total([keep.astype(jnp.float32) for keep in agrees])
    return value / jnp.maximum(number, jnp.float32(1))


def mergekit(deltas: Deltas, weights: Float32[Array, "N"], normalize: bool) -> Float32[Array, "..."]:
    """mergekit's consensus "sum": a weighted vote in which 0 is plus, and the agreeing weights as divisor."""
    positive = weighted_sum(deltas, weights) >= 0
    return agreeing(deltas, weights, positive, weights if normalize else None)
