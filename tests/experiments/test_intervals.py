"""The intervals' scores are the official ones, and their bootstrap covers what it must."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from unlearnjax.evaluation.csvs import Loss, Scored, write_generations, write_losses
from unlearnjax.evaluation.semeval import score_folder
from unlearnjax.report.scores import forgotten, retained

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from intervals import SCORES, SPLITS, Draw, bootstrap, by_seed, from_plain, outcome, scores, table, to_plain

DOCUMENTS = [f"d{i}" for i in range(40)]


def make(folder, right, apart):
    """A model that gets a share of each split's rows right (forget, retain) and knows members by `apart` nats."""
    draw = np.random.default_rng(int(1000 * right[0]))
    for split, share in zip(SPLITS, right, strict=True):
        rows = []
        for name in DOCUMENTS:
            known = draw.random() < share
            rows.append(Scored(f"{name}sc1", "Task1", "x", "a long tale", "a long tale" if known else "a tale"))
            rows.append(Scored(f"{name}qa0", "Task1", "x", "Ann", "Ann" if known else "Bob"))
        write_generations(folder / f"{split}_0.csv", rows)
    for side, mean in (("member", 2.0), ("nonmember", 2.0 + apart)):
        losses = [Loss(name, float(x)) for name, x in zip(DOCUMENTS, draw.normal(mean, 1.0, 40), strict=True)]
        write_losses(folder / "mia_results" / f"{side}_0.csv", losses)
    return outcome(folder)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_scores_are_the_official_ones(tmp_path):
    found = scores(make(tmp_path / "one", (0.3, 0.8), 1.0), Draw({s: np.ones(40) for s in SPLITS}, *[np.ones(40)] * 2))
    official = score_folder(tmp_path / "one")
    plane = {"forgotten": forgotten(official), "retained": retained(official)}
    assert found == pytest.approx({**{name: official[name] for name in SCORES}, **plane}, abs=1e-12)


def test_what_a_score_is_made_of_can_be_kept(tmp_path):
    one = make(tmp_path / "one", (0.3, 0.8), 1.0)
    counts = {split: cells.counts.tolist() for split, cells in one.cells.items()}
    again = from_plain(json.loads(json.dumps(to_plain(one))), counts)
    draw = Draw({s: np.ones(40) for s in SPLITS}, *[np.ones(40)] * 2)
    assert scores(again, draw) == pytest.approx(scores(one, draw), abs=1e-4)


def test_models_that_differ_differ_beyond_the_interval_and_equal_ones_do_not(tmp_path):
    run = {
        name: [make(tmp_path / name, right, apart)]
        for name, right, apart in (
            ("good", (0.1, 0.95), 0.0), ("bad", (0.6, 0.5), 2.0), ("same", (0.1, 0.95), 0.0)
        )
    }  # fmt: skip
    found = bootstrap(run, "good", 200, 0)
    for score, own in found["bad"].items():
        gap = own["value"] - found["good"][score]["value"]
        assert own["difference"] == pytest.approx(gap)
        low, high = own["difference_interval"]
        assert low < gap < high and (low > 0.1 if score == "membership_auc" else high < -0.1)
        assert own["interval"][0] < own["value"] < own["interval"][1]
        assert found["same"][score]["difference_interval"] == [0.0, 0.0] and found["same"][score]["difference"] == 0.0
    lines = table(found, "good").splitlines()
    assert len(lines) == 5 and lines[2].startswith("| good |") and lines[3].count("[") == 5


def test_scores_are_means_over_seeds_and_other_seeds_widen_the_interval(tmp_path):
    one, two = make(tmp_path / "one", (0.1, 0.95), 0.0), make(tmp_path / "two", (0.5, 0.6), 0.0)
    alike = bootstrap({"over": [one, one], "gold": [two, two]}, "over", 100, 0)["over"]["task_aggregate"]
    apart = bootstrap({"over": [one, two], "gold": [two, two]}, "over", 100, 0)["over"]["task_aggregate"]
    assert apart["value"] < alike["value"]
    assert np.ptp(apart["interval"]) > 2 * np.ptp(alike["interval"])


def test_models_are_grouped_by_their_seeds():
    names = ["base", "gold", "over-seed1", "over-seed0", "ties-delta-1-seed0", "ties-delta-1-seed1"]
    assert by_seed(names) == {
        "base": ["base"] * 2, "gold": ["gold"] * 2, "over": ["over-seed0", "over-seed1"],
        "ties-delta-1": ["ties-delta-1-seed0", "ties-delta-1-seed1"],
    }  # fmt: skip
    assert by_seed(["base", "over-1"]) == {"base": ["base"], "over-1": ["over-1"]}
    with pytest.raises(SystemExit, match="under has seeds"):
        by_seed(["over-seed0", "over-seed1", "under-seed0"])
