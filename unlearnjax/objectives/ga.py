"""Gradient ascent on the forget set: minus the cross-entropy of its answers (Jang et al., 2210.01504, eq. 1)."""

from jaxtyping import Array

from unlearnjax.data.tokens import Side
from unlearnjax.objectives.protocol import Scores, Term, token_mean
from unlearnjax.training.hyperparameters import Hyperparameters


def loss(scores: Scores, side: Side, h: Hyperparameters) -> Array:
    return token_mean(scores.log_probability, side)


ga = Term("ga", "forget", frozenset(), loss)
