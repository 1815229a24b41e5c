"""Terms that hold the model in place on the retain set: GDR and KLR (named as in ZJUKLAB, 2503.21088, section 3).

`klr_all` is KLR as ZJUKLAB's code computes it: over the prompt's positions too, divided by rows x `width`, the width
that the code pads every row to. The code counts padding as well, whose logits hang on the attention implementation;
here it is left out and the divisor kept.
"""

import jax.numpy as jnp
from jaxtyping import Array

from unlearnjax.data.tokens import Side
from unlearnjax.objectives.protocol import Scores, Term, token_mean
from unlearnjax.training.hyperparameters import Hyperparameters


def gradient_descent(scores: Scores, side: Side, h: Hyperparameters) -> Array:
    """Cross-entropy of the side's answers, mean over tokens."""
    return token_mean(-scores.log_probability, side)


def divergence(scores: Scores, side: Side, h: Hyperparameters) -> Array:
    """KL(base || model) at each answer token of the retain set, mean over tokens.

    KL = sum_v q_v log q_v - h . E_q[w] + Z(h): exact while the output embedding is frozen, and it never forms q or p.
    """
    assert side.expectation is not None and side.negative_entropy is not None
    expected_logit = jnp.sum(scores.hidden.astype(jnp.float32) * side.expectation, axis=-1)
    return token_mean(side.negative_entropy - expected_logit + scores.logsumexp, side)


def divergence_at_all_positions(scores: Scores, side: Side, h: Hyperparameters) -> Array:
    """KL(base || model) summed over all positions of a micro-batch's rows, over rows x width."""
    every = side.every
    assert every is not None and scores.every_hidden is not None and scores.every_logsumexp is not None
    expected_logit = jnp.sum(scores.every_hidden.astype(jnp.float32) * every.expectation, axis=-1)
    kl = jnp.where(every.mask, every.negative_entropy - expected_logit + scores.every_logsumexp, 0.0)
    rows = jnp.maximum(jnp.sum(side.assign, axis=1), 1.0)
    return side.assign @ jnp.sum(kl, axis=1) / (rows * h.term_parameters["klr_all"]["width"])


gdr = Term("gdr", "retain", frozenset(), gradient_descent)
klr = Term("klr", "retain", frozenset({"distribution"}), divergence)
klr_all = Term(
    "klr_all", "retain", frozenset({"every"}), divergence_at_all_positions, frozenset({"every"}), {"width": 256.0}
)
