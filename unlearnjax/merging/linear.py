"""Linear merging: the weighted sum of the deltas; with default weights their exact mean.

Uniform averaging (model soups, 2203.05482), task arithmetic (2212.04089) and PEFT's `task_arithmetic` are this sum and
differ in what the weights are divided by, which decides the length of the step and so how much is forgotten:

    "paper"  lambda * sum_i w_i delta_i / sum_i w_i     (normalize=False leaves the division out)
    "peft"   lambda * sum_i w_i delta_i                 weights 1 when none are given: N times as long as the mean
    "mergekit" is the sum of the models rather than of their deltas; with normalize=False and weights that do not sum to
             1 it scales the base too, and needs it

`uniform` is the mean, and refuses other weights.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from unlearnjax.merging.protocol import (
    LAMBDA,
    Accumulator,
    Draws,
    Hyperparameter,
    MergeMethod,
    Properties,
    Rule,
    Settings,
    State,
    candidates,
    total,
)

NORMALIZE = Hyperparameter("normalize", "divide by the sum of the weights", default=True)


def _divide(value: Float32[Array, "..."], weight_sum: Float32[Array, ""], settings: Settings) -> Float32[Array, "..."]:
    if settings.get("normalize", False):
        # Concrete weights that cancel were refused before; for traced ones this leaves the plain sum.
        value = value / jnp.where(weight_sum == 0, jnp.float32(1), weight_sum)
    return settings["lambda"] * value


def _combine(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: State,
    draws: Draws,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    weighted = total([weights[i] * delta for i, delta in enumerate(candidates(deltas))])
    return _divide(weighted, jnp.sum(weights), settings)


def _start(shape: tuple[int, ...], settings: Settings) -> tuple[Float32[Array, "..."], Float32[Array, ""]]:
    return jnp.zeros(shape, jnp.float32), jnp.float32(0)


def _add(
    carry: tuple[Float32[Array, "..."], Float32[Array, ""]],
    delta: Float[Array, "..."],
    weight: Float32[Array, ""],
    settings: Settings,
) -> tuple[Float32[Array, "..."], Float32[Array, ""]]:
    value, weight_sum = carry
    return value + weight * delta.astype(jnp.float32), weight_sum + weight


def _finish(carry: tuple[Float32[Array, "..."], Float32[Array, ""]], settings: Settings) -> Float32[Array, "..."]:
    return _divide(*carry, settings)


def _check_weights(weights: np.ndarray, settings: Settings) -> str | None:
    if settings.get("normalize", False) and weights.sum() == 0:
        return "they sum to 0 and cannot be normalised; pass normalize=False"
    return None


def _combine_models(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: State,
    draws: Draws,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    assert base is not None  # needs_base
    weighted = total([weights[i] * delta for i, delta in enumerate(candidates(deltas))])
    if settings["normalize"]:
        return settings["lambda"] * _divide(weighted, jnp.sum(weights), {"normalize": True, "lambda": jnp.float32(1)})
    return settings["lambda"] * (weighted + (jnp.sum(weights) - 1) * base.astype(jnp.float32))


def _mean(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: State,
    draws: Draws,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    return _combine(deltas, weights, state, draws, base, {**settings, "normalize": True})


def _finish_mean(carry: tuple[Float32[Array, "..."], Float32[Array, ""]], settings: Settings) -> Float32[Array, "..."]:
    return _divide(*carry, {**settings, "normalize": True})


def only_equal(weights: np.ndarray, settings: Settings) -> str | None:
    """For methods that have no weights."""
    if np.ptp(weights):
        return "they must be equal; merge linear takes others"
    return "all of them are 0" if not weights.any() else None


_ACCUMULATOR = Accumulator(_start, _add, _finish)

LINEAR = MergeMethod(
    "linear",
    "weighted sum of the deltas (default: their exact mean)",
    (
        Rule(
            "paper",
            "model soups 2203.05482, task arithmetic 2212.04089",
            _combine,
            Properties(identity=(("lambda", 1.0),), streamable=True),
            hyperparameters=(NORMALIZE, LAMBDA),
            accumulator=_ACCUMULATOR._replace(needs_weights=lambda settings: not settings["normalize"]),
            check_weights=_check_weights,
        ),
        Rule(
            "peft",
            "PEFT 0.21 task_arithmetic; combination_type linear in space factors",
            _combine,
            Properties(identity=(("lambda", 1.0),), streamable=True),
            hyperparameters=(LAMBDA,),
            spaces=("delta", "core", "factors"),
            default_weight="one",
            accumulator=_ACCUMULATOR,
        ),
        Rule(
            "mergekit",
            "mergekit 0.1.4 merge_method linear",
            _combine_models,
            Properties(identity=(("normalize", True), ("lambda", 1.0)), zero_weight_is_absence=True, negation="always"),
            hyperparameters=(NORMALIZE, LAMBDA),
            default_weight="one",
            check_weights=_check_weights,
            needs_base=True,
            spaces=("delta",),
        ),
    ),
)
UNIFORM = MergeMethod(
    "uniform",
    "mean of the deltas",
    (
        Rule(
            "paper",
            "model soups 2203.05482, uniform",
            _mean,
            Properties(identity=(("lambda", 1.0),), weighted=False, streamable=True),
            hyperparameters=(LAMBDA,),
            accumulator=_ACCUMULATOR._replace(finish=_finish_mean),
            check_weights=only_equal,
        ),
    ),
)
