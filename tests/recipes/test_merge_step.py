"""The merges of a run: exact exports of linear merges, and what becomes of a merge when candidates have diverged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.adapters.apply import add_delta
from unlearnjax.distributed.mesh import make_mesh
from unlearnjax.errors import UserError
from unlearnjax.merging.lora_space import lora_delta
from unlearnjax.recipes import merge_step
from unlearnjax.recipes.evaluate_step import _summary
from unlearnjax.recipes.export_step import choose_export
from unlearnjax.recipes.merge_step import at_scale, delta_of, describe, export, merge_candidates
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.run import merge_all
from unlearnjax.recipes.train_step import Trained
from unlearnjax.training.loop import Result

RNG = np.random.default_rng(0)
STACK = {
    "layers": {
        "attention": {
            "q": {
                "a": jnp.asarray(RNG.normal(size=(3, 2, 4, 6)), jnp.float32),
                "b": jnp.asarray(RNG.normal(size=(3, 2, 5, 4)), jnp.float32),
            }
        }
    }
}
SCALE = jnp.asarray([1.0, 0.5, 2.0], jnp.float32)


def deltas():
    pair = STACK["layers"]["attention"]["q"]
    return np.asarray(SCALE)[:, None, None, None] * (np.asarray(pair["b"]) @ np.asarray(pair["a"]))


def recipe_with(*merges):
    return recipe_from({"candidates": [{"name": n} for n in ("one", "two", "three")], "merges": list(merges)}, "r")


@pytest.mark.parametrize("kept", [[0, 1, 2], [0, 2]])
@pytest.mark.parametrize(
    ("settings", "coefficients"),
    [
        ({}, lambda w: np.full(len(w), 1 / len(w))),
        ({"lambda": 0.5}, lambda w: np.full(len(w), 0.5 / len(w))),
        ({"weights": [3, 1, -1]}, lambda w: w / w.sum()),
        ({"weights": [3, 1, -1], "normalize": False, "lambda": 2}, lambda w: 2 * w),
        ({"semantics": "peft"}, lambda w: np.ones(len(w))),
        ({"semantics": "peft", "weights": [3, 1, -1]}, lambda w: w),
    ],
)
def test_a_linear_merge_is_exported_exactly(settings, coefficients, kept):
    """As one adapter of the ranks' sum whose delta is the merge's, whatever the weights mean."""
    (merge,) = recipe_with({"method": "linear", **settings}).merges
    merged = merge_candidates(merge, STACK, SCALE, kept, 0)
    exported = export(merged, STACK, SCALE, 4)
    by_hand = np.einsum("n,nlij->lij", coefficients(np.asarray([3.0, 1.0, -1.0])[kept]), deltas()[kept])
    np.testing.assert_allclose(merged.delta["layers"]["attention"]["q"]["weight"], by_hand, atol=1e-5)
    found = lora_delta(exported.lora, 1.0)["layers"]["attention"]["q"]["weight"]
    np.testing.assert_allclose(found, by_hand, atol=1e-5)
    assert exported.rank == 4 * len(kept) and exported.truncation_error < 1e-6


def test_a_rank_that_is_named_truncates():
    (merge,) = recipe_with({"method": "linear", "rank": 2}).merges
    exported = export(merge_candidates(merge, STACK, SCALE, [0, 1, 2], 0), STACK, SCALE, 4)
    assert exported.rank == 2 and exported.truncation_error > 0.1


@pytest.mark.parametrize("method", ["uniform", "task_arithmetic"])
def test_other_sums_are_exported_exactly_too(method):
    (merge,) = recipe_with({"method": method, "lambda": 0.5}).merges
    merged = merge_candidates(merge, STACK, SCALE, [0, 2], 0)
    exported = export(merged, STACK, SCALE, 4)
    assert exported.rank == 8 and exported.truncation_error < 1e-6
    found = lora_delta(exported.lora, 1.0)["layers"]["attention"]["q"]["weight"]
    np.testing.assert_allclose(found, merged.delta["layers"]["attention"]["q"]["weight"], atol=1e-5)


def test_a_merge_in_core_space_is_exported_as_it_is_unless_a_rank_is_named():
    core = {"method": "ties", "space": "core", "density": 0.5}
    whole, cut, small = (
        merge_candidates(m, STACK, SCALE, [0, 2], 0, [4, 4, 3])
        for m in recipe_with(core, {**core, "rank": 2, "name": "cut"}, {**core, "compress": 2}).merges
    )
    exported = export(whole, STACK, SCALE, 4)
    # The linear takes 6 numbers: no more directions than that, of the ranks' 4 + 3.
    assert exported.rank == 6 and exported.truncation_error < 1e-5 and whole.lora is None
    found = lora_delta(exported.lora, 1.0)["layers"]["attention"]["q"]["weight"]
    np.testing.assert_allclose(found, whole.delta["layers"]["attention"]["q"]["weight"], atol=1e-4)
    truncated = export(cut, STACK, SCALE, 4)
    assert truncated.rank == 2 and truncated.truncation_error > 0.1
    compressed = export(small, STACK, SCALE, 4)
    assert compressed.rank == 2 and compressed.truncation_error < 1e-5
    assert describe(small, compressed, ["a", "b", "c"])["hyperparameters"] == {"density": 0.5, "compress": 2}


@pytest.mark.parametrize("kind", [
    {"method": "linear"}, {"method": "ties", "density": 0.5}, {"method": "linear", "space": "factors"},
    {"method": "ties", "space": "factors", "density": 0.5}, {"method": "ties", "space": "core", "density": 0.5},
])  # fmt: skip
def test_a_merge_has_the_length_asked_for_and_its_own_direction(kind):
    own, long = (
        merge_candidates(m, STACK, SCALE, [0, 2], 0) for m in recipe_with(kind, {**kind, "length": 1.5}).merges
    )
    mean = np.mean([np.linalg.norm(deltas()[i]) for i in (0, 2)])

    def delta(merged):
        tree = merged.delta if merged.lora is None else lora_delta(merged.lora, 1.0)
        return np.asarray(tree["layers"]["attention"]["q"]["weight"]).ravel()

    assert own.length == pytest.approx(np.linalg.norm(delta(own)) / mean, rel=1e-5)
    assert np.linalg.norm(delta(long)) == pytest.approx(1.5 * mean, rel=1e-5) and long.length == pytest.approx(1.5)
    cosine = delta(own) @ delta(long) / np.linalg.norm(delta(own)) / np.linalg.norm(delta(long))
    assert cosine == pytest.approx(1, abs=1e-5)
    exported = export(long, STACK, SCALE, 4)
    if kind == {"method": "linear"}:  # side by side, exact at any length
        assert exported.truncation_error < 1e-6


def change(merged):
    (leaf,) = jax.tree.leaves(delta_of(merged))
    return np.asarray(leaf)


@pytest.mark.parametrize("kind", [
    {"method": "linear"}, {"method": "ties", "density": 0.5}, {"method": "linear", "space": "factors"},
    {"method": "consensus", "length": 2}, {"method": "ties", "space": "core", "density": 0.5},
])  # fmt: skip
def test_a_negated_merge_is_minus_the_scaled_one(kind):
    recipe = recipe_with(kind, {**kind, "negate": True, "scale": 0.9, "name": "minus"})
    plain, minus = (at_scale(merge_candidates(m, STACK, SCALE, [0, 1, 2], 0), m.scale) for m in recipe.merges)
    exported = export(minus, STACK, SCALE, 4)
    np.testing.assert_allclose(change(minus), -0.9 * change(plain), rtol=1e-5, atol=1e-6)
    assert minus.length == pytest.approx(0.9 * plain.length)
    if kind["method"] == "linear":  # side by side, exact with either sign
        found = lora_delta(exported.lora, 1.0)["layers"]["attention"]["q"]["weight"]
        np.testing.assert_allclose(found, change(minus), atol=1e-5)
    entry = describe(minus, exported, ["one", "two", "three"])
    assert entry["negated"] is True and entry["scale"] == 0.9 and "search" not in entry
    assert not {"negated", "scale"} & set(describe(plain, exported, ["one", "two", "three"]))


@pytest.mark.parametrize("kind", [{"method": "linear"}, {"method": "linear", "space": "factors"}])
def test_at_scale_0_a_merge_is_the_base_bit_for_bit(kind):
    base = {"layers": {"attention": {"q": {"weight": jnp.asarray(RNG.normal(size=(2, 5, 6)), jnp.float32)}}}}
    merged = merge_candidates(recipe_with({**kind, "negate": True}).merges[0], STACK, SCALE, [0, 1, 2], 0)
    moved = add_delta(base, delta_of(at_scale(merged, 0.0)))
    assert jax.tree.leaves(moved)[0].tobytes() == jax.tree.leaves(base)[0].tobytes()


def trained(*diverged_at):
    return Trained(STACK, SCALE, Result(None, [], list(diverged_at), 1.0, 1, 1.0, 1))


def test_a_merge_that_divergence_made_impossible_is_left_out_and_the_others_are_made():
    """The weights of those that are left sum to 0."""
    recipe = recipe_with({"method": "linear", "weights": [1, 1, -1]}, {"method": "ties", "density": 0.5})
    made, warnings = merge_all(recipe, trained(7, None, None))
    assert [(m.merge.method, m.candidates) for m, _ in made] == [("ties", [1, 2])]
    assert warnings[0] == "candidate one diverged after 7 updates; it is left out of every merge"
    assert "merge linear-delta was not made" in warnings[1] and "sum to 0" in warnings[1]
    assert len(merge_all(recipe, trained(None, None, None))[0]) == 2


def test_a_merge_of_some_candidates_is_the_merge_without_the_others():
    """Named in another order, with weights; one of them diverged in the second run."""
    some = {"method": "linear", "of": ["three", "one"], "weights": [3, 1]}
    whole = {"method": "linear", "name": "whole", "weights": [1, 0, 3]}
    ties = {"method": "ties", "density": 0.5, "of": ["one", "three"]}
    recipe = recipe_with(some, whole, ties)
    (first, _), (second, _), (third, _) = merge_all(recipe, trained(None, None, None))[0]
    assert first.candidates == third.candidates == [0, 2] and first.merge.name == "linear-three+one-delta"
    for a, b in zip(jax.tree.leaves(first.delta), jax.tree.leaves(second.delta), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    without = merge_candidates(recipe_with({"method": "ties", "density": 0.5}).merges[0], STACK, SCALE, [0, 2], 0)
    for a, b in zip(jax.tree.leaves(third.delta), jax.tree.leaves(without.delta), strict=True):
        np.testing.assert_array_equal(a, b)
    made, warnings = merge_all(recipe_with(some), trained(5, None, None))
    assert made[0][0].candidates == [2] and len(warnings) == 1


@pytest.mark.parametrize(("of", "says"), [
    (["one", "tree"], "tree"), (["one", "one"], "twice"), ([], "a list of candidates"), ("one", "a list of candidates"),
])  # fmt: skip
def test_a_merge_of_nobody_known_is_refused(of, says):
    with pytest.raises(UserError, match=says):
        recipe_with({"method": "linear", "of": of})


def test_no_candidate_left():
    recipe = recipe_with({"method": "linear"})
    made, warnings = merge_all(recipe, trained(1, 2, 3))
    assert made == [] and len(warnings) == 4 and "no candidate is left" in warnings[3]
    assert choose_export("best", [], []) is None


def test_each_candidate_that_is_left_is_an_option_of_its_own():
    """With nobody left there is no search, and the other merges are not disturbed by one that finds nothing."""
    each = {"method": "task_arithmetic", "of": "each", "scale": "search", "negate": True, "name": "single"}
    recipe = recipe_with(each, {"method": "consensus", "scale": "search", "name": "all"}, {"method": "linear"})
    asked = []

    def choose(options):
        asked.append([option.candidates for option in options])
        if len(options) == 1:
            raise UserError("nothing keeps enough")
        return at_scale(options[1], 0.0)

    made, warnings = merge_all(recipe, trained(None, 3, None), choose)
    assert asked == [[[0], [2]], [[0, 2]]]
    assert [(m.merge.name, m.candidates) for m, _ in made] == [("single", [2]), ("linear-delta", [0, 2])]
    assert warnings[1:] == [
        "merge single is the base: no scale that keeps enough forgets more",
        "merge all was not made: nothing keeps enough",
    ]
    assert made[0][1].truncation_error == 0.0 and not change(made[0][0]).any()
    made, warnings = merge_all(recipe, trained(1, 2, 3))
    assert made == [] and all("no candidate is left" in w for w in warnings[3:])


def test_the_merge_to_export():
    recipe = recipe_with({"method": "linear"}, {"method": "ties", "density": 0.5, "name": "ties"})
    merges = [m for m, _ in merge_all(recipe, trained(None, None, None))[0]]

    def models(**scores):
        keys = ("task_aggregate", "aggregate_without_mmlu", "aggregate")
        one = {"base": (0.9, 0.9, 0.9)} | scores
        return [{"name": n, "scores": dict(zip(keys, values, strict=True))} for n, values in one.items()]

    def best(linear, ties):
        return choose_export("best", merges, models(**{"linear-delta": linear, "ties": ties})).merge.name

    assert best((0.1, 0.5, 0.2), (0.9, 0.4, 0.3)) == "ties"  # the official aggregate, where there is one
    assert best((0.1, 0.5, None), (0.9, 0.4, None)) == "linear-delta"
    assert best((0.1, None, None), (0.2, None, None)) == "ties"
    assert choose_export("linear-delta", merges, []).merge.name == "linear-delta"
    assert choose_export("gone", merges, []) is None


def test_warnings_name_the_models():
    pairs = [("base", "low"), ("over", "low"), ("l", "odd"), ("under", "low")]
    assert _summary(pairs, 12) == ["base, over, under: low", "l: odd"]
    assert _summary([("base", "low"), ("over", "low")], 2) == ["low"]


def test_any_seed_of_a_recipe_makes_a_key():
    """TIES draws nothing, so only that the largest seed is taken."""
    (merge,) = recipe_with({"method": "ties", "density": 0.5}).merges
    one, two = (merge_candidates(merge, STACK, SCALE, [0, 1], seed) for seed in (0, 2**32 - 1))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.all(x == y)), one.delta, two.delta))


def test_full_deltas_are_merged_on_all_devices_and_none_holds_the_stack(monkeypatch):
    """Of candidates that trained different tensors."""
    rng = np.random.default_rng(3)
    draw = lambda *shape: {"weight": rng.normal(size=shape).astype(np.float32)}  # noqa: E731
    deltas = {i: {"layers": {"mlp": {"up": draw(2, 8, 6)}, "norm": draw(2, 8)}} for i in range(2)}
    deltas[2] = {"layers": {"norm": draw(2, 8)}}
    real, shares = merge_step.merge_stacked, []

    def spying(stack, *args, **more):
        shares.extend(x.addressable_shards[0].data.size / x.size for x in stack.values())
        return real(stack, *args, **more)

    monkeypatch.setattr(merge_step, "merge_stacked", spying)
    mesh = make_mesh({"candidate": 2, "fsdp": 4})
    for kind in ({"method": "ties", "density": 0.5}, {"method": "linear"}):
        wanted = recipe_with(kind).merges[0]
        alone = merge_candidates(wanted, STACK, SCALE, [0, 1, 2], 0, deltas=deltas)
        assert set(shares) == {1.0}
        shares.clear()
        meshed = merge_candidates(wanted, STACK, SCALE, [0, 1, 2], 0, deltas=deltas, mesh=mesh)
        assert set(shares) == {1 / 8}
        shares.clear()
        for a, b in zip(jax.tree.leaves(alone.delta), jax.tree.leaves(meshed.delta), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
