"""Terms that hold the model in place on the retain set: GDR and KLR (named as in ZJUKLAB, 2503.21088, section 3)."""

import jax.numpy as jnp
from jaxtyping import Array

from unlearnjax.data.tokens import Side
from unlearnjax.objectives.protocol import Scores, Term, token_mean
from unlearnjax.training.hyperparameters import Hyperparameters


def gradient_descent(scores: Scores, side: Side, h: Hyperparameters) -> Array:
    """Cross-entropy of the retain answers, mean over tokens."""
    return token_mean(-scores.log_probability, side)


def divergence(scores: Scores, side: Side, h: Hyperparameters) -> Array:
    """KL(base || model) at each answer token of the retain set, mean over tokens.

    KL = sum_v q_v log q_v - h . E_q[w] + Z(h): exact while the output embedding is frozen, and it never forms q or p.
    """
    assert side.expectation is not None and side.negative_entropy is not None
    expected_logit = jnp.sum(scores.hidden.astype(jnp.float32) * side.expectation, axis=-1)
    return token_mean(side.negative_entropy - expected_logit + scores.logsumexp, side)


gdr = Term("gdr", "retain", frozenset(), gradient_descent)
klr = Term("klr", "retain", frozenset({"distribution"}), divergence)
