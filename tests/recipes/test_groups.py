"""Which candidates train together, and what a recipe says wrongly about what trains."""

import pytest

from unlearnjax.data.tokens import pack, pooled
from unlearnjax.errors import UserError
from unlearnjax.models.config import ModelConfig
from unlearnjax.recipes.groups import adapters_of, groups_of, layers_of, sequence_of
from unlearnjax.recipes.load import load_recipe
from unlearnjax.recipes.parse import recipe_from

CONFIG = ModelConfig("olmo", 67, 32, 48, 8, 4, 4, 8, "layer")
AMNESIA = {"objective": "selective_amnesia", "order": "mixed", "adapter": "full", "modules": "mlp"}
SUGD = {"objective": "sugd", "order": "chunked", "schedule": "constant", "accumulation": 1}


def recipe(*candidates, merges=()):
    listed = [{"name": f"c{i}", **c} for i, c in enumerate(candidates)]
    return recipe_from({"candidates": listed, "merges": list(merges)}, "x")


def pool(forget, retain):
    return pooled(*(pack([[1, 2, 3]] * count, [1] * count) for count in (forget, retain)))


def groups(*candidates, found=None):
    return groups_of(recipe(*candidates).candidates, CONFIG.layers, found)


def test_like_candidates_train_together_in_the_recipes_order():
    made = groups(
        {}, {**AMNESIA, "layers": [0, 1]}, {"objective": "npo"}, {**AMNESIA, "layers": [3, 2]},
        {**AMNESIA, "layers": [0, 1, 2]}, {"layers": [0, 1]}, {**AMNESIA, "layers": [0, 1], "separator": " "},
    )  # fmt: skip
    assert [g.places for g in made] == [(0, 2), (1, 3), (4,), (5,), (6,)]
    assert made[1].layers == ((0, 1), (2, 3))


@pytest.mark.parametrize(
    ("at_once", "sizes"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1]), (3, [3, 2]), (4, [4, 1]), (5, [5]), (9, [5])]
)
def test_too_many_at_once_train_in_parts(at_once, sizes):
    made = groups_of(recipe(*({} for _ in range(5))).candidates, 8, None, at_once)
    assert [len(g.places) for g in made] == sizes
    assert [place for g in made for place in g.places] == list(range(5))


def test_a_lora_on_all_layers_is_the_ordinary_one():
    (group,) = groups({}, {"layers": list(range(8))}, {"layers": "last-8"})
    assert group.kind.layers is None and len(adapters_of(group, CONFIG, "all", 4)) == 1


def test_a_group_has_an_adapter_for_each_set_of_layers():
    (group,) = groups(*({**AMNESIA, "layers": own} for own in ([0, 1], [2, 3], [1, 0])))
    made = adapters_of(group, CONFIG, "all", 4)
    assert group.places == (0, 2, 1) and [places for _, places in made] == [(0, 1), (2,)]
    assert [a.name for a, _ in made] == ["mlp of layers 0, 1", "mlp of layers 2, 3"]


def test_layers():
    of = lambda layers, found=None: layers_of(recipe({**AMNESIA, "layers": layers}).candidates[0], 8, found)  # noqa: E731
    assert of("all") == tuple(range(8)) and of("last-3") == (5, 6, 7) and of([4, 2]) == (2, 4)
    assert of("auto", (3, 4)) == (3, 4) and len(of("auto")) == 3
    with pytest.raises(UserError, match=r"'c0': layer 8 of a model with 8; give 0 to 7"):
        of([8])
    with pytest.raises(UserError, match=r"'c0': layers last-9 of a model with 8; give at most last-8"):
        of("last-9")


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ({"layers": "first"}, "layers must be all, auto, last-<count> or a list of numbers, not 'first'"),
        ({"layers": "last-0"}, "layers must be all, auto"),
        ({"layers": []}, "layers must be all, auto"),
        ({"layers": [-1]}, "layers must be all, auto"),
        ({"layers": [0.5]}, "layers must be all, auto"),
        ({"adapter": "dora"}, "unknown adapter 'dora'"),
        ({"modules": "attention"}, "unknown modules 'attention'"),
        ({"objective": "selective_amnesia"}, "pool_ga, pool_retain need an order that mixes rows; give one of mixed"),
        ({"objective": {"pool_ga": 1, "gdr": 1}, "order": "mixed"}, "gdr and pool_ga read rows in different ways"),
        ({"order": "mixed"}, "order mixed is for objectives that mix rows, and npo, gdr, klr do not"),
        ({**SUGD, "order": "chunky"}, "unknown order 'chunky'; did you mean 'chunked'"),
        ({**SUGD, "schedule": "linear"}, "order chunked lowers the rate in each of its phases"),
        ({**SUGD, "accumulation": 4}, "in order chunked each micro-batch is an update"),
        ({"order_parameters": {"chunk": 2}}, "order_parameters are of an order"),
        ({**SUGD, "order_parameters": {"chunks": 2}}, "unknown parameter of chunked 'chunks'"),
        ({**SUGD, "order_parameters": {"chunk": 0}}, "chunk must be a whole number above 0, not 0"),
        (
            {**SUGD, "order": "annealed", "order_parameters": {"fraction": 2}},
            "fraction must be a number above 0, of at",
        ),
        ({**SUGD, "order": "annealed", "order_parameters": {"finally_all": 1}}, "finally_all must be true or false"),
        ({**SUGD, "order": "annealed", "order_parameters": {"anneal_rate": float("inf")}}, "anneal_rate must be a"),
        ({**SUGD, "order_parameters": {"ratio": 2**31}}, "ratio must be a whole number above 0"),
        ({"append_eos": 1}, "append_eos must be true or false"),
        ({"separator": None}, "separator must be text"),
    ],
)
def test_bad_candidates(candidate, message):
    with pytest.raises(UserError, match=message):
        recipe(candidate)


def test_merges_of_weights_have_no_factors():
    ties = {"method": "ties", "space": "factors", "density": 0.5}
    with pytest.raises(UserError, match="space factors is for LoRAs, and c1 trains weights; take space delta"):
        recipe({}, {**AMNESIA, "layers": [0]}, merges=[ties])
    recipe({}, {**AMNESIA, "layers": [0]}, {}, merges=[{**ties, "of": ["c0", "c2"]}])
    with pytest.raises(UserError, match="rank is of an adapter, and c1 trains weights"):
        recipe({}, {**AMNESIA, "layers": [0]}, merges=[{"method": "linear", "rank": 4}])


def test_an_update_has_no_row_twice():
    with pytest.raises(
        UserError, match=r"'c0': order_parameters: an update of 7 retain rows, and the retain set has 6"
    ):
        sequence_of(recipe(SUGD).candidates[0], pool(5, 6))


def test_annealing_that_never_comes_is_an_error():
    agad = {**SUGD, "objective": "agad", "order": "annealed", "micro_batch": 2}
    rare = {"chunk": 2, "interleaving": 0.2}
    with pytest.raises(UserError, match=r"'c0': order_parameters: with interleaving 0.2 .* every 5 chunks, .* has 3"):
        sequence_of(recipe({**agad, "order_parameters": rare}).candidates[0], pool(5, 6))
    for parameters in ({**rare, "finally_all": True}, {**rare, "chunk": 1}):
        own = sequence_of(recipe({**agad, "order_parameters": parameters}).candidates[0], pool(5, 6))
        assert any((micro.rows >= 5).all() for micro in own)


def test_an_export_is_a_merge_or_where_there_is_none_a_candidate():
    raw = {"candidates": [{"name": "a"}, {"name": "b"}], "evaluation": {"export": "b"}}
    assert recipe_from(raw, "x").evaluation.export == "b"
    with pytest.raises(UserError, match="unknown merge 'b'"):
        recipe_from({**raw, "merges": [{"method": "linear"}]}, "x")


def test_the_published_systems():
    """Their settings, and the first update that each one's order holds."""
    (amnesia,), (sugd,), (agad,) = (load_recipe(n).candidates for n in ("selective-amnesia", "sugd", "agad"))
    first = sequence_of(amnesia, pool(500, 500))[:10]
    assert [len(m.rows) for m in first] == [12] * 10 and [m.update for m in first] == [False] * 9 + [True]
    first = sequence_of(sugd, pool(40, 30))
    assert first[0].rows.tolist() == [0, *range(40, 47)] and first[32 * 7 - 1].restart and len(first) == 40 * 7
    first = sequence_of(agad, pool(100, 30))
    assert all((m.rows < 100).all() for m in first[:12]) and (first[12].rows >= 100).all()
