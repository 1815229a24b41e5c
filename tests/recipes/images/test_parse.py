"""Recipes for image models: what they say, and every way to say it wrong."""

import pytest

from unlearnjax.errors import UserError
from unlearnjax.recipes.images.parse import image_recipe_from
from unlearnjax.recipes.images.schema import to_plain
from unlearnjax.recipes.load import IMAGES, load_image_recipe, load_recipe, names

GOOD = {"kind": "images", "candidates": [{"name": "a"}], "merges": [{"method": "consensus"}]}


def test_every_recipe_that_ships_loads_and_reads_back():
    assert names(IMAGES) == ["negmerge", "negmerge-clip"]
    for name in ("negmerge-clip",):
        recipe = load_image_recipe(name, "")
        assert image_recipe_from(to_plain(recipe), "again") == recipe


def test_the_pools_are_the_papers(made):
    pool = load_image_recipe("negmerge", str(made / "model"))
    assert image_recipe_from(to_plain(pool), "again") == pool
    assert len(pool.candidates) == 27 and {c.epochs for c in pool.candidates} == {40, 50, 60}
    assert len(pool.selection.lambdas) == 21
    clip = load_image_recipe("negmerge-clip", "")
    assert {(c.magnitude, c.operations) for c in clip.candidates} == {(m, n) for m in range(1, 11) for n in (1, 2, 3)}
    assert (clip.selection.rule, clip.selection.keep, clip.training.optimizer) == ("keep", 0.95, "adamw")


def test_a_recipe_for_the_other_kind_of_model(made, tmp_path):
    (tmp_path / "r.yml").write_text("candidates: [{name: one}]", "utf-8")
    with pytest.raises(UserError, match="is for language models"):
        load_image_recipe(str(tmp_path / "r.yml"), str(made / "model"))
    (tmp_path / "i.yml").write_text("kind: images\ncandidates: [{name: one}]", "utf-8")
    with pytest.raises(UserError, match="is for image models"):
        load_recipe(str(tmp_path / "i.yml"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"merge": []}, "'merge'.*merges"),
        ({"candidates": []}, "no candidates"),
        ({"candidates": [{}]}, "has no name"),
        ({"candidates": [{"name": "a", "epoch": 3}]}, "'epoch'.*epochs"),
        ({"candidates": [{"name": "a", "epochs": 0}]}, "candidate a: epochs is 0"),
        ({"candidates": [{"name": "a", "epochs": 1.5}]}, "epochs is 1.5"),
        ({"candidates": [{"name": "a", "learning_rate": "fast"}]}, "learning_rate is 'fast'"),
        ({"candidates": [{"name": "a"}, {"name": "a"}]}, "'a' is given twice"),
        ({"candidates": [{"name": "../a"}]}, "cannot be a folder's"),
        ({"grid": {"epochs": 3}}, "epochs must be a list"),
        ({"grid": {"epoch": [3]}}, "'epoch'.*epochs"),
        ({"merges": [{}]}, "has no method"),
        ({"merges": [{"method": "consensuss"}]}, "consensuss.*consensus"),
        ({"merges": [{"method": "ties"}]}, "needs density"),
        ({"merges": [{"method": "consensus", "rhoo": 1}]}, "'rhoo'.*rho"),
        ({"merges": [{"method": "consensus", "lambda": 0.5}]}, "lambda is searched"),
        ({"merges": [{"method": "greedy", "rho": 1}]}, "'rho'"),
        ({"merges": [{"method": "consensus", "of": ["b"]}]}, "'b'"),
        ({"merges": [{"method": "consensus"}, {"method": "consensus"}]}, "given twice"),
        ({"training": {"optimizer": "adam"}}, "'adam'.*adamw"),
        ({"training": {"batch_norm": "off"}}, "'off'"),
        ({"training": {"batch_size": 0}}, "1 or more"),
        ({"training": {"linear": 1}}, "linear is 1"),
        ({"selection": {"keep": 0}}, "keep is 0"),
        ({"selection": {"lambdas": []}}, "at least one"),
        ({"selection": {"lambdas": ["a"]}}, "lambdas is"),
        ({"selection": {"rule": "closer"}}, "'closer'.*closest"),
        ({"training": {"linear": True}, "selection": {"statistics": "re-estimated"}}, "BatchNorm statistics"),
        ({"templates": ["a photo"]}, "{}"),
        ({"baselines": {"saluns": None}}, "'saluns'.*salun"),
        ({"export": "ties"}, "no merge is called so"),
    ],
    ids=lambda x: str(x)[:50],
)
def test_what_is_wrong_is_named(changes, words):
    with pytest.raises(UserError, match=words):
        image_recipe_from({**GOOD, **changes}, "r.yml")
