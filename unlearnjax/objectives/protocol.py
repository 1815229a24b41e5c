"""What a loss term is: a pure function of one candidate's token scores on one side of its step."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from unlearnjax.data.tokens import Side
from unlearnjax.training.hyperparameters import Hyperparameters


class Scores(NamedTuple):
    """The model's answer tokens on one side, computed once and shared by the side's terms.

    `hidden` are the final hidden states that predict the answers; log p(target) = hidden . head[target] - logsumexp.
    The rest is None unless a term of the side reads it: `others`, the output embedding's mean under the model's own
    distribution without the target, a constant; `every_*`, the same as `hidden` and `logsumexp` at all positions;
    `margin`, the largest logit less the mean logit; `layer_hidden`, one layer's output at all positions; `beside`, the
    scores and the data of the other side that a term reads. Where all terms read a layer and nothing else, the first
    three are zeros, not computed.
    """

    hidden: Float[Array, "rows answers hidden"]
    log_probability: Float[Array, "rows answers"]
    logsumexp: Float[Array, "rows answers"]
    others: Float[Array, "rows answers hidden"] | None = None
    every_hidden: Float[Array, "rows width hidden"] | None = None
    every_logsumexp: Float[Array, "rows width"] | None = None
    margin: Float[Array, "rows answers"] | None = None
    layer_hidden: Float[Array, "rows width hidden"] | None = None
    beside: "tuple[Scores, Side] | None" = None


class Adaptive(NamedTuple):
    """A term's weight that depends on what its losses were.

    `names`: of what a candidate carries from step to step for the term, scalars that start at 0: its memory.
    `remember(losses [micro], side, epoch, memory) -> memory`. `weigh(losses, memory, epoch, h) -> [micro]`: by what the
    losses are multiplied. No gradient goes through either.
    """

    names: tuple[str, ...]
    remember: Callable[[Array, Side, Array, Mapping[str, Array]], dict[str, Array]]
    weigh: Callable[[Array, Mapping[str, Array], Array, Hyperparameters], Array]


class Term(NamedTuple):
    """A term of the objective.

    `loss(scores, side, h) -> [micro]`: the loss of each micro-batch in the step (0 where there is none); the objective
      weighs them so that an update sees the mean over its micro-batches.
    `side`: the rows it reads: `forget`, `idk` (the forget prompts with answers to prefer), `retain`, or `pool`, where
      micro-batches mix forget and retain rows.
    `beside`: another side it reads; `needs` and `reads` hold for both.
    `adaptive`: how its weight follows its losses.
    `needs`: what it asks of the frozen base, computed once before training: `nll` (per row), `distribution` (E_q[w] and
      the negative entropy per answer token), `others` (per answer token, the target left out), `every` (as
      `distribution`, for every token), `layer` (one layer's output, for every token).
    `reads`: what it asks of the model beyond its answer tokens' scores: `others`, `every`, `margin`, `layer`.
    `parameters`: its own hyperparameters with their defaults; they may differ between candidates. With a `multiplier`
      (and a `rate`) among them the term is a constraint, loss <= 0: its weight is scaled by a multiplier that starts
      there and climbs by rate * loss after each update, never below 0.
    """

    name: str
    side: str
    needs: frozenset[str]
    loss: Callable[[Scores, Side, Hyperparameters], Float[Array, " micro"]]
    reads: frozenset[str] = frozenset()
    parameters: Mapping[str, float] = MappingProxyType({})
    beside: str | None = None
    adaptive: Adaptive | None = None


def tokens_of(side: Side) -> Float[Array, " micro"]:
    """How many answer tokens each micro-batch has, at least 1."""
    return jnp.maximum(side.assign @ jnp.sum(side.mask.astype(jnp.float32), axis=1), 1.0)


def row_sums(values: Float[Array, "rows answers"], side: Side) -> Float[Array, " rows"]:
    """Sum over each row's answer tokens."""
    return jnp.sum(jnp.where(side.mask, values, 0.0), axis=1)


def token_mean(values: Float[Array, "rows answers"], side: Side) -> Float[Array, " micro"]:
    """Mean over all answer tokens of each micro-batch."""
    return side.assign @ row_sums(values, side) / tokens_of(side)


def row_mean(values: Float[Array, " rows"], side: Side) -> Float[Array, " micro"]:
    """Mean over the rows of each micro-batch."""
    return side.assign @ values / jnp.maximum(jnp.sum(side.assign, axis=1), 1.0)
