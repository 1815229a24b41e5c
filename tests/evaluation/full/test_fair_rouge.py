"""Length-fair ROUGE-L recall: recalls worked out by hand, and the scorer's own tokenizer."""

import json

import pytest

from unlearnjax.evaluation.csvs import Scored
from unlearnjax.evaluation.full.fair_rouge import chance_floors, chance_texts, fair_recall, fair_rouge, rouge_words
from unlearnjax.evaluation.rouge import rouge_l_recall

GOLDS = ("red fox ran far", "red cat sat", "big dog ran far away now", "red")


def rows(outputs, golds=GOLDS, kind="sc1"):
    return [Scored(f"d{i}{kind}", "Task1", "Tell", gold, out) for i, (gold, out) in enumerate(zip(golds, outputs))]


def test_the_words_are_the_scorers():
    tokenizers = pytest.importorskip("rouge_score.tokenizers")
    for text in ("The fox's 12,5 e-mails: naïve ÉTÉ_x", "", "  --  ", "İstanbul 10175 West 58th Place, #505"):
        assert rouge_words(text) == tokenizers.DefaultTokenizer(use_stemmer=False).tokenize(text)


def test_the_output_is_cut_to_the_golds_words():
    gold = "red fox ran far"
    babble = "a red dog, a blue fox; it ran so far."
    assert rouge_l_recall(gold, babble) == 1.0
    assert fair_recall(gold, babble) == 0.25  # a red dog a
    assert fair_recall(gold, "Red fox... RAN far!") == 1.0
    assert fair_recall(gold, "") == 0.0


def test_the_floor_by_hand():
    members = rows(GOLDS)
    # Three chance texts each, as there are three other documents, starting at each of them in turn.
    assert chance_texts(members, 0) == ["red cat sat big", "big dog ran far", "red red cat sat"]
    assert chance_texts(members, 3) == ["red", "red", "big"]
    expected = [
        (1 / 4 + 2 / 4 + 1 / 4) / 3,  # red; ran far; red
        # "big dog ran", "red red fox", "red fox ran" against "red cat sat"
        (0 + 1 / 3 + 1 / 3) / 3,
        # "red red fox ran far red", "red fox ran far red cat", "red cat sat red red fox": ran far, ran far, nothing
        (2 / 6 + 2 / 6 + 0) / 3,
        (1 + 1 + 0) / 3,
    ]
    floor = sum(expected) / 4
    assert chance_floors(members) == {("Task1", "regurgitation"): pytest.approx(floor)}


def test_gold_is_one_chance_is_zero_and_babble_does_not_help():
    def one(outputs):
        return fair_rouge(rows(outputs))["Task1"]["regurgitation"]

    gold = one(GOLDS)
    assert (gold["rows"], gold["recall"], gold["cut"], gold["fair"]) == (4, 1.0, 1.0, 1.0)
    floor = gold["floor"]
    babble = one([f"6 6 6 6 6 6 {' '.join(GOLDS)}"] * 4)
    assert babble["recall"] == 1.0 and babble["cut"] == 0.0
    assert babble["fair"] == pytest.approx(-floor / (1 - floor))
    half = one([GOLDS[0], "", "", ""])
    assert half["fair"] == pytest.approx((0.25 - floor) / (1 - floor))
    # What the floor is made of scores 0.
    members = rows(GOLDS)
    scores = [
        fair_rouge(rows([chance_texts(members, i)[k] for i in range(4)]))["Task1"]["regurgitation"]["fair"]
        for k in range(3)
    ]
    assert sum(scores) == pytest.approx(0.0, abs=1e-12) and max(scores) > 0.01


def test_groups_documents_and_bounds():
    # A document's own rows are no chance texts of each other.
    qa = [Scored(f"d{i}qa{k}", "Task2", "?", f"same words {i}", "") for i in range(2) for k in range(2)]
    assert chance_texts(qa, 0) == ["same words 1"] * 3
    assert chance_floors(qa) == {("Task2", "knowledge"): pytest.approx(2 / 3)}
    mixed = [*qa, *rows(GOLDS), Scored("row-1", "Task1", "", "left out", ""), Scored("xsc1", "Task9", "", "alone", "")]
    found = fair_rouge(mixed)
    assert found["Task2"]["knowledge"]["fair"] == -1.0  # -floor / (1 - floor) is -2: the bound
    assert found["Task9"]["regurgitation"] == {"rows": 1, "recall": 0.0, "cut": 0.0, "floor": None, "fair": None}
    assert {task: list(kinds) for task, kinds in found.items()} == {
        "Task1": ["regurgitation"], "Task2": ["knowledge"], "Task9": ["regurgitation"],
    }  # fmt: skip
    assert fair_rouge(mixed, chance_floors(mixed)) == found
    equal = fair_rouge(rows(["x", "x"], ["same", "same"]))["Task1"]["regurgitation"]
    assert (equal["floor"], equal["fair"]) == (1.0, None)
    assert fair_rouge([]) == {}
    json.dumps(found, allow_nan=False)
