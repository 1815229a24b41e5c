"""report.json: what is accepted, the path named for what is not, and a write that is whole or absent."""

import copy
import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.report.schema import read_report, validate, write_report


def refusal(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def clean(report):
    """The made-up report's curves hold NaN where a candidate diverged; as JSON that is null."""
    return json.loads(json.dumps(report), parse_constant=lambda name: None)


def test_round_trip(tmp_path, report):
    path = write_report(tmp_path / "out", report)
    assert path == tmp_path / "out" / "report.json" and [p.name for p in path.parent.iterdir()] == ["report.json"]
    assert read_report(path) == read_report(tmp_path / "out") == clean(report)
    assert math.isnan(report["candidates"][4]["curves"]["npo"][-1])  # the argument is left as it was
    assert read_report(path)["candidates"][4]["curves"]["npo"][-1] is None


def test_arrays_tuples_and_infinities_become_plain(tmp_path, report):
    curves = report["candidates"][0]["curves"]
    plain = clean(report)
    curves["update"] = np.asarray(curves["update"])
    curves["loss"] = jnp.asarray(curves["loss"], jnp.float32)
    curves["npo"] = tuple(curves["npo"])
    scores = report["models"][0]["scores"]
    scores["task_aggregate"] = np.float64(0.25)
    scores["membership_score"] = jnp.float32(0.5)
    scores["mmlu"] = math.nan
    scores["nll"]["forget"] = np.float32(np.inf)
    report["recipe"]["rank"] = np.int64(8)
    report["recipe"]["out"] = tmp_path
    write_report(tmp_path, report)
    read = read_report(tmp_path)
    assert read["candidates"][0]["curves"]["update"] == plain["candidates"][0]["curves"]["update"]
    assert read["candidates"][0]["curves"]["npo"] == plain["candidates"][0]["curves"]["npo"]
    np.testing.assert_allclose(read["candidates"][0]["curves"]["loss"], plain["candidates"][0]["curves"]["loss"], 1e-6)
    back = read["models"][0]["scores"]
    assert (back["task_aggregate"], back["membership_score"], back["mmlu"]) == (0.25, 0.5, None)
    assert back["nll"]["forget"] is None and read["recipe"]["rank"] == 8 and read["recipe"]["out"] == str(tmp_path)


def test_what_may_be_absent_or_null(report):
    report = clean(report)
    for name in ("members", "nonmembers", "padding_share"):
        del report["data"][name]
    for model in report["models"]:
        for name in ("membership_auc", "membership_auc_interval", "membership_score", "mmlu", "aggregate", "probe",
                     "aggregate_without_mmlu", "degenerate", "nll", "task_aggregate"):  # fmt: skip
            model["scores"][name] = None
        model["scores"]["forget"] = {"Task": {"regurgitation": None, "knowledge": 0.5}}
    report["candidates"], report["merges"], report["warnings"] = [], [], []
    validate(report)


def change(report, path, value):
    *way, last = path
    for step in way:
        report = report[step]
    if value is KeyError:
        del report[last]
    else:
        report[last] = value


@pytest.mark.parametrize(
    "path, value, said",
    [
        (("title",), 3, "report.json.title: must be a string, is int '3'"),
        (("title",), KeyError, "report.json: the key 'title' is missing"),
        (("titel",), "x", "report.json: unknown key 'titel'; did you mean 'title'?"),
        (("version",), KeyError, "report.json: the key 'version' is missing"),
        (("version",), 0, "version 0 does not exist"),
        (("command",), "unlearnjax run", "report.json.command: must be a list, is str"),
        (("hardware", "cpu_count"), 2.5, "report.json.hardware.cpu_count: must be a whole number"),
        (("hardware", "cpu_count"), True, "report.json.hardware.cpu_count: must be a whole number"),
        (("data", "forget", "rows"), None, "report.json.data.forget.rows: must be a whole number, is null"),
        (("training", "seconds"), None, "report.json.training.seconds: must be a finite number, is null"),
        (("training", "seconds"), math.nan, "report.json.training.seconds: must be a finite number"),
        (("recipe",), [], "report.json.recipe: must be an object, is list"),
        (("candidates", 1, "status"), "done", "report.json.candidates[1].status: unknown value 'done'"),
        (("candidates", 1, "curves", "npo", 3), "x", "report.json.candidates[1].curves.npo[3]: must be a finite"),
        (("candidates", 1, "curves", "npo"), [1.0], "curves.npo: has 1 values for 240 updates"),
        (("candidates", 1, "curves", "update"), KeyError, "candidates[1].curves: the key 'update' is missing"),
        (("merges", 2, "exported_rank"), 8.0, "report.json.merges[2].exported_rank: must be a whole number"),
        (("models", 0, "kind"), "canditate", "models[0].kind: unknown value 'canditate'; did you mean 'candidate'?"),
        (("models", 0, "scores", "mlu"), 0.2, "models[0].scores: unknown key 'mlu'; did you mean 'mmlu'?"),
        (("models", 0, "scores", "forget", "Task1", "knowledge"), "no", "scores.forget.Task1.knowledge: must be a"),
        (("models", 0, "scores", "membership_auc_interval"), [0.5], "membership_auc_interval: must hold 2 values"),
        (("warnings",), ["fine", None], "report.json.warnings[1]: must be a string, is null"),
    ],
)
def test_the_wrong_key_is_named(report, path, value, said):
    report = clean(report)
    validate(copy.deepcopy(report))
    change(report, path, value)
    assert said in refusal(validate, report)


def test_other_files_and_newer_versions(tmp_path, report):
    report = clean(report)
    report["version"] = 2
    report["brand_new_key"] = 1  # a newer version is named as such, not its keys
    said = refusal(validate, report)
    assert "version 2 is newer" in said and "upgrade unlearnjax" in said
    path = tmp_path / "report.json"
    assert refusal(read_report, tmp_path).startswith(f"{path}: no such file")
    path.write_text("{")
    assert refusal(read_report, path).startswith(f"{path}: broken JSON")
    path.write_bytes(b"\xff")
    assert refusal(read_report, path).startswith(f"{path}: broken JSON")
    path.write_text('{"schema": "lm-eval"}')
    assert refusal(read_report, path).startswith(f"{path}: not a report of unlearnjax")
    path.write_text("[]")
    assert refusal(read_report, path) == f"{path}: must be an object, is list '[]'"


def test_a_refused_report_leaves_the_old_file(tmp_path, report):
    write_report(tmp_path, report)
    before = (tmp_path / "report.json").read_bytes()
    report["models"][0]["kind"] = "best"
    refusal(write_report, tmp_path, report)
    assert (tmp_path / "report.json").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
