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
from jaxtyping import Array, Float, Float32, Int16, Int32

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
)

RHO = Hyperparameter(
    "rho", "share of the candidates that must agree on an entry's sign", default=1.0, low=0.5, high=1.0, low_open=True
)
AVERAGE = Hyperparameter("average", "what a kept entry is the mean of", default="all", choices=("all", "agreeing"))

MOST = 2**15 - 1  # votes are counted in int16


class Votes(NamedTuple):
    """What the candidates so far add up to. Sums are over w_i x_i and |w_i|; only average = "agreeing" needs them apart
    by sign, so a mean of all takes two bytes per vote and four for the sum: no more than two models of float32.
    """

    up: Float32[Array, "..."]
    """Over the positive entries, or over all."""
    down: Float32[Array, "..."]
    """Over the negative entries, or a scalar 0."""
    up_share: Float32[Array, "..."]
    """The weights of the positive entries, or of all (a scalar)."""
    down_share: Float32[Array, "..."]
    ups: Int16[Array, "..."]
    downs: Int16[Array, "..."]
    voters: Int32[Array, ""]
    """How many candidates have a weight."""


def _start(shape: tuple[int, ...], settings: Settings) -> Votes:
    apart = settings["average"] == "agreeing"
    sums, number, none = jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int16), jnp.float32(0)
    own = sums if apart else none
    return Votes(sums, own, own, own, number, number, jnp.int32(0))


def _add(votes: Votes, delta: Float[Array, "..."], weight: Float32[Array, ""], settings: Settings) -> Votes:
    x, strength, none = weight * delta.astype(jnp.float32), jnp.abs(weight), jnp.float32(0)
    if settings["average"] == "agreeing":
        sums = (
            votes.up + jnp.where(x > 0, x, none),
            votes.down + jnp.where(x < 0, x, none),
            votes.up_share + jnp.where(x > 0, strength, none),
            votes.down_share + jnp.where(x < 0, strength, none),
        )
    else:
        sums = (votes.up + x, none, votes.up_share + strength, none)
    voters = votes.voters + (weight != 0).astype(jnp.int32)
    return Votes(*sums, votes.ups + (x > 0).astype(jnp.int16), votes.downs + (x < 0).astype(jnp.int16), voters)


def _needed(voters: Int32[Array, ""], rho: float | Float32[Array, ""]) -> Int32[Array, ""]:
    """ceil(rho n); a product that is an integer up to float32's rounding counts as one."""
    product = jnp.asarray(rho, jnp.float32) * voters.astype(jnp.float32)
    return jnp.ceil(product * jnp.float32(1 - 2e-7)).astype(jnp.int32)


def _finish(votes: Votes, settings: Settings) -> Float32[Array, "..."]:
    none = jnp.float32(0)
    needed = _needed(votes.voters, settings["rho"])
    # More than half agree, so never both; a candidate without weight has no vote.
    up, down = (number.astype(jnp.int32) >= needed for number in (votes.ups, votes.downs))
    if settings["average"] == "agreeing":
        value, share = jnp.where(up, votes.up, votes.down), jnp.where(up, votes.up_share, votes.down_share)
        kept = up | down
    else:
        value, share = votes.up, votes.up_share
        kept = (up & (value > 0)) | (down & (value < 0))
    mean = value / jnp.where(share == 0, jnp.float32(1), share)
    return settings["lambda"] * jnp.where(kept & (votes.voters > 0), mean, none)


def _conflict(votes: Votes, settings: Settings) -> Float32[Array, "..."]:
    agree = jnp.maximum(votes.ups, votes.downs).astype(jnp.int32) == votes.voters
    mean = votes.up / jnp.where(votes.up_share == 0, jnp.float32(1), votes.up_share)
    return settings["lambda"] * jnp.where(agree, jnp.float32(0), mean)


def _combined(finish: Callable[[Votes, Settings], Float32[Array, "..."]]) -> Callable[..., Float32[Array, "..."]]:
    """All candidates at once: the same additions, in one fusion."""

    def combine(
        deltas: Float[Array, "N ..."],
        weights: Float32[Array, "N"],
        state: State,
        draws: Draws | None,
        base: Array | None,
        settings: Settings,
    ) -> Float32[Array, "..."]:
        settings = {"average": "all", **settings}
        votes = _start(deltas.shape[1:], settings)
        for i, delta in enumerate(candidates(deltas)):
            votes = _add(votes, delta, weights[i], settings)
        return finish(votes, settings)

    return combine


def _accumulator(finish: Callable[[Votes, Settings], Float32[Array, "..."]]) -> Accumulator:
    whole = lambda settings: {"average": "all", **settings}  # noqa: E731
    return Accumulator(
        lambda shape, settings: _start(shape, whole(settings)),
        lambda votes, delta, weight, settings: _add(votes, delta, weight, whole(settings)),
        finish,
    )


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
            _combined(_finish),
            Properties(identity=(("lambda", 1.0),), streamable=True),
            hyperparameters=(RHO, AVERAGE, LAMBDA),
            accumulator=_accumulator(_finish),
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
            _combined(_conflict),
            Properties(identity=None, streamable=True),
            hyperparameters=(LAMBDA,),
            accumulator=_accumulator(_conflict),
            check_weights=_refuse,
        ),
    ),
)
