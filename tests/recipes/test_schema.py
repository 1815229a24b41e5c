"""Plain data to a recipe: defaults, grids, the round trip, and an error for everything that is wrong."""

import dataclasses

import pytest
import yaml

from unlearnjax.errors import UserError
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.schema import AdapterSpec, Candidate, Evaluation, Merge, Search, Training, rule_of, to_plain

ONE = {"candidates": [{"name": "one"}]}
TWO = {"candidates": [{"name": "one"}, {"name": "two"}]}


def test_what_is_left_out_has_its_default():
    recipe = recipe_from(ONE, "r")
    assert recipe.name == "unnamed" and recipe.merges == ()
    assert (recipe.adapter, recipe.training, recipe.evaluation) == (AdapterSpec(), Training(), Evaluation())
    assert recipe.search == Search()
    # The default objective is a name; a recipe holds what it stands for.
    assert recipe.candidates == (Candidate("one", objective={"npo": 0.4, "gdr": 0.2, "klr": 0.4}),)
    empty = dict.fromkeys(("defaults", "grid", "merges", "adapter", "training", "search", "evaluation"))
    assert recipe_from({**ONE, **empty}, "r") == recipe  # `merges:` with nothing behind it


def test_a_candidate_overrides_the_defaults():
    raw = {"defaults": {"rank": 8, "epochs": 3}, "candidates": [{"rank": 2}, {"epochs": 1, "objective": "graddiff"}]}
    first, second = recipe_from(raw, "r").candidates
    assert (first.name, first.rank, first.epochs) == ("candidate-1", 2, 3)
    assert (second.name, second.rank, second.epochs) == ("candidate-2", 8, 1)
    assert second.objective == {"ga": 1.0, "gdr": 1.0}


def test_a_grid_expands_to_every_combination_after_the_listed_ones():
    raw = {
        "defaults": {"epochs": 2},
        "candidates": [{"name": "one"}],
        "grid": {"learning_rate": [1e-4, 1e-3], "objective": ["npo", {"ga": 0.5, "gdr": 1}]},
    }
    candidates = recipe_from(raw, "r").candidates
    assert [c.name for c in candidates] == [
        "one",
        "learning_rate0.0001-objectivenpo",
        "learning_rate0.0001-objectivega0.5+gdr1",
        "learning_rate0.001-objectivenpo",
        "learning_rate0.001-objectivega0.5+gdr1",
    ]
    assert [(c.learning_rate, dict(c.objective)) for c in candidates[1:]] == [
        (rate, objective) for rate in (1e-4, 1e-3) for objective in ({"npo": 1.0}, {"ga": 0.5, "gdr": 1.0})
    ]
    assert {c.epochs for c in candidates} == {2}


def test_merges_have_names_that_tell_them_apart():
    merges = [
        {"method": "linear"},
        {"method": "linear", "semantics": "peft", "lambda": 0.5},
        {"method": "ties", "density": 0.5},
        {"method": "ties", "space": "factors", "density": 0.5},
        {"method": "ties", "density": 0.5, "name": "mine"},
    ]
    found = recipe_from({**TWO, "merges": merges}, "r").merges
    assert [m.name for m in found] == [
        "linear-delta", "linear-delta-peft-lambda0.5", "ties-delta-density0.5", "ties-factors-density0.5", "mine",
    ]  # fmt: skip
    assert found[1].hyperparameters == {"lambda": 0.5}
    assert [rule_of(m)[1].semantics for m in found] == ["paper", "peft", "paper", "peft", "paper"]


def test_steps_against_a_merge():
    merges = [
        {"method": "linear", "negate": True, "scale": 0.9},
        {"method": "linear", "of": "each", "negate": True, "scale": "search"},
        {"method": "linear", "scale": 1},
    ]
    raw = {**TWO, "merges": merges, "search": {"scales": [0, 0.5], "keep": 0.9, "rows": 5}}
    recipe = recipe_from(raw, "r")
    assert [m.name for m in recipe.merges] == [
        "linear-delta-scale0.9-negated", "linear-each-delta-scalesearch-negated", "linear-delta",
    ]  # fmt: skip
    assert recipe.search == Search((0, 0.5), 0.9, 5)
    assert recipe_from(yaml.safe_load(yaml.safe_dump(to_plain(recipe))), "again") == recipe


def test_plain_data_reads_back_and_survives_yaml():
    raw = {
        "name": "all of it",
        "candidates": [{"name": "one", "objective": {"npo": 1, "klr": 0.5}, "max_grad_norm": 1.0}, {"name": "two"}],
        "grid": {"schedule": ["constant", "cosine"], "init_seed": [0, 2**32 - 1]},
        "adapter": {"targets": ["q", "v_proj"]},
        "training": {"order": "published", "buckets": 3, "seed": 4},
        "merges": [
            {"method": "linear", "weights": [1, 0, 2, 0.5, -1, 3], "normalize": False, "rank": 5},
            {"method": "ties", "space": "factors", "density": 0.5, "majority_sign_method": "frequency"},
        ],
        "evaluation": {
            "max_new_tokens": 7,
            "batch_size": 3,
            "candidates": ["one"],
            "export": "ties-factors-density0.5-majority_sign_methodfrequency",
        },
    }
    recipe = recipe_from(raw, "r")
    assert len(recipe.candidates) == 6 and recipe.merges[0].rank == 5
    plain = to_plain(recipe)
    assert recipe_from(plain, "again") == recipe
    assert recipe_from(yaml.safe_load(yaml.safe_dump(plain)), "again") == recipe
    every = {f.name for f in dataclasses.fields(Candidate)}
    assert all(set(c) == every for c in plain["candidates"])


LINEAR, TIES = {"method": "linear"}, {"method": "ties", "density": 0.5}
HYPERPARAMETERS = [
    ("learning_rate", 0, "above 0"), ("learning_rate", "1e-4x", "above 0"), ("learning_rate", True, "above 0"),
    ("learning_rate", float("nan"), "above 0"), ("learning_rate", float("inf"), "above 0"),
    ("learning_rate", 10**400, "above 0"), ("learning_rate", None, "above 0"), ("learning_rate", [1e-4], "above 0"),
    ("weight_decay", -0.1, "at least 0"), ("max_grad_norm", 0, "above 0, or null"), ("warmup_ratio", 1.1, "0 to 1"),
    ("schedule", "linaer", "did you mean 'linear'"), ("schedule", ["linear"], "must be text"),
    ("epochs", 0, "whole number"), ("epochs", 1.5, "whole number"), ("micro_batch", -1, "whole number"),
    ("accumulation", "4", "whole number"), ("rank", True, "whole number"), ("beta", 0, "above 0"),
    ("alpha", -1, "above 0"), ("dropout", 1.0, "below 1"), ("init_seed", -1, "2^32"), ("order_seed", 2**32, "2^32"),
    ("objective", 3, "a name or a mapping"), ("objective", "gradiff", "did you mean 'graddiff'"),
    ("objective", {"nop": 1}, "did you mean 'npo'"), ("objective", {"npo": "much"}, "weight of npo"),
    ("objective", {"npo": float("nan")}, "weight of npo"), ("objective", {"npo": 0.0}, "at least one term"),
    ("objective", {}, "at least one term"), ("objective", {1: 1}, "not text"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "words"), HYPERPARAMETERS)
def test_hyperparameters_out_of_range(name, value, words):
    for raw in (
        {"candidates": [{"name": "bad", name: value}]},
        {"defaults": {name: value}, "candidates": [{"name": "bad"}]},
    ):
        with pytest.raises(UserError) as caught:
            recipe_from(raw, "r.yml")
        message = str(caught.value)
        assert message.startswith("r.yml: candidate 'bad'") and words in message and name.split("_")[0] in message


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (None, "r: must be a mapping"),
        ([], "r: must be a mapping"),
        ({}, "no candidates"),
        ({"candidates": []}, "no candidates"),
        ({"candidates": "one"}, "must be a list"),
        ({"candidates": {"one": {}}}, "must be a list"),
        ({"candidates": ["one"]}, "candidate 1: must be a mapping"),
        ({**ONE, "name": 7}, "name must be text"),
        ({**ONE, "merges": [{"method": "slerp", "t": 0.5, "origin": "base"}]}, "merges exactly 2 candidates"),
        ({**ONE, "merges": [{"method": "slerp", "t": 0.5}]}, "slerp works on whole weights, and a run merges adapters"),
        ({**ONE, 7: 7}, "7 is not text"),
        ({"candidates": [{"name": 7}]}, "name must be text"),
        ({"candidates": [{"name": None}]}, "name must be text"),
        ({"candidates": [{"learning_rat": 1}]}, "unknown hyperparameter 'learning_rat'; did you mean 'learning_rate'"),
        ({**ONE, "defaults": {"rnk": 1}}, "defaults: unknown hyperparameter 'rnk'; did you mean 'rank'"),
        ({**ONE, "defaults": {"name": "x"}}, "defaults: unknown hyperparameter 'name'"),
        ({**ONE, "defaults": [1]}, "defaults: must be a mapping"),
        ({"grid": {"rnk": [1]}}, "grid: unknown hyperparameter 'rnk'; did you mean 'rank'"),
        ({"grid": {"name": ["a"]}}, "grid: unknown hyperparameter 'name'"),
        ({"grid": {"rank": 4}}, "grid: rank: must be a list"),
        ({"grid": {"rank": []}}, "grid: rank has no values"),
        ({"grid": {"rank": [4, 4]}}, "'rank4' is used twice"),
        ({"grid": {"rank": [4, 0]}}, "candidate 'rank0': rank must be"),
        ({**ONE, "adaptor": {}}, "unknown key 'adaptor'; did you mean 'adapter'"),
        ({**ONE, "adapter": {"type": "lroa"}}, "adapter: unknown adapter type 'lroa'; did you mean 'lora'"),
        ({**ONE, "adapter": {"targets": []}}, "adapter: targets must be"),
        ({**ONE, "adapter": {"targets": [1]}}, "adapter: targets must be"),
        ({**ONE, "adapter": "lora"}, "adapter: must be a mapping"),
        ({**ONE, "training": {"order": "buckets"}}, "unknown order 'buckets'; did you mean 'bucketed'"),
        ({**ONE, "training": {"buckets": 0}}, "training: buckets must be a whole number"),
        ({**ONE, "training": {"remat": "dots"}}, "training: remat must be none, linears, full, or null"),
        ({**ONE, "training": {"seed": -1}}, "training: seed must be"),
        ({**ONE, "training": {"bucket": 1}}, "training: unknown key 'bucket'; did you mean 'buckets'"),
        ({**ONE, "evaluation": {"semantics": "ours"}}, "unknown semantics 'ours'"),
        ({**ONE, "evaluation": {"max_new_tokens": 0}}, "max_new_tokens must be"),
        ({**ONE, "evaluation": {"batch_size": 2.5}}, "batch_size must be"),
        ({**ONE, "evaluation": {"candidates": "some"}}, "candidates must be `all`, `none`, or a list of names"),
        ({**ONE, "evaluation": {"candidates": ["gnoe"]}}, "unknown candidate 'gnoe'"),
        ({**ONE, "evaluation": {"candidates": "none"}}, "the best candidate is exported, and none is evaluated"),
        ({**ONE, "evaluation": {"export": "linaer"}, "merges": [LINEAR | {"name": "linear"}]}, "did you mean 'linear'"),
        ({**ONE, "merges": {"method": "linear"}}, "merges: must be a list"),
        ({**ONE, "merges": ["linear"]}, "merge 1: must be a mapping"),
        ({**ONE, "merges": [{"density": 1}]}, "merge 1: names no method"),
        ({**ONE, "merges": [LINEAR, {"method": "tys"}]}, "merge 2: unknown merge method 'tys'; did you mean 'ties'"),
        ({**ONE, "merges": [{"method": ["ties"]}]}, "merge 1: method must be"),
        ({**ONE, "merges": [TIES | {"space": "factor"}]}, "unknown space of ties 'factor'; did you mean 'factors'"),
        ({**ONE, "merges": [TIES | {"semantics": "papre"}]}, "ties has no semantics 'papre'; did you mean 'paper'"),
        ({**ONE, "merges": [TIES | {"semantics": "paper", "space": "factors"}]}, "semantics that do: peft"),
        ({**ONE, "merges": [LINEAR | {"semantics": "paper", "space": "factors"}]}, "semantics that do: peft"),
        ({**ONE, "merges": [{"method": "ties"}]}, "needs density in (0, 1]"),
        ({**ONE, "merges": [{"method": "ties", "space": "factors"}]}, "needs density in (0, 1]"),
        ({**ONE, "merges": [TIES | {"density": 0}]}, "density is 0 and must be in (0, 1]"),
        ({**ONE, "merges": [TIES | {"density": "0.5"}]}, "density must be one number"),
        ({**ONE, "merges": [TIES | {"density": [0.5]}]}, "density must be a number"),
        ({**ONE, "merges": [TIES | {"density": {"a": 1}}]}, "density must be a number"),
        ({**ONE, "merges": [TIES | {"lambda": -1}]}, "lambda is -1"),
        ({**ONE, "merges": [TIES | {"majority_sign_method": "total"}]}, "no hyperparameter 'majority_sign_method'"),
        ({**ONE, "merges": [LINEAR | {"normalize": 1}]}, "normalize is 1 and must be true or false"),
        ({**ONE, "merges": [LINEAR | {"density": 0.5}]}, "no hyperparameter 'density'"),
        ({**ONE, "merges": [LINEAR | {"rank": 0}]}, "rank must be a whole number"),
        ({**ONE, "merges": [LINEAR | {"space": "factors", "rank": 4}]}, "rank is what a delta is exported with"),
        ({**ONE, "merges": [LINEAR | {"compress": 4}]}, "compress is for space core; in space delta leave it out"),
        ({**ONE, "merges": [LINEAR | {"space": "core", "compress": 0}]}, "compress must be a whole number"),
        ({**ONE, "merges": [LINEAR | {"weights": 1}]}, "weights must be a list of numbers"),
        ({**ONE, "merges": [LINEAR | {"weights": ["a"]}]}, "weights must be a list of numbers"),
        ({**ONE, "merges": [LINEAR | {"negate": 1}]}, "negate must be true or false"),
        ({**ONE, "merges": [LINEAR | {"negated": True}]}, "no hyperparameter 'negated'"),
        ({**ONE, "merges": [LINEAR | {"scale": 0}]}, "scale must be a number above 0, or `search`"),
        ({**ONE, "merges": [LINEAR | {"scale": "serach"}]}, "scale must be a number above 0, or `search`"),
        ({**ONE, "merges": [LINEAR | {"scale": True}]}, "scale must be a number above 0, or `search`"),
        ({**ONE, "merges": [LINEAR | {"of": "each"}]}, "of each needs scale: search"),
        ({**ONE, "merges": [LINEAR | {"of": "every", "scale": "search"}]}, "names, `each`, or null"),
        ({**ONE, "serach": {}}, "unknown key 'serach'; did you mean 'search'"),
        ({**ONE, "search": {"scale": [0]}}, "search: unknown key 'scale'; did you mean 'scales'"),
        ({**ONE, "search": {"scales": []}}, "scales must be a list of different numbers"),
        ({**ONE, "search": {"scales": [0.5, -0.5]}}, "scales must be a list of different numbers of at least 0"),
        ({**ONE, "search": {"scales": [0.5, 0.5]}}, "scales must be a list of different numbers"),
        ({**ONE, "search": {"scales": "0.5"}}, "scales must be a list of different numbers"),
        ({**ONE, "search": {"keep": 1.1}}, "keep must be a number above 0, of at most 1"),
        ({**ONE, "search": {"rows": 0}}, "rows must be a whole number"),
        ({**TWO, "merges": [LINEAR | {"weights": [1]}]}, "1 weights for 2 candidates"),
        ({**TWO, "merges": [LINEAR | {"weights": [1, -1]}]}, "sum to 0"),
        ({**TWO, "merges": [TIES | {"weights": [0, 0]}]}, "all of them are 0"),
    ],
)  # fmt: skip
def test_errors(raw, words):
    with pytest.raises(UserError) as caught:
        recipe_from(raw, "r")
    assert str(caught.value).startswith("r: ") and words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["base", "gold", "Base", "best"])
def test_names_the_report_uses_itself(name):
    for raw in ({"candidates": [{"name": name}]}, {**ONE, "merges": [LINEAR | {"name": name}]}):
        with pytest.raises(UserError, match=f"'{name}' has a meaning of its own"):
            recipe_from(raw, "r")


@pytest.mark.parametrize(
    "name", ["a/b", "..", ".hidden", "", "a\\b", "a\nb", "-a", "a:b", "end.", "end ", "x" * 130, "é" * 70]
)
def test_names_that_are_no_folders(name):
    """An empty name of a merge asks for the default."""
    cases = [{"candidates": [{"name": name}]}] + [{**ONE, "merges": [LINEAR | {"name": name}]}] * bool(name)
    for raw in cases:
        with pytest.raises(UserError, match=r"can't be a folder's name|must be text"):
            recipe_from(raw, "r")


@pytest.mark.parametrize("name", ["a", "ä b", "lr=1e-4", "x" * 120, "model.v2", "a+b (2)"])
def test_names_that_are_folders(name, tmp_path):
    assert recipe_from({"candidates": [{"name": name}]}, "r").candidates[0].name == name
    (tmp_path / name).mkdir()


def test_candidates_and_merges_share_their_names():
    """They share the report's table and the folder of generations; capitals do not tell folders apart everywhere."""
    for other in ("one", "ONE"):
        with pytest.raises(UserError, match=f"'{other}' is used twice"):
            recipe_from({"candidates": [{"name": "one"}, {"name": other}]}, "r")
        with pytest.raises(UserError, match=f"'{other}' is used twice"):
            recipe_from({**ONE, "merges": [LINEAR | {"name": other}]}, "r")
    with pytest.raises(UserError, match="'linear-delta' is used twice"):
        recipe_from({**ONE, "merges": [LINEAR, LINEAR]}, "r")


def test_a_method_of_every_kind_is_ready_for_its_merge():
    """`rule_of` and `merge_lora` must agree on which definition an unnamed semantics means."""
    import jax.numpy as jnp

    from unlearnjax.merging.lora_space import merge_lora

    stack = {"q": {"a": jnp.arange(12.0).reshape(2, 1, 2, 3) - 5.0, "b": jnp.arange(8.0).reshape(2, 1, 2, 2) - 3.0}}
    for method, extra in (("linear", {}), ("ties", {"density": 0.5})):
        for space in ("delta", "factors"):
            semantics = rule_of(Merge(method, space))[1].semantics
            named = merge_lora(stack, jnp.ones(2), method, space, semantics=semantics, **extra)
            plain = merge_lora(stack, jnp.ones(2), method, space, **extra)
            for x, y in zip(named["q"].values(), plain["q"].values(), strict=True):
                assert bool(jnp.all(x == y))
