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
def test_every_candidate_once_per_seed_and_merges_of_one_seed(scale):
    recipe = load_recipe(str(HERE / f"podium_{scale}.yml"))
    made = podium.with_seeds(recipe, [0, 1, 2])
    assert recipe_from(to_plain(made), "x") == made
    names = [c.name for c in made.candidates]
    assert names.count("sugd") == 1 and len(names) == 3 * (len(recipe.candidates) - 1) + 1
    groups = by_seed(names)
    assert groups["npo"] == ["npo-seed0", "npo-seed1", "npo-seed2"] and groups["sugd"] == ["sugd"] * 3
    own = {c.name: c for c in made.candidates}
    assert own["npo-seed2"].order_seed == own["npo-seed0"].order_seed + 2
    (mean,) = [m for m in made.merges if m.name == "podium-mean-seed1"]
    assert list(mean.of) == ["zjuklab-over-seed1", "selective-amnesia-seed1", "sugd"]
    assert podium.AGAINST in by_seed([m.name for m in made.merges])


def test_every_contiguous_range_is_trained():
    a = Namespace(widths=[1, 2], seeds=[0, 1], learning_rate=1e-4, passes=2)
    recipe = where_facts_live.recipe_of(a, 4)
    ranges = by_seed([c.name for c in recipe.candidates])
    assert list(ranges) == [
        "layers 0", "layers 1", "layers 2", "layers 3", "layers 0 to 1", "layers 1 to 2", "layers 2 to 3",
        "layers 0 to 3",
    ]  # fmt: skip
    found = {c.name: list(c.layers) for c in recipe.candidates}
    assert found["layers 1 to 2-seed1"] == [1, 2] and all(len(own) == 2 for own in ranges.values())
