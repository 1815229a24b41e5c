"""The command line over real runs: results on stdout, progress and warnings on stderr."""

import json

import pytest

from unlearnjax.cli.main import main
from unlearnjax.report.schema import read_report

RECIPE = {
    "defaults": {"epochs": 1, "rank": 2, "micro_batch": 4, "accumulation": 1, "dropout": 0.0, "objective": "npo"},
    "candidates": [{"name": "one"}, {"name": "two"}],
    "adapter": {"targets": ["q"]},
    "training": {"buckets": 1},
    "merges": [{"method": "linear"}],
    "evaluation": {"max_new_tokens": 4},
}


@pytest.mark.parametrize("learning_rate", [1e-4, 1e30])
def test_run(world, tmp_path, capsys, learning_rate):
    """With a rate at which all candidates diverge there is a report, no model, and a status other than 0."""
    base, _, sources = world
    defaults = RECIPE["defaults"] | {"learning_rate": learning_rate, "warmup_ratio": 0, "schedule": "constant"}
    (tmp_path / "r.yml").write_text(json.dumps(RECIPE | {"defaults": defaults}), "utf-8")
    out = tmp_path / "out"
    argv = ["run", "--model", base.source, "--forget", sources.forget, "--retain", sources.retain]
    argv += ["--recipe", str(tmp_path / "r.yml"), "--out", str(out)]
    status = main(argv)
    stdout, stderr = capsys.readouterr()
    report = read_report(out)
    assert report["command"] == ["unlearnjax", *argv]
    assert "training:" in stderr and "evaluating" in stderr and "candidate-step" in stderr
    table = [line for line in stdout.splitlines() if line.startswith("|")]
    assert any("base" in line for line in table) and f"report: {out / 'report.html'}" in stdout
    assert "%" not in stdout.replace("".join(table), "")  # no progress
    assert (out / "report.html").exists()
    if learning_rate < 1:
        assert status == 0 and "error" not in stderr
        assert f"model:  {out / 'model'} (the merge linear-delta)" in stdout and (out / "model").is_dir()
        return
    assert status == 2
    assert [m["name"] for m in report["models"]] == ["base"] and "exported" not in report and report["merges"] == []
    assert not (out / "model").exists() and not (out / "merges").exists()
    assert stderr.splitlines()[-1].startswith("unlearnjax: error: no model was written, because candidates diverged")
    assert "unlearnjax: warning: candidate one diverged after" in stderr


def test_version_and_help(capsys):
    import unlearnjax

    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"unlearnjax {unlearnjax.__version__}\n", "")
    assert main([]) == 0
    out, err = capsys.readouterr()
    assert all(name in out for name in ("run", "demo", "evaluate", "score")) and err == ""
