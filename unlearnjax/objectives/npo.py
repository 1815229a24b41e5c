"""Negative preference optimisation (Zhang et al., 2404.05868, eq. 3):

L = (2 / beta) E log(1 + (p(y|x) / p_base(y|x))^beta) = -(2 / beta) E log sigmoid(beta (nll - nll_base)),

the log-likelihoods summed over the answer's tokens, the mean over rows.
"""

import jax
from jaxtyping import Array

from unlearnjax.data.tokens import Side
from unlearnjax.objectives.protocol import Scores, Term, row_mean, row_sums
from unlearnjax.training.hyperparameters import Hyperparameters


def loss(scores: Scores, side: Side, h: Hyperparameters) -> Array:
    assert side.nll is not None
    risen = -row_sums(scores.log_probability, side) - side.nll
    return row_mean(-(2.0 / h.beta) * jax.nn.log_sigmoid(h.beta * risen), side)


npo = Term("npo", "forget", frozenset({"nll"}), loss)
