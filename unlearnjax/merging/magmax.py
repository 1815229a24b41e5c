"""MagMax (2407.06322): of each entry take the candidate whose (weighted) delta is largest in magnitude.

As in the authors' code a later candidate wins over an equal one. Their result is scaled by lambda = 0.5; here lambda
is 1 unless given.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from unlearnjax.merging.protocol import (
    LAMBDA,
    Accumulator,
    Draws,
    MergeMethod,
    Properties,
    Rule,
    Settings,
    State,
    candidates,
)


def _start(shape: tuple[int, ...], settings: Settings) -> Float32[Array, "..."]:
    return jnp.zeros(shape, jnp.float32)


def _add(
    largest: Float32[Array, "..."], delta: Float[Array, "..."], weight: Float32[Array, ""], settings: Settings
) -> Float32[Array, "..."]:
    x = weight * delta.astype(jnp.float32)
    # A weight of 0 must not turn the zeros of the others into its own -0.
    return jnp.where((jnp.abs(x) >= jnp.abs(largest)) & (weight != 0), x, largest)


def _finish(largest: Float32[Array, "..."], settings: Settings) -> Float32[Array, "..."]:
    return settings["lambda"] * largest


def _combine(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: State,
    draws: Draws,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    largest = _start(deltas.shape[1:], settings)
    for i, delta in enumerate(candidates(deltas)):
        largest = _add(largest, delta, weights[i], settings)
    return _finish(largest, settings)


def _check_weights(weights: np.ndarray, settings: Settings) -> str | None:
    return "all of them are 0" if not weights.any() else None


MAGMAX = MergeMethod(
    "magmax",
    "of each entry the candidate with the largest magnitude",
    (
        Rule(
            "paper",
            "MagMax 2407.06322, the authors' merge_max_abs",
            _combine,
            Properties(identity=(("lambda", 1.0),), streamable=True),
            hyperparameters=(LAMBDA,),
            default_weight="one",
            accumulator=Accumulator(_start, _add, _finish),
            check_weights=_check_weights,
        ),
    ),
)
