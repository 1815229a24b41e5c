"""The confirmation's aggregate is the official one, and its bootstrap covers what it must."""

import sys
from pathlib import Path

import numpy as np
import pytest

from unlearnjax.evaluation.csvs import Scored, write_generations
from unlearnjax.evaluation.semeval import score_folder

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

from confirmation import SPLITS, bootstrap, by_seed, cells, task_aggregate

TERMS = [("Task1", "regurgitation"), ("Task1", "knowledge")]
DOCUMENTS = [f"d{i}" for i in range(40)]


def make(run, model, right):
    """A model that gets a share of each split's rows right: forget, then retain."""
    draw = np.random.default_rng(int(1000 * right[0]))
    for split, share in zip(SPLITS, right, strict=True):
        rows = []
        for name in DOCUMENTS:
            known = draw.random() < share
            rows.append(Scored(f"{name}sc1", "Task1", "x", "a long tale", "a long tale" if known else "a tale"))
            rows.append(Scored(f"{name}qa0", "Task1", "x", "Ann", "Ann" if known else "Bob"))
        write_generations(run / "generations" / model / f"{split}_0.csv", rows)
    return {s: cells(run, model, s, DOCUMENTS, TERMS) for s in SPLITS}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_aggregate_is_the_official_one(tmp_path):
    found = make(tmp_path, "one", (0.3, 0.8))
    official = score_folder(tmp_path / "generations" / "one")["task_aggregate"]
    assert task_aggregate(found, {s: np.ones(40) for s in SPLITS}) == pytest.approx(official, abs=1e-12)


def test_models_that_differ_differ_beyond_the_interval_and_equal_ones_do_not(tmp_path):
    run = {name: make(tmp_path, name, right) for name, right in
           {"good": (0.1, 0.95), "bad": (0.6, 0.5), "same": (0.1, 0.95)}.items()}  # fmt: skip
    apart = bootstrap([run], ["good", "bad"], 200, 0)
    assert apart["difference"]["interval"][0] > 0.1
    assert apart["difference"]["value"] == pytest.approx(
        apart["models"]["good"]["task_aggregate"] - apart["models"]["bad"]["task_aggregate"]
    )
    low, high = apart["models"]["good"]["interval"]
    assert low < apart["models"]["good"]["task_aggregate"] < high
    assert bootstrap([run, run], ["good", "same"], 50, 0)["difference"] == {
        "of": ["good", "same"], "value": 0.0, "interval": [0.0, 0.0],
    }  # fmt: skip


def test_models_are_grouped_by_their_seeds():
    names = ["base", "gold", "over-1", "over-0", "ties-delta-0", "ties-delta-1"]
    assert by_seed(names) == {
        "base": ["base"] * 2, "gold": ["gold"] * 2, "over": ["over-0", "over-1"],
        "ties-delta": ["ties-delta-0", "ties-delta-1"],
    }  # fmt: skip
    assert by_seed(["base", "over"]) == {"base": ["base"], "over": ["over"]}
    with pytest.raises(SystemExit, match="under has seeds"):
        by_seed(["over-0", "over-1", "under-0"])
