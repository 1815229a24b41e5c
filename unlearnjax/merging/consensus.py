"""NegMerge (2410.05583): keep the entries on whose sign the candidates agree.

With n candidates whose weight is not 0, an entry is kept where at least ceil(rho n) of the w_i x_i are positive, or at
least as many negative (rho = 1: all of them, the paper's unanimity; one exact zero then drops the entry, and -0 is a
zero). There are no other thresholds. The value of a kept entry is

    average = "all"       lambda * sum_i w_i x_i / sum_i |w_i|, and 0 where that sum has the losing sign
    average = "agreeing"  the same over the candidates of the winning sign alone

which are the same thing under unanimity. Weights are relative (the default is the paper's plain mean over all N); a
negative one enters its candidate negated. "conflict_only" is the paper's ablation (table 3): the mean of all where the
candidates do not agree.

Unlearning subtracts the result: theta_0 - lambda * merged, for deltas of fine-tunes on the forget set.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32
from unlearnjax_kernels.consensus import api as kernel

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
)

RHO = Hyperparameter(
    "rho", "share of the candidates that must agree on an entry's sign", default=1.0, low=0.5, high=1.0, low_open=True
)
AVERAGE = Hyperparameter("average", "what a kept entry is the mean of", default="all", choices=("all", "agreeing"))

MOST = 2**15 - 1  # votes are counted in int16


class Carry(NamedTuple):
    """The votes so far, and how many candidates with a weight cast them."""

    votes: kernel.Votes
    voters: Int32[Array, ""]


def _needed(voters: Int32[Array, ""], rho: float | Float32[Array, ""]) -> Int32[Array, ""]:
    """ceil(rho n); a product that is an integer up to float32's rounding counts as one. Where nobody votes nothing is
    kept."""
    product = jnp.asarray(rho, jnp.float32) * voters.astype(jnp.float32)
    return jnp.maximum(jnp.ceil(product * jnp.float32(1 - 2e-7)).astype(jnp.int32), jnp.int32(1))


def _agreeing(settings: Settings, conflict: bool) -> bool:
    """Whether the mean is over the candidates of the winning sign; conflict-only has no such setting, and no rho."""
    return not conflict and settings["average"] == "agreeing"


def _combined(conflict: bool) -> Callable[..., Float32[Array, "..."]]:
    def combine(
        deltas: Float[Array, "N ..."],
        weights: Float32[Array, "N"],
        state: State,
        draws: Draws,
        base: Array | None,
        settings: Settings,
    ) -> Float32[Array, "..."]:
        agreeing = _agreeing(settings, conflict)
        needed = _needed(jnp.sum(weights != 0, dtype=jnp.int32), settings.get("rho", 1.0))
        return settings["lambda"] * kernel.consensus(deltas, weights, needed, agreeing=agreeing, conflict=conflict)

    return combine


def _accumulator(conflict: bool) -> Accumulator:
    """One candidate at a time: the same additions."""

    def start(shape: tuple[int, ...], settings: Settings) -> Carry:
        return Carry(kernel.start(shape, _agreeing(settings, conflict)), jnp.int32(0))

    def add(carry: Carry, delta: Float[Array, "..."], weight: Float32[Array, ""], settings: Settings) -> Carry:
        votes = kernel.add(carry.votes, delta, weight, agreeing=_agreeing(settings, conflict))
        return Carry(votes, carry.voters + (weight != 0).astype(jnp.int32))

    def finish(carry: Carry, settings: Settings) -> Float32[Array, "..."]:
        needed = _needed(carry.voters, settings.get("rho", 1.0))
        return settings["lambda"] * kernel.finish(carry.votes, needed, _agreeing(settings, conflict), conflict)

    return Accumulator(start, add, finish)


def _refuse(weights: np.ndarray, settings: Settings) -> str | None:
    if not weights.any():
        return "all of them are 0"
    return f"more than {MOST} candidates" if len(weights) > MOST else None


CONSENSUS = MergeMethod(
    "consensus",
    "keep the entries on whose sign the candidates agree, average them",
    (
        Rule(
            "paper",
            "NegMerge 2410.05583; rho < 1 as in torchunlearn",
            _combined(conflict=False),
            Properties(identity=(("lambda", 1.0),), streamable=True),
            hyperparameters=(RHO, AVERAGE, LAMBDA),
            accumulator=_accumulator(conflict=False),
            check_weights=_refuse,
        ),
    ),
)
CONFLICT_ONLY = MergeMethod(
    "conflict_only",
    "average the entries on whose sign the candidates do not agree",
    (
        Rule(
            "paper",
            "NegMerge 2410.05583, table 3",
            _combined(conflict=True),
            Properties(identity=None, streamable=True),
            hyperparameters=(LAMBDA,),
            accumulator=_accumulator(conflict=True),
            check_weights=_refuse,
        ),
    ),
)
