"""What podium.py and where_facts_live.py make of their settings: seeds, merges of one seed, every range of layers."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from unlearnjax.recipes.load import load_recipe
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.schema import to_plain

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import podium
import where_facts_live
from intervals import by_seed

HERE = Path(podium.__file__).parent


@pytest.mark.parametrize("scale", ["small", "paper"])
def test_a_seed_has_every_candidate_with_other_draws_and_the_same_merges(scale):
    recipe = load_recipe(str(HERE / f"podium_{scale}.yml"))
    made = podium.with_seed(recipe, 2)
    assert recipe_from(to_plain(made), "x") == made
    assert [c.name for c in made.candidates] == [c.name for c in recipe.candidates]
    pairs = list(zip(made.candidates, recipe.candidates, strict=True))
    assert all(a.order_seed == b.order_seed + 2 and a.init_seed == b.init_seed + 2 for a, b in pairs)
    assert made.merges == recipe.merges and podium.AGAINST in [m.name for m in made.merges]


def test_every_contiguous_range_is_trained():
    a = Namespace(scale="small", widths=None, seeds=[0, 1], learning_rate=1e-4, passes=None)
    recipe = where_facts_live.recipe_of(a, 4)
    ranges = by_seed([c.name for c in recipe.candidates])
    assert list(ranges) == [
        "layers 0", "layers 1", "layers 2", "layers 3", "layers 0 to 1", "layers 1 to 2", "layers 2 to 3",
        "layers 0 to 3",
    ]  # fmt: skip
    found = {c.name: list(c.layers) for c in recipe.candidates}
    assert found["layers 1 to 2-seed1"] == [1, 2] and all(len(own) == 2 for own in ranges.values())
    assert {(c.learning_rate, c.epochs) for c in recipe.candidates} == {(1e-4, 6)}
    paper = where_facts_live.recipe_of(
        Namespace(scale="paper", widths=None, seeds=[0], learning_rate=None, passes=None), 16
    )
    assert len(paper.candidates) == 11 + 1 and list(paper.candidates[2].layers) == [2, 3, 4, 5, 6, 7]
    assert paper.candidates[0].learning_rate == 1.5e-5 and paper.candidates[0].chat_template
