"""How near an unlearned classifier is to one that was retrained without the forget set: the numbers of SalUn's tables.

All are percentages, as in the papers (2310.12508, 2410.05583).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from unlearnjax.errors import UserError


class Forgetting(NamedTuple):
    """Accuracy on the retain, forget and test set, and MIA-efficacy: the share of forget samples that an attack takes
    for ones the model has not seen. What is right is what the retrained model has."""

    retain: float
    forget: float
    test: float
    mia: float


def average_gap(model: Forgetting, retrained: Forgetting) -> float:
    """Avg. Gap: the mean of the four absolute differences from the retrained model; 0 is best."""
    return float(np.mean(np.abs(np.subtract(model, retrained))))


def accuracy(logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]) -> float:
    """The share of rows whose largest logit is their label's, in percent (of equal ones the first counts).

    Raises:
      UserError: no rows.
    """
    if not len(labels):
        raise UserError("accuracy: there are no rows")
    return float(100 * np.mean(np.argmax(logits, axis=1) == labels))


def confidence(logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """The softmax probability of each row's own label, in double precision."""
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(axis=1, keepdims=True)
    own = np.take_along_axis(wide, np.asarray(labels)[:, None].astype(np.int64), axis=1)[:, 0]
    return np.exp(own) / np.exp(wide).sum(axis=1)


def mia_efficacy(retain: Sequence[float], test: Sequence[float], forget: Sequence[float]) -> float:
    """SalUn's MIA-efficacy on confidences: an SVC (RBF, C = 3, gamma 1) learns to tell as many retain samples, the
    first in their order, from all test samples; the share of forget samples that it takes for test ones, in percent.

    Args:
      retain, test, forget: each sample's `confidence` in its true label.

    Raises:
      UserError: an empty set, or fewer retain than test samples.
    """
    from sklearn.svm import SVC

    members, others, asked = (np.asarray(x, np.float64).reshape(-1, 1) for x in (retain, test, forget))
    for name, x in (("retain", members), ("test", others), ("forget", asked)):
        if not x.size:
            raise UserError(f"mia_efficacy: the {name} set is empty")
    if len(members) < len(others):
        raise UserError(
            f"mia_efficacy: {len(members)} retain samples for {len(others)} of the test set; it needs as many"
        )
    seen = np.concatenate([members[: len(others)], others])
    attack = SVC(C=3, gamma="auto", kernel="rbf").fit(seen, np.repeat([1, 0], len(others)))
    return float(100 * (1 - attack.predict(asked).mean()))
