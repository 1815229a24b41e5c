"""The whole job on a small classifier: what is written, resumed, refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.recipes.images.conftest import NAMES, stripes, write
from unlearnjax.cli.main import main
from unlearnjax.errors import UserError
from unlearnjax.merging.api import merge
from unlearnjax.models.vision.classifier import load_classifier
from unlearnjax.recipes.images.data import ImageSources
from unlearnjax.recipes.images.parse import image_recipe_from
from unlearnjax.recipes.images.run import run_images
from unlearnjax.recipes.images.scoring import Scorer
from unlearnjax.recipes.images.store import Store
from unlearnjax.report.images import read_images_report
from unlearnjax.training.interrupt import Interrupted, Stop

RECIPE = {
    "kind": "images",
    "name": "small",
    "defaults": {"learning_rate": 0.05, "epochs": 2},
    "candidates": [
        {"name": "a", "seed": 1},
        {"name": "b", "seed": 2},
        {"name": "c", "label_smoothing": 0.1},
        {"name": "wild", "learning_rate": 1e30},
    ],
    "training": {"batch_size": 4},
    "merges": [
        {"method": "consensus"},
        {"method": "ties", "density": 0.5},
        {"method": "best_single"},
        {"method": "greedy"},
        {"name": "pair", "method": "uniform", "of": ["a", "b"]},
    ],
    "selection": {"lambdas": [0, 0.5, 1], "rows": 30},
}


def sources(made, **changes):
    given = {"data": "train.parquet", "forget": "fraction:0.1", "test": "test.parquet", **changes}
    paths = {k: v if ":" in str(v) or isinstance(v, bool) else str(made / v) for k, v in given.items()}
    return ImageSources(**paths)


def run(made, out, recipe=None, gold="gold", **changes):
    parsed = image_recipe_from({**RECIPE, **(recipe or {})}, "r.yml")
    return run_images(
        str(made / "model"), sources(made, **changes), out, parsed, gold=gold and str(made / gold), progress=False
    )


@pytest.fixture(scope="module")
def done(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    return run(made, out), out


def test_the_report_reads_back_and_names_what_diverged(done):
    report, out = done
    assert read_images_report(out)["models"] == json.loads(json.dumps(report["models"]))
    assert {c["name"]: c["status"] for c in report["candidates"]}["wild"] == "diverged"
    assert any("wild diverged" in w for w in report["warnings"])
    assert all("wild" not in m["candidates"] for m in report["merges"])
    kinds = [m["kind"] for m in report["models"]]
    assert kinds[:2] == ["base", "retrained"] and kinds.count("merge") == 5
    retrained = next(m for m in report["models"] if m["kind"] == "retrained")
    assert retrained["gap"] == 0
    page = (out / "report.html").read_text("utf-8")
    assert "along lambda" in page and "<script" not in page
    assert not (out / "checkpoints").exists()


def test_what_is_written_is_the_start_minus_lambda_times_the_merge(done, made):
    report, out = done
    start = load_classifier(made / "model")
    written = load_classifier(out / "model")
    chosen = next(m for m in report["merges"] if m["name"] == report["exported"])
    store = Store(out / "candidates", start.params, {"statistics": start.statistics})
    settings = dict(chosen["hyperparameters"])
    if chosen["method"] in ("best_single", "greedy"):
        delta = jax.tree.map(lambda x: x.mean(axis=0), store.stacked(chosen["members"]))
    else:
        delta = merge(store.stacked(chosen["candidates"]), chosen["method"], **settings)
    expected = jax.tree.map(lambda p, d: p - np.float32(chosen["lambda"]) * d, start.params, delta)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), written.params, expected)
    jax.tree.map(np.testing.assert_array_equal, written.statistics, start.statistics)


def test_sparsity_counts_what_the_consensus_leaves_alone(done, made):
    report, out = done
    start = load_classifier(made / "model")
    store = Store(out / "candidates", start.params, {"statistics": start.statistics})
    stacked = store.stacked(["a", "b", "c"])
    agree = [np.abs(np.sign(x).sum(axis=0)) == 3 for x in jax.tree.leaves(stacked)]
    share = 1 - sum(int(x.sum()) for x in agree) / sum(x.size for x in agree)
    consensus = next(m for m in report["merges"] if m["name"] == "consensus")
    assert consensus["sparsity"]["trained"] == pytest.approx(share)


def test_lambda_0_is_the_start_bit_for_bit(made, tmp_path):
    recipe = {"selection": {"lambdas": [0], "rows": 30}, "merges": [{"method": "consensus"}]}
    report = run(made, tmp_path / "out", recipe)
    start, written = load_classifier(made / "model"), load_classifier(tmp_path / "out" / "model")
    jax.tree.map(np.testing.assert_array_equal, written.params, start.params)
    base, merged = (next(m for m in report["models"] if m["kind"] == kind) for kind in ("base", "merge"))
    assert base["scores"] == merged["scores"]


def test_an_interrupted_run_keeps_its_candidates(made, tmp_path):
    recipe = image_recipe_from({**RECIPE, "merges": [{"method": "consensus"}]}, "r.yml")
    call = {
        "model": str(made / "model"), "sources": sources(made), "out": tmp_path / "out", "recipe": recipe,
        "progress": False,
    }  # fmt: skip

    class After(Stop):
        """Asks to stop once the first candidate is on disk."""

        @property
        def signum(self):
            return 15 if (tmp_path / "out" / "candidates" / "a").exists() else 0

        @signum.setter
        def signum(self, value):
            pass

    with pytest.raises(Interrupted):
        run_images(**call, stop=After())
    before = (tmp_path / "out" / "candidates" / "a" / "delta.safetensors").stat().st_mtime_ns
    with pytest.raises(UserError, match="--resume"):
        run_images(**call)
    report = run_images(**call, resume=True)
    assert (tmp_path / "out" / "candidates" / "a" / "delta.safetensors").stat().st_mtime_ns == before
    whole = run_images(**{**call, "out": tmp_path / "whole"})
    assert report["models"] == whole["models"]


def test_a_killed_run_does_not_search_again(made, tmp_path, monkeypatch):
    merges = [{"method": "consensus"}, {"method": "uniform"}]
    recipe = image_recipe_from({**RECIPE, "merges": merges}, "r.yml")
    call = {"model": str(made / "model"), "sources": sources(made), "recipe": recipe, "progress": False}
    sweep, calls = Scorer.sweep, []

    def dies(self, start, delta):
        calls.append(delta)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return sweep(self, start, delta)

    monkeypatch.setattr(Scorer, "sweep", dies)
    with pytest.raises(KeyboardInterrupt):
        run_images(**call, out=tmp_path / "out")
    report = run_images(**call, out=tmp_path / "out", resume=True)
    assert len(calls) == 3  # of the second merge, again
    whole = run_images(**call, out=tmp_path / "whole")
    assert report["models"] == whole["models"] and report["merges"] == whole["merges"]


def test_a_candidate_of_other_settings_is_trained_anew_on_resume(made, tmp_path):
    start = load_classifier(made / "model")
    store = Store(tmp_path, start.params, {"statistics": start.statistics})
    tuned = dataclasses.make_dataclass("T", ["trained", "fixed", "losses", "diverged_at"])(
        start.params, {"statistics": start.statistics}, [1.0], None
    )
    store.save("a", tuned, {"settings": {"epochs": 2}})
    assert store.has("a", {"settings": {"epochs": 2}}) and not store.has("a", {"settings": {"epochs": 3}})
    assert not store.has("b", {})


def test_statistics_re_estimated_and_moving(made, tmp_path):
    recipe = {
        "training": {"batch_size": 4, "batch_norm": "batch"}, "merges": [{"method": "consensus"}],
        "selection": {"lambdas": [0.5], "rows": 30, "statistics": "re-estimated"},
    }  # fmt: skip
    run(made, tmp_path / "out", recipe)
    start, written = load_classifier(made / "model"), load_classifier(tmp_path / "out" / "model")
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), written.statistics, start.statistics)
    assert max(jax.tree.leaves(moved)) > 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(written.statistics))


def test_linearised_candidates(made, tmp_path):
    recipe = {"training": {"batch_size": 4, "linear": True}, "merges": [{"method": "consensus"}]}
    report = run(made, tmp_path / "out", recipe, gold=None)
    assert report["rule"]["name"] == "keep" and report["models"][1]["kind"] == "merge"
    assert any("tangent space" in warning for warning in report["warnings"])


def test_a_class_is_forgotten_by_its_name(made, tmp_path):
    report = run(made, tmp_path / "out", {"merges": [{"method": "uniform"}]}, gold=None, forget="class:across")
    assert report["data"]["train"]["rows"] == 30 and report["data"]["retain"]["rows"] == 60


def test_no_lambda_satisfies_the_rule(made, tmp_path):
    recipe = {
        "selection": {"lambdas": [50.0], "keep": 1.0, "rule": "keep", "rows": 30},
        "merges": [{"method": "uniform"}],
    }
    report = run(made, tmp_path / "out", recipe, gold=None)
    assert "exported" not in report and not (tmp_path / "out" / "model").exists()
    assert any("no merge keeps retain" in w for w in report["warnings"])


BAD = [
    ({"forget": "class:dog"}, "there is no class 'dog'"),
    ({"forget": "fraction:2"}, "fraction is 2"),
    ({"forget": "fraction:x"}, "'x' is no number"),
    ({"forget": "ids:nowhere.txt"}, "cannot be read"),
    ({"data": "nowhere.parquet"}, "no such file"),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=str)
def test_bad_sources(made, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        run(made, tmp_path / "out", **changes)
    assert not (tmp_path / "out" / "candidates").exists()


def test_an_id_that_does_not_exist_and_a_class_without_rows(made, tmp_path):
    (tmp_path / "ids.txt").write_text("3\n90\n", "utf-8")
    with pytest.raises(UserError, match="no row with the id '90'"):
        run(made, tmp_path / "out", forget=f"ids:{tmp_path / 'ids.txt'}")
    pixels, labels = stripes(20, 0)
    empty = write(tmp_path / "e.parquet", pixels, labels % 2)
    with pytest.raises(UserError, match="class 'checked' has no rows"):
        run(made, tmp_path / "out", data=empty, forget="class:checked")


def test_another_size_mode_or_set_of_classes(made, tmp_path):
    pixels, labels = stripes(20, 0)
    wide = write(tmp_path / "wide.parquet", np.repeat(pixels, 2, axis=2), labels)
    with pytest.raises(UserError, match=r"images are 16x8 \(RGB\) and the model takes 8x8 \(RGB\); add --resize"):
        run(made, tmp_path / "out", data=wide)
    grey = write(tmp_path / "grey.parquet", pixels[..., :1], labels)
    with pytest.raises(UserError, match=r"\(L\) and the model takes 8x8 \(RGB\)"):
        run(made, tmp_path / "out", test=grey)
    other = write(tmp_path / "other.parquet", pixels, labels, names=("across", "uprigth", "checked"))
    with pytest.raises(UserError, match="'uprigth' is none of the model's 3 classes"):
        run(made, tmp_path / "out", data=other)
    more = write(tmp_path / "more.parquet", pixels, labels + 1, names=("0", "1", "2", "3"))
    with pytest.raises(UserError, match="label 3, and the model has 3 classes"):
        run(made, tmp_path / "out", data=more)


def test_all_diverge(made, tmp_path):
    with pytest.raises(UserError, match="all candidates diverged; lower learning_rate"):
        run(made, tmp_path / "out", {"candidates": [{"name": "wild", "learning_rate": 1e30}], "merges": []})


def test_the_command(made, tmp_path, capsys):
    recipe = {**RECIPE, "merges": [{"method": "uniform"}], "candidates": [{"name": "a"}]}
    (tmp_path / "r.yml").write_text(json.dumps(recipe), "utf-8")
    given = ["run", "--quiet", "--model", str(made / "model"), "--recipe", str(tmp_path / "r.yml"), "--forget"]
    rest = ["--data", str(made / "train.parquet"), "--test", str(made / "test.parquet"), "--out", str(tmp_path / "o")]
    assert main([*given, f"class:{NAMES[0]}", *rest]) == 0
    assert "| uniform |" in capsys.readouterr().out and (tmp_path / "o" / "model" / "config.json").exists()
    assert main([*given, "class:0", "--retain", "x", *rest]) == 2
    assert "--retain is for language models" in capsys.readouterr().err
    assert main([*given, "class:0", "--data", "x", "--out", "y"]) == 2
    assert "needs --data and --test" in capsys.readouterr().err
