"""Searched scales: NegMerge's rule over trials, and a whole run that subtracts what learned the forget set."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import unlearnjax
from unlearnjax.errors import UserError
from unlearnjax.evaluation.journal import Records
from unlearnjax.io.peft import load_adapter
from unlearnjax.merging.lora_space import lora_delta
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.merge_step import Merged, delta_of
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.prepare import Data
from unlearnjax.recipes.run import run
from unlearnjax.recipes.search_step import Searcher
from unlearnjax.report.schema import read_report
from unlearnjax.report.scores import known

BASE = {"q": {"weight": jnp.ones((1, 2, 2))}}


@dataclasses.dataclass(frozen=True)
class Scored(Searcher):
    """A searcher of models whose scores are known by their weights' value: {value: (forget, retain)}."""

    scores: dict | None = None

    def _scores(self, params, journal, progress):
        at = round(float(params["q"]["weight"][0, 0, 0]), 3)
        return dict(zip(("forget", "retain"), self.scores[at], strict=True))


def choose(scores, *deltas, **search):
    """Of merges with these deltas (all entries alike), subtracted."""
    raw = {
        "candidates": [{"name": f"c{i}"} for i in range(2)], "search": search,
        "merges": [{"method": "linear", "negate": True, "scale": "search", "name": "mine"}],
    }  # fmt: skip
    recipe = recipe_from(raw, "r")
    nobody = LanguageModel(BASE, None, None, None, "base"), recipe, Data([], [], None, None, None)
    searcher = Scored(*nobody, scores=scores)
    options = [
        Merged(recipe.merges[0], "paper", [i], None, {"q": {"weight": jnp.full((1, 2, 2), x)}}, 1.0)
        for i, x in enumerate(deltas)
    ]
    return searcher.choose(options)


SCORES = {1.0: (0.9, 0.8), 0.75: (0.5, 0.78), 0.5: (0.2, 0.76), 0.25: (0.2, 0.77), 0.0: (0.0, 0.5)}
QUARTERS = [0, 0.25, 0.5, 0.75, 1.0]


def test_the_lowest_forget_score_of_those_that_keep_enough_and_of_equal_ones_the_smaller_scale():
    """.95 of .8 is .76, which equality reaches; .75 of the way forgets as much as .5."""
    best = choose(SCORES, 1.0, scales=QUARTERS[::-1])
    assert best.scale == 0.5 and best.search.floor == pytest.approx(0.76)
    assert [(t.scale, t.forget, t.retain) for t in best.search.trials][::-1] == [
        (s, *SCORES[1 - s]) for s in QUARTERS
    ]  # fmt: skip
    np.testing.assert_array_equal(delta_of(best)["q"]["weight"], np.full((1, 2, 2), -0.5))
    assert best.length == 0.5 and best.rescaled == -0.5
    assert choose(SCORES, 1.0, scales=QUARTERS, keep=0.6).scale == 1.0
    assert choose(SCORES, 1.0, scales=QUARTERS, keep=1.0).scale == 0.0  # the base itself


def test_of_several_candidates_the_best_pair():
    best = choose({**SCORES, 0.4: (0.1, 0.79)}, 1.0, 0.6, scales=[0, 1.0])
    assert best.candidates == [1] and best.scale == 1.0
    assert [(t.candidates, t.scale) for t in best.search.trials] == [([0], 0), ([0], 1.0), ([1], 0), ([1], 1.0)]


def test_where_nothing_keeps_enough_the_best_is_named():
    with pytest.raises(UserError, match=r"keeps retain at 0.95 of the base's 0.8 \(0.76\); the best is 0.5"):
        choose(SCORES, 1.0, scales=[1.0])


PLAIN = {
    "defaults": {
        "objective": "finetune", "epochs": 3, "learning_rate": 1e-2, "rank": 4, "alpha": 8, "micro_batch": 4,
        "accumulation": 1, "dropout": 0.0,
    },
    "candidates": [
        {"name": "one"}, {"name": "two", "order_seed": 7}, {"name": "three", "learning_rate": 2e-2},
        {"name": "wild", "learning_rate": 1e30, "schedule": "constant", "warmup_ratio": 0},
    ],
    "adapter": {"targets": ["q", "v", "down"]},
    "training": {"buckets": 1},
    "search": {"scales": [0, 0.5, 1, 2], "keep": 0.5},
    "merges": [
        {"name": "negmerge", "method": "consensus", "negate": True, "scale": "search"},
        {"name": "factors", "method": "linear", "space": "factors", "negate": True, "scale": "search"},
        {"name": "single", "method": "task_arithmetic", "of": "each", "negate": True, "scale": "search"},
        {"name": "fixed", "method": "consensus", "negate": True, "scale": 2},
    ],
    "evaluation": {"max_new_tokens": 12, "export": "fixed"},
}  # fmt: skip
FINISHED = ["one", "two", "three"]


@pytest.fixture(scope="module")
def done(world, tmp_path_factory):
    base, _, sources = world
    out = tmp_path_factory.mktemp("searched") / "out"
    report = run(base, sources._replace(members=None, nonmembers=None), out, recipe_from(PLAIN, "r"), progress=False)
    return out, report


def test_candidates_learn_the_forget_set_and_subtraction_takes_it_away(done):
    _, report = done
    losses = {m["name"]: m["scores"]["nll"]["forget"] for m in report["models"]}
    assert all(losses[name] < losses["base"] < losses["fixed"] for name in FINISHED)
    for candidate in report["candidates"][:3]:
        assert set(candidate["curves"]) == {"update", "loss", "forget_ce", "gradient_norm"}


def test_the_report_says_what_was_tried_and_what_was_chosen(done):
    """All rows are in the sample, so that a trial's scores are those of the model that came of it."""
    out, report = done
    assert read_report(out)["merges"] == report["merges"]
    scores = {m["name"]: m["scores"] for m in report["models"]}
    merges = {m["name"]: m for m in report["merges"]}
    assert list(merges) == ["negmerge", "factors", "single", "fixed"] and all(m["negated"] for m in merges.values())
    for name in ("negmerge", "factors", "single"):
        merge = merges[name]
        assert merge["search"]["floor"] == 0.5 * known(scores["base"], "retain")
        trials = merge["search"]["trials"]
        (chosen,) = (
            t for t in trials if t["scale"] == merge["scale"] and t.get("candidate") in (None, *merge["candidates"])
        )
        able = [t for t in trials if t["retain"] >= merge["search"]["floor"]]
        assert chosen["forget"] == min(t["forget"] for t in able)
        assert chosen["scale"] == min(t["scale"] for t in able if t["forget"] == chosen["forget"])
        assert (chosen["forget"], chosen["retain"]) == tuple(known(scores[name], s) for s in ("forget", "retain"))
        at_zero = {(t["forget"], t["retain"]) for t in trials if t["scale"] == 0}
        assert at_zero == {tuple(known(scores["base"], s) for s in ("forget", "retain"))}
    assert merges["negmerge"]["candidates"] == FINISHED and len(merges["single"]["candidates"]) == 1
    pairs = [(t["candidate"], t["scale"]) for t in merges["single"]["search"]["trials"]]
    assert pairs == [(name, scale) for name in FINISHED for scale in PLAIN["search"]["scales"]]
    assert merges["fixed"]["scale"] == 2 and "search" not in merges["fixed"]
    page = (out / "report.html").read_text("utf-8")
    assert "<h2>Scales</h2>" in page and page.split("<h2>Scales</h2>")[1].count('<path class="line') == 3
    assert not re.search(r"https?:|url\(|@import|src=|href=", page)
    card = (out / "model" / "README.md").read_text("utf-8")
    assert "of the candidates one, two, three, times 2, subtracted from the base." in card


def test_the_model_is_the_base_less_the_scaled_merge(world, done):
    """From the candidates' files; where they disagree on the sign the base's weights are untouched, bit for bit."""
    base, (out, _) = world[0], done
    adapters = [load_adapter(out / "candidates" / name, base.config) for name in FINISHED]
    each = [lora_delta(adapter.lora, adapter.alpha / adapter.rank) for adapter in adapters]
    merged = unlearnjax.merge(jax.tree.map(lambda *xs: jnp.stack(xs), *each), "consensus")
    found = unlearnjax.load_model(out / "model").params["layers"]
    kept = 0
    for block, linears in merged["layers"].items():
        for linear, delta in linears.items():
            before, after = (np.asarray(x[block][linear]["weight"]) for x in (base.params["layers"], found))
            step = np.asarray(delta["weight"])
            np.testing.assert_allclose(after, before - 2 * step, atol=1e-6)
            assert after[step == 0].tobytes() == before[step == 0].tobytes()
            kept += np.count_nonzero(step) / step.size
    assert 0 < kept < 3


def test_a_search_that_was_stopped_goes_on(world, done, tmp_path, monkeypatch):
    base, _, sources = world
    whole, added = Records.add, []

    def add(self, places, results):
        whole(self, places, results)
        added.append((str(self.path.relative_to(tmp_path)), tuple(places)))
        if len(added) == stop_after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Records, "add", add)
    arguments = (base, sources._replace(members=None, nonmembers=None), tmp_path / "out", recipe_from(PLAIN, "r"))
    stop_after = 9  # the base, and what follows of the first merge
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, progress=False)
    assert all("/evaluation/search/" in path for path, _ in added)
    stop_after = 0
    report = run(*arguments, progress=False, resume=True)
    assert len(added) == len(set(added))
    assert report["merges"] == done[1]["merges"] and report["models"] == done[1]["models"]
