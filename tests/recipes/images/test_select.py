"""The rules for lambda, on scores made by hand."""

import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.evaluation.forgetting import mia_efficacy
from unlearnjax.evaluation.images import Scored
from unlearnjax.recipes.images.select import Judge, Scores, choose, gap, scores_of

LAMBDAS = (0.0, 0.5, 1.0)


def points(*pairs):
    return [Scores(retain, forget, None, None) for retain, forget in pairs]


def test_keep_takes_the_lowest_forget_accuracy_among_those_that_retain_enough():
    assert choose(Judge(0.95, 100.0, None), LAMBDAS, points((100, 60), (95, 30), (94.9, 0))).place == 1


def test_a_tie_takes_the_smaller_lambda():
    assert choose(Judge(0.9, 100.0, None), LAMBDAS, points((100, 60), (96, 30), (92, 30))).place == 1


def test_nothing_qualifies():
    with pytest.raises(
        UserError, match=r"keeps retain at 0.99 of the base's 100 \(99\); the best is 98 \(.*lambda=0.5\)"
    ):
        choose(Judge(0.99, 100.0, None), LAMBDAS, points((97, 60), (98, 30), (50, 0)))


def test_closest_takes_the_smallest_gap():
    target = Scores(100.0, 94.0, 94.0, 12.0)
    found = [Scores(100, 99, 95, 2), Scores(98, 94, 92, 11), Scores(90, 80, 85, 30)]
    choice = choose(Judge(0.95, None, target), LAMBDAS, found)
    assert choice.place == 1 and choice.cost == pytest.approx((2 + 0 + 2 + 1) / 4)


def test_a_gap_over_what_both_have():
    assert gap(Scores(90, 50, None, None), Scores(100, 40, 70, 10)) == 10


def test_scores_are_accuracies_and_the_attack_on_as_many_members_as_others():
    rng = np.random.default_rng(0)
    sets = {n: Scored(rng.random(k) < 0.5, rng.random(k).astype(np.float32))
            for n, k in (("retain", 50), ("forget", 20), ("test", 30))}  # fmt: skip
    found = scores_of(sets["retain"], sets["forget"], sets["test"])
    assert found.retain == 100 * sets["retain"].correct.mean() and found.forget == 100 * sets["forget"].correct.mean()
    assert found.mia == mia_efficacy(sets["retain"].confidence, sets["test"].confidence, sets["forget"].confidence)
    few = scores_of(sets["retain"], sets["forget"], sets["test"], mia_rows=10)
    assert few.mia == mia_efficacy(*(sets[n].confidence[:10] for n in ("retain", "test")), sets["forget"].confidence)
    assert scores_of(sets["retain"], sets["forget"], None)[2:] == (None, None)
