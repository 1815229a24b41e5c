"""The general-knowledge probe: neutral questions that neither set holds, answered before and after."""

from collections.abc import Sequence
from typing import NamedTuple

from unlearnjax.errors import UserError
from unlearnjax.evaluation.exact import exact_match
from unlearnjax.evaluation.intervals import wilson_interval


class Probe(NamedTuple):
    """Share of right answers, its 95% Wilson interval, and the number of questions."""

    accuracy: float
    interval: tuple[float, float]
    questions: int


def probe(golds: Sequence[str], generations: Sequence[str]) -> Probe:
    """Accuracy by the official exact match: the whole generation must be the answer.

    Raises:
      UserError: no questions, or not one generation per question.
    """
    if not golds or len(golds) != len(generations):
        raise UserError(f"probe: {len(generations)} generations for {len(golds)} questions; give one for each")
    right = sum(exact_match(gold, generated) for gold, generated in zip(golds, generations))
    return Probe(right / len(golds), wilson_interval(right, len(golds)), len(golds))
