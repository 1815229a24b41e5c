"""The demo on a smaller corpus and model: from nothing to a report that says that the model forgot."""

import functools
import json

import pytest

from unlearnjax import load_model
from unlearnjax.cli.main import main
from unlearnjax.data.synthetic import make_corpus
from unlearnjax.recipes import demo, run, train_step
from unlearnjax.report.schema import read_report

RECIPE = {
    "name": "small",
    "defaults": {"epochs": 8, "micro_batch": 4, "accumulation": 1, "rank": 4, "alpha": 8, "dropout": 0.0},
    "candidates": [
        {"name": "over", "objective": {"npo": 0.5, "gdr": 0.5}, "learning_rate": 1e-2},
        {"name": "under", "objective": {"npo": 0.3, "gdr": 0.7}, "learning_rate": 3e-3},
    ],
    "training": {"buckets": 1},
    "merges": [{"name": "merged", "method": "linear"}],
    "evaluation": {"max_new_tokens": 24, "batch_size": 64},
}


def stop(*args, **keywords):
    raise KeyboardInterrupt


@pytest.mark.slow
def test_the_demo_forgets(tmp_path, monkeypatch, capsys):
    small = functools.partial(make_corpus, stories=2, people=2, biographies=4, neutral=4)
    monkeypatch.setattr(demo, "make_corpus", small)
    monkeypatch.setattr(demo, "demo", functools.partial(demo.demo, epochs=60))
    for name, size in (("WIDTH", 64), ("INNER", 128), ("LAYERS", 2)):
        monkeypatch.setattr(demo, name, size)
    (tmp_path / "r.yml").write_text(json.dumps(RECIPE), "utf-8")
    monkeypatch.chdir(tmp_path)
    argv = ["demo", "--quiet", "--out", "out", "--recipe", "r.yml", "--seed", "3"]
    evaluate, out = run.evaluate_all, tmp_path / "out"
    monkeypatch.setattr(run, "evaluate_all", stop)
    assert main(argv) == 130
    assert capsys.readouterr().err.endswith("--seed 3 --resume\n")
    assert sorted(p.name for p in out.iterdir()) == ["base", "data", "demo.json", "result"]
    # What was learned by heart is not learned again, and what was trained is not trained again.
    monkeypatch.setattr(run, "evaluate_all", evaluate)
    monkeypatch.setattr(demo, "teach", None)
    monkeypatch.setattr(train_step, "stores_for", None)
    assert main([*argv, "--resume"]) == 0
    stdout, stderr = capsys.readouterr()
    assert "merged" in stdout and "report: out/result/report.html" in stdout and "error" not in stderr

    assert sorted(p.name for p in out.iterdir()) == ["base", "data", "demo.json", "result"]
    report = read_report(out / "result")
    assert report["title"].startswith("Demo") and report["exported"] == "merged"
    assert {k for k, v in report["data"].items() if k != "padding_share"} == {
        "forget", "retain", "members", "nonmembers", "probe",
    }  # fmt: skip
    scores = {m["name"]: m["scores"] for m in report["models"]}
    base, merged = scores["base"], scores["merged"]
    assert base["nll"]["forget"] < 0.5 < merged["nll"]["forget"] - base["nll"]["forget"]
    for measure in ("regurgitation", "knowledge"):
        knew, knows = (sum(task[measure] for task in s["forget"].values()) for s in (base, merged))
        assert knew > knows + 0.3
    # The retain set suffers less than the forget set.
    assert merged["nll"]["retain"] - base["nll"]["retain"] < merged["nll"]["forget"] - base["nll"]["forget"]
    # The adapters name their base as the user wrote it, and it is a model that loads.
    config = json.loads((out / "result" / "merges" / "merged" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "out/base"
    assert load_model("out/base").config == load_model("out/result/model").config
    assert main([*argv, "--resume"]) == 2 and "has finished" in capsys.readouterr().err
    assert main(argv) == 2 and "holds a demo; give a new folder" in capsys.readouterr().err
