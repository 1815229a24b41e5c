"""Putting sparse deltas together: weighted sums, and the elections that leave out the entries of the losing sign.

Each takes the candidates, as an array [N, ...] or N arrays of one shape, and weights [N].
"""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, UInt32
from unlearnjax_kernels.ties import elect_mean

from unlearnjax.merging.protocol import Hyperparameter, total

Deltas = Sequence[Float32[Array, "..."]] | Float[Array, "N ..."]

MAJORITY = Hyperparameter(
    "majority_sign_method",
    "elect by the sum of the values or by the number of signs",
    default="total",
    choices=("total", "frequency"),
)


def weighted_sum(deltas: Sequence[Float32[Array, "..."]], weights: Float32[Array, "N"]) -> Float32[Array, "..."]:
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


def paper(
    deltas: Deltas, weights: Float32[Array, "N"], majority: Array, thresholds: UInt32[Array, "N"] | None = None
) -> Float32[Array, "..."]:
    """The mean of the entries that agree with the sign of the weighted sum; where that is 0, with `majority`'s.

    Only the weights' ratios matter, and a negative one enters its candidate negated.
    """
    parts = relative(weights)
    return elect_mean(deltas, thresholds, parts, parts, jnp.abs(parts), majority)


def peft(deltas: Deltas, weights: Float32[Array, "N"], majority_sign_method: str) -> Float32[Array, "..."]:
    """PEFT's disjoint_merge: an unweighted vote in which 0 is plus, over the number of agreeing candidates."""
    ones = jnp.ones_like(weights)
    return elect_mean(deltas, None, weights, ones, ones, by_sign=majority_sign_method == "frequency")


def mergekit(deltas: Deltas, weights: Float32[Array, "N"], normalize: bool) -> Float32[Array, "..."]:
    """mergekit's consensus "sum": a weighted vote in which 0 is plus, and the agreeing weights as divisor."""
    # Shares of 0 divide by nothing.
    return elect_mean(deltas, None, weights, weights, weights if normalize else jnp.zeros_like(weights))
