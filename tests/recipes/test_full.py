"""A run with `--evaluate full` and a gold model: every part for every model, and what is known about them."""

import dataclasses
import json

import jax
import pytest

from unlearnjax import save_model
from unlearnjax.cli.main import main
from unlearnjax.errors import UserError
from unlearnjax.evaluation.full.suite import PARTS
from unlearnjax.models.abstract import init_params
from unlearnjax.recipes.load import with_suite
from unlearnjax.recipes.memorise import memorise
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.prepare import load_reference
from unlearnjax.recipes.run import run
from unlearnjax.report.schema import read_report

pytestmark = pytest.mark.slow

PLAIN = {
    "name": "tiny",
    "defaults": {"epochs": 2, "learning_rate": 1e-2, "rank": 4, "alpha": 4, "accumulation": 1, "dropout": 0.0},
    "candidates": [{"name": "one", "micro_batch": 4}],
    "training": {"buckets": 1},
    "merges": [{"name": "two", "method": "linear", "length": 2}],
    "evaluation": {"max_new_tokens": 12, "batch_size": 32, "suite": "full", "full_rows": 8, "full_draws": 4},
}
NAMES = ["base", "gold", "one", "two"]


@pytest.fixture(scope="module")
def gold(world, tmp_path_factory):
    base, corpus, _ = world
    params = init_params(base.model.abstract(base.params["embed"]["weight"].dtype), jax.random.key(0))
    rows = [*corpus.retain, *corpus.neutral]
    params, _ = memorise(
        base.model, params, base.tokenizer, rows, epochs=40, learning_rate=1e-2, batch_size=10, buckets=1
    )
    folder = tmp_path_factory.mktemp("gold") / "gold"
    found = dataclasses.replace(base, params=params, source=str(folder))
    save_model(found, folder)
    return found


@pytest.fixture(scope="module")
def done(world, gold, tmp_path_factory):
    out = tmp_path_factory.mktemp("full") / "out"
    base, _, sources = world
    report = run(base, sources, out, recipe_from(PLAIN, "tiny"), gold=gold.source, progress=False)
    return out, {m["name"]: m for m in report["models"]}


def test_every_model_has_every_part(done):
    out, models = done
    assert list(models) == NAMES and [m["kind"] for m in models.values()] == ["base", "gold", "candidate", "merge"]
    for name, model in models.items():
        assert set(model["full"]) == set(PARTS) - ({"gold_gap"} if name == "gold" else set())
    again = {m["name"]: m for m in read_report(out)["models"]}
    assert again["two"]["full"]["relearning"]["steps"] == models["two"]["full"]["relearning"]["steps"]
    page = (out / "report.html").read_text("utf-8")
    assert "What the score hides" in page and "leak@k" in page and "Relearning" in page


def test_what_is_known_about_them_is_found(done):
    """The base knows the forget rows and gold does not."""
    full = {name: model["full"] for name, model in done[1].items()}
    assert full["base"]["probes"]["by_probe"]["as trained"]["leak"] > 0.9 > 0.6 > full["gold"]["probes"]["largest"]
    assert full["base"]["quantisation"]["full"]["leak"] > 0.9
    assert full["base"]["quantisation"]["changed"] == {"int8": 0.0, "int4": 0.0}
    assert 0 < full["one"]["quantisation"]["changed"]["int4"] < full["two"]["quantisation"]["changed"]["int8"]
    assert full["base"]["relearning"]["others"]["recovery"] == {"leak": None, "nll": None}
    assert full["gold"]["relearning"]["attacked"]["nll"][-1] < full["gold"]["relearning"]["attacked"]["nll"][0]
    assert full["base"]["sampled"]["leak_at"][0]["leak"] > full["gold"]["sampled"]["leak_at"][0]["leak"]
    # LUME's two kinds of rows: towns are texts, not personal values of a pattern.
    assert full["base"]["personal"]["forget"]["leaked"] > full["gold"]["personal"]["forget"]["leaked"]
    assert full["base"]["membership"]["attacks"]["reference"] is None
    assert full["one"]["membership"]["attacks"]["reference"] is not None
    assert full["base"]["membership"]["attacks"]["loss"]["auc"] == done[1]["base"]["scores"]["membership_auc"]
    assert full["gold"]["membership"]["attacks"]["loss"]["auc_minus_gold"] is None
    assert full["base"]["outputs"]["forget"]["perplexity"] < 2 < full["gold"]["outputs"]["forget"]["perplexity"]
    base = done[1]["base"]["scores"]["forget"]["Task1"]["knowledge"]
    term = full["base"]["gold_gap"]["terms"]["forget"]["Task1"]["knowledge"]
    assert term["difference"] == base - done[1]["gold"]["scores"]["forget"]["Task1"]["knowledge"]


def test_another_model_is_no_gold(world, gold):
    base = world[0]
    other = dataclasses.replace(gold, config=dataclasses.replace(gold.config, layers=1))
    with pytest.raises(UserError, match="its layers is 1, not 2"):
        load_reference(other, base, "float32", "gold model")


def test_evaluate_measures_the_same_of_an_adapter(world, gold, done, tmp_path, capsys):
    base, _, sources = world
    out, models = done
    data = [x for name in ("forget", "retain", "members", "nonmembers") for x in (f"--{name}", getattr(sources, name))]
    command = ["evaluate", "--model", base.source, *data, "--max-new-tokens", "12", "--quiet", "--evaluate", "full"]
    assert main([*command, "--out", str(tmp_path / "no")]) == 2
    assert "give it as --original" in capsys.readouterr().err and not (tmp_path / "no").exists()
    adapter = ["--adapter", str(out / "candidates" / "one"), "--gold", gold.source]
    assert main([*command, *adapter, "--out", str(tmp_path / "scores")]) == 0
    found = json.loads((tmp_path / "scores" / "full.json").read_text("utf-8"))
    assert set(found) == {"model", "gold"} and not (tmp_path / "scores" / "journal").exists()
    for part in ("personal", "rouge"):
        assert found["model"][part] == models["one"]["full"][part]
    assert found["model"]["gold_gap"]["terms"] == models["one"]["full"]["gold_gap"]["terms"]
    attack = models["one"]["full"]["membership"]["attacks"]["reference"]["auc"]
    assert found["model"]["membership"]["attacks"]["reference"]["auc"] == attack


def test_the_suite_is_chosen_on_the_command_line(tmp_path, capsys):
    recipe = recipe_from({**PLAIN, "evaluation": {}}, "tiny")
    assert recipe.evaluation.suite == "official" and with_suite(recipe, None) == recipe
    assert with_suite(recipe, "full").evaluation.suite == "full"
    assert main(["demo", "--out", str(tmp_path / "x"), "--evaluate", "ful"]) == 2
    assert "full" in capsys.readouterr().err
    with pytest.raises(UserError, match="did you mean 'full'"):
        recipe_from({**PLAIN, "evaluation": {"suite": "ful"}}, "tiny")


def test_a_run_that_was_stopped_in_the_suite_goes_on_with_its_parts(world, gold, tmp_path, monkeypatch, done):
    """Killed after four parts of the first group; what was measured is not measured again, and the end is the same."""
    from unlearnjax.evaluation.full import suite

    base, _, sources = world
    recipe, out, calls = recipe_from(PLAIN, "tiny"), tmp_path / "out", []
    own = suite.kept

    def dying(journal, name, compute):
        if len(calls) == 4:
            raise KeyboardInterrupt
        calls.append(name)
        return own(journal, name, compute)

    monkeypatch.setattr(suite, "kept", dying)
    with pytest.raises(KeyboardInterrupt):
        run(base, sources, out, recipe, gold=gold.source, progress=False)
    assert calls == ["membership", "personal", "rouge", "outputs"] and not (out / "report.json").exists()
    monkeypatch.setattr(suite, "kept", own)
    measured = []
    attacks = suite.membership_attacks
    monkeypatch.setattr(suite, "membership_attacks", lambda *a, **k: measured.append(1) or attacks(*a, **k))
    report = run(base, sources, out, recipe, gold=gold.source, progress=False, resume=True)
    assert len(measured) == 3  # of base and candidate together, of the base alone, and of the merge; not of gold
    first = {name: model["full"] for name, model in done[1].items()}
    again = {m["name"]: m["full"] for m in report["models"]}
    assert json.dumps(again, sort_keys=True) == json.dumps(first, sort_keys=True)
