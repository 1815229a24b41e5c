"""Recipes by name and from files."""

from pathlib import Path

import pytest

from unlearnjax.errors import UserError
from unlearnjax.merging.search import LAMBDAS
from unlearnjax.recipes.load import load_image_recipe, load_recipe, names
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.schema import to_plain

ONE = "candidates: [{name: one}]\n"


def test_every_recipe_that_ships_loads_and_reads_back():
    assert names() == [
        "agad", "default", "demo", "negmerge", "selective-amnesia", "sugd", "zjuklab", "zjuklab-canonical",
    ]  # fmt: skip
    for name in names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe_from(to_plain(recipe), "again") == recipe


def test_the_experiments_recipes_load():
    folder = Path(__file__).parents[2] / "experiments"
    files = {f: "kind: images" in f.read_text("utf-8") for f in folder.glob("*.yml")}
    assert {load_recipe(str(f)).name for f, images in files.items() if not images} >= {"semeval-ties-small"}
    assert {load_image_recipe(str(f), "").name for f, images in files.items() if images} >= {"negmerge-cifar10-small"}


@pytest.mark.parametrize("name", ["default", "demo"])
def test_the_default_lies_between_over_and_under_forgetting_and_compares_merges(name):
    """ZJUKLAB's weights: a falling share of forgetting, a falling rate; merged by linear, and TIES in both spaces."""
    recipe = load_recipe(name)
    assert [c.objective["npo"] for c in recipe.candidates] == [0.5, 0.4, 0.3, 0.2]
    rates = [c.learning_rate for c in recipe.candidates]
    assert rates == sorted(rates, reverse=True) and rates[0] > rates[-1]
    assert {(m.method, m.space) for m in recipe.merges} == {("linear", "delta"), ("ties", "delta"), ("ties", "factors")}
    assert recipe.evaluation.export == "best"


def test_negmerge_subtracts_what_learned_the_forget_set_from_one_start():
    recipe = load_recipe("negmerge")
    assert len(recipe.candidates) == 8 and len({c.init_seed for c in recipe.candidates}) == 1
    assert all(dict(c.objective) == {"forget_ce": 1.0} for c in recipe.candidates)
    assert [m.method for m in recipe.merges] == ["consensus", "linear", "ties", "magmax", "task_arithmetic"]
    assert all(m.negate and m.scale == "search" for m in recipe.merges) and recipe.merges[-1].of == "each"
    assert recipe.search.keep == 0.95 and recipe.search.scales[0] == 0 and recipe.search.scales[-1] > max(LAMBDAS)


def test_a_file_by_any_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("mine.yml", "mine.yaml", "mine", "below/mine"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(ONE, "utf-8")
        assert load_recipe(path).candidates[0].name == "one"
    # A shipped recipe's name means that recipe, whatever lies in the working directory.
    (tmp_path / "default").write_text(ONE, "utf-8")
    assert load_recipe("default").name == "default"
    assert load_recipe("./default").name == "unnamed"


def test_numbers_as_people_write_them(tmp_path):
    """YAML 1.1 reads 1e-4 as text."""
    path = tmp_path / "r.yml"
    path.write_text("candidates: [{learning_rate: 1e-4, weight_decay: 2E-2, alpha: 1.5e+1, beta: .5}]", "utf-8")
    candidate = load_recipe(str(path)).candidates[0]
    assert (candidate.learning_rate, candidate.weight_decay, candidate.alpha, candidate.beta) == (1e-4, 0.02, 15.0, 0.5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (ONE + "merges: [}\n", ["line 2", "not valid YAML"]),
        (ONE + "name: \x00", ["not valid YAML"]),
        ("name: a\nmerges: []\nname: b\n" + ONE, ["line 3", "'name' is given twice"]),
        ("candidates:\n  - rank: 2\n    rank: 4\n", ["line 3", "'rank' is given twice"]),
        ("candidates: !!python/object/apply:os.system [ls]\n", ["line 1", "not valid YAML"]),
        (ONE + "name: 2020-99-99\n", ["not valid YAML"]),
        ("", ["must be a mapping"]),
        ("- one\n", ["must be a mapping"]),
        ("just text\n", ["must be a mapping"]),
    ],
)
def test_broken_files_are_named_with_the_line(tmp_path, content, words):
    path = tmp_path / "r.yml"
    path.write_text(content, "utf-8")
    with pytest.raises(UserError) as caught:
        load_recipe(str(path))
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_not_text(tmp_path):
    path = tmp_path / "r.yml"
    path.write_bytes(b"name: \xff\xfe\n")
    with pytest.raises(UserError, match=r"r\.yml: not UTF-8"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("defualt", "unknown recipe 'defualt'; did you mean 'default'"),
        ("zzz", "valid: agad, default, demo"),
        ("zzz.yml", "zzz.yml: no such recipe file"),
        ("some/where", "some/where: no such recipe file"),
        (".", "unknown recipe"),
    ],
)
def test_no_such_recipe(name, words):
    with pytest.raises(UserError, match=words):
        load_recipe(name)
