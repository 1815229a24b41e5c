"""Scores of edited image models, and the rules that choose lambda by them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unlearnjax.evaluation.forgetting import Forgetting, average_gap, mia_efficacy
from unlearnjax.evaluation.images import Scored
from unlearnjax.merging import search

MIA_ROWS = 1000  # of members and of others, while lambda is searched: the attack's cost is quadratic in them


class Scores(NamedTuple):
    """In percent. `test` and `mia` are None where there is no test set beside forget and retain (CLIP)."""

    retain: float
    forget: float
    test: float | None
    mia: float | None


class Judge(NamedTuple):
    """The rule: to keep the share `keep` of `base_retain`, the start's retain accuracy, or to be close to `target`, the
    retrained model's scores; one of the last two is None."""

    keep: float
    base_retain: float | None
    target: Scores | None

    @property
    def floor(self) -> float | None:
        """The retain accuracy below which nothing is chosen."""
        return None if self.base_retain is None else self.keep * self.base_retain


def gap(scores: Scores, target: Scores) -> float:
    """Avg. Gap to the target, over what both have."""
    both = [(a, b) for a, b in zip(scores, target, strict=True) if a is not None and b is not None]
    if len(both) == len(Forgetting._fields):
        return average_gap(Forgetting(*scores), Forgetting(*target))  # type: ignore[arg-type]
    return float(np.mean([abs(a - b) for a, b in both]))


def scores_of(
    retain: Scored, forget: Scored, test: Scored | None, place: tuple[int, ...] = (), mia_rows: int | None = None
) -> Scores:
    """The numbers of one point of a sweep (`place`: its direction and lambda).

    MIA-efficacy takes the first rows of `retain` as members, as many as `test` has.

    Args:
      mia_rows: at most so many of either; None: all.
    """
    share = lambda scored: float(100 * scored.correct[place].mean())  # noqa: E731
    if test is None:
        return Scores(share(retain), share(forget), None, None)
    count = min(len(x.confidence[place]) for x in (retain, test))
    if mia_rows is not None:
        count = min(count, mia_rows)
    confidence = [np.nan_to_num(x.confidence[place]) for x in (retain, test, forget)]
    mia = mia_efficacy(confidence[0][:count], confidence[1][:count], confidence[2])
    return Scores(share(retain), share(forget), share(test), mia)


class Choice(NamedTuple):
    """A point that the rule chose: its place among the lambdas, and its cost."""

    place: int
    cost: float


def choose(judge: Judge, lambdas: Sequence[float], points: Sequence[Scores]) -> Choice:
    """The point of least cost; of equal ones the smaller lambda.

    Raises:
      UserError: the rule forbids all of them.
    """
    if judge.target is not None:
        costs = [gap(scores, judge.target) for scores in points]
        best = min(range(len(points)), key=lambda i: (costs[i], lambdas[i]))
        return Choice(best, costs[best])
    assert judge.base_retain is not None
    trials = [
        search.Trial(search.Point("subtracted", None, (), None, factor), {"forget": p.forget, "retain": p.retain})
        for factor, p in zip(lambdas, points, strict=True)
    ]
    found = search.choose(trials, forget="forget", retain="retain", base_retain=judge.base_retain, share=judge.keep)
    place = next(i for i, trial in enumerate(trials) if trial is found)
    return Choice(place, points[place].forget)
