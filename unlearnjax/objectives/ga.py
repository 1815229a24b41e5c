"""Cross-entropy of the forget answers, mean over tokens: climbed (`ga`) or descended (`forget_ce`).

Gradient ascent unlearns directly (Jang et al., 2210.01504, eq. 1). Descent learns the forget set still better: it gives
the task vectors that are merged and then subtracted (Ilharco et al., 2212.04089, section 3; NegMerge, 2410.05583).
"""

from jaxtyping import Array

from unlearnjax.data.tokens import Side
from unlearnjax.objectives.protocol import Scores, Term, token_mean
from unlearnjax.objectives.retain import gradient_descent
from unlearnjax.training.hyperparameters import Hyperparameters


def loss(scores: Scores, side: Side, h: Hyperparameters) -> Array:
    return token_mean(scores.log_probability, side)


ga = Term("ga", "forget", frozenset(), loss)
forget_ce = Term("forget_ce", "forget", frozenset(), gradient_descent)
