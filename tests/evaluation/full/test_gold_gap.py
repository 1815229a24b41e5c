"""The distance to the gold model's scores, by hand."""

import json
import math

import pytest

from unlearnjax.errors import UserError
from unlearnjax.evaluation.csvs import Scored
from unlearnjax.evaluation.full.gold_gap import gold_gap
from unlearnjax.evaluation.membership import membership
from unlearnjax.evaluation.probe import probe
from unlearnjax.evaluation.semeval import score


def scores(forget, retain, member, known, mmlu=None):
    """forget and retain: outputs of two completions (golds `a b c d`) and two questions (golds `x`)."""

    def rows(outputs):
        golds = ["a b c d", "a b c d", "x", "x"]
        ids = ["1sc1", "2sc1", "1qa0", "2qa0"]
        return [Scored(i, "Task1", "q", g, o, n) for i, g, o, n in zip(ids, golds, outputs, (1.0, 2.0, 3.0, 4.0))]

    attack = membership(member, [2.0, 3.0], resamples=20)
    return score(rows(forget), rows(retain), attack, mmlu, probe=probe(["yes", "no"], known), warn=lambda _: None)


def test_by_hand_from_the_scorers_own_results():
    gold = scores(["a b x x", "a b x x", "x", "no"], ["a b c d", "a b c d", "x", "x"], [2.0, 3.0], ["yes", "no"])
    model = scores(["a x x x", "", "no", "no"], ["a b c d", "a b c x", "x", "no"], [4.0, 5.0], ["yes", "yes"], 0.5)
    found = gold_gap(model, gold)
    forget, retain = found["terms"]["forget"]["Task1"], found["terms"]["retain"]["Task1"]
    # A missing output is "nan" to the official scorer: no word of the gold.
    assert forget["regurgitation"] == pytest.approx({"value": 0.125, "gold": 0.5, "difference": -0.375})
    assert forget["knowledge"] == {"value": 0.0, "gold": 0.5, "difference": -0.5}
    assert retain["regurgitation"] == {"value": 0.875, "gold": 1.0, "difference": -0.125}
    assert retain["knowledge"] == {"value": 0.5, "gold": 1.0, "difference": -0.5}
    assert found["mean_absolute"] == pytest.approx((0.375 + 0.5 + 0.125 + 0.5) / 4)
    assert found["mean_absolute_of"] == {"forget": pytest.approx(0.4375), "retain": pytest.approx(0.3125)}
    assert found["largest"] == {"split": "forget", "task": "Task1", "kind": "knowledge", "difference": -0.5}
    assert found["membership_auc"] == {"value": 0.0, "gold": 0.5, "difference": -0.5}
    assert found["membership_score"]["difference"] == -1.0
    assert found["probe"] == {"value": 0.5, "gold": 1.0, "difference": -0.5}
    assert found["mmlu"] is None and found["aggregate"] is None  # gold has none
    assert found["degenerate"]["forget"] == {"value": 0.25, "gold": 0.0, "difference": 0.25}
    assert found["nll"]["retain"]["difference"] == 0.0
    json.dumps(found, allow_nan=False)


def test_gold_itself_missing_terms_and_numbers():
    gold = scores(["a", "b", "x", "y"], ["c", "d", "x", "y"], [1.0], ["yes", "no"])
    same = gold_gap(gold, gold)
    assert (same["mean_absolute"], same["largest"]["difference"]) == (0.0, 0.0)
    bare = {
        **gold,
        "forget": {"Task1": {"regurgitation": None, "knowledge": 0.5}},
        "membership_auc": None,
        "probe": None,
        "nll": {"forget": math.inf, "retain": None},
    }
    found = gold_gap(bare, gold)
    assert found["terms"]["forget"]["Task1"]["regurgitation"] is None
    assert found["membership_auc"] is found["probe"] is found["nll"]["forget"] is found["nll"]["retain"] is None
    assert found["mean_absolute"] == pytest.approx(0.0)
    json.dumps(found, allow_nan=False)
    with pytest.raises(UserError, match=r"forget: only one .* has task 'Task7'"):
        gold_gap({**gold, "forget": {**gold["forget"], "Task7": {}}}, gold)
