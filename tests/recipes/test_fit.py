"""Candidates that do not fit together train in turns, and come out as if they had."""

import jax
import numpy as np
import pytest

from tests.recipes.test_mesh import LORA, numbers
from unlearnjax.distributed.choose import ways
from unlearnjax.distributed.estimate import estimate, tokens_of
from unlearnjax.distributed.programs import Workload
from unlearnjax.distributed.topology import CHIPS
from unlearnjax.io.safetensors import open_file
from unlearnjax.models import layers
from unlearnjax.models.abstract import weight_bytes
from unlearnjax.recipes import fit, train_step
from unlearnjax.recipes import run as module
from unlearnjax.recipes.fit import way_of, workloads
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.prepare import load_data, prepare
from unlearnjax.recipes.run import run

CHIP = CHIPS["v5e"]
RECIPE = {
    "name": "turns",
    "candidates": [
        {"name": "a", **LORA, "objective": {"npo": 0.5, "gdr": 0.3, "klr": 0.2}},
        {"name": "b", **LORA, "objective": {"ga": 1.0}, "rank": 2},
        {"name": "c", **LORA, "objective": {"npo": 1.0, "gdr": 1.0}, "learning_rate": 1e-3},
    ],
    "training": {"buckets": 1},
    "merges": [{"name": "mean", "method": "linear"}],
    "evaluation": {"max_new_tokens": 4},
}  # fmt: skip


def done(world, out, **training):
    base, _, sources = world
    said: list[str] = []
    recipe = recipe_from({**RECIPE, "training": {**RECIPE["training"], **training}}, "x")
    return run(base, sources, out, recipe, say=said.append), said


@pytest.fixture(scope="module")
def together(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("together") / "out"
    return out, done(world, out)[0]


def check(out, report, together):
    whole, expected = together
    np.testing.assert_allclose(numbers(report["models"]), numbers(expected["models"]), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(report["candidates"], expected["candidates"], strict=True):
        for curve in ("update", "loss", "gradient_norm"):  # and the terms of those it trains with
            np.testing.assert_allclose(ours["curves"][curve], theirs["curves"][curve], rtol=1e-3, atol=1e-5)
    for name in "abc":
        ours, theirs = (open_file(x / "candidates" / name / "adapter_model.safetensors") for x in (out, whole))
        ours, theirs = (np.concatenate([x.read(key).ravel() for key in sorted(x.slots)]) for x in (ours, theirs))
        # By norm: AdamW makes a full step of a gradient that is nothing but rounding.
        assert np.linalg.norm(ours - theirs) <= 1e-3 * np.linalg.norm(theirs), name


@pytest.mark.slow
@pytest.mark.parametrize("training", [{"candidates_at_once": 2}, {"remat": "linears", "tokens_at_once": 1}])
def test_in_turns(world, together, tmp_path, training):
    report, said = done(world, tmp_path / "out", **training)
    check(tmp_path / "out", report, together)
    assert said == []


def prepared(world, training=None, **candidates):
    base, _, sources = world
    plain = {**RECIPE, "training": {**RECIPE["training"], **(training or {})}}
    plain["candidates"] = [{**c, **candidates} for c in RECIPE["candidates"]]
    recipe = recipe_from(plain, "x")
    return recipe, prepare(recipe, base, load_data(sources), sources)


def test_the_way_is_the_recipes_or_the_fastest_that_fits(world, monkeypatch):
    config = world[0].config

    def found(**training):
        recipe, (group,) = prepared(world, training)
        return way_of(recipe, group, config, "float32", None, 1)

    assert found() == (None, None)  # a CPU
    assert found(remat="full", tokens_at_once=7) == ("full", 7)
    (work,) = workloads(*prepared(world), config, "float32", 1)
    held = [estimate(config, way, {}, CHIP).held for way in ways(config, work, {}, CHIP)]
    for memory in (1 << 40, max(held), sum(held) / len(held), min(held) * 1.2):
        chip = CHIP._replace(memory=memory)
        monkeypatch.setattr(fit, "this_chip", lambda devices, chip=chip: chip)
        remat, tokens = found()
        own = estimate(config, work._replace(remat=remat, tokens_at_once=tokens), {}, chip)
        assert own.held <= 0.9 * memory
        assert found(remat="full")[0] == "full" and found(tokens_at_once=7)[1] == 7
    assert (remat, tokens) != (None, None)


@pytest.mark.parametrize(
    ("candidates", "rows"),
    [
        ({"micro_batch": 2, "accumulation": 1}, 2),
        ({"micro_batch": 1, "accumulation": 4}, 4),  # micro-batches that go together
        (
            {
                "micro_batch": 1,
                "order": "chunked",
                "order_parameters": {"chunk": 4, "ratio": 3},
                "objective": "sugd",
                "schedule": "constant",
                "warmup_ratio": 0,
                "accumulation": 1,
            },
            4,
        ),
        ({"micro_batch": 2, "accumulation": 1, "objective": "rmu"}, 2),
    ],
)
def test_the_closed_form_is_told_a_steps_own_rows(world, monkeypatch, candidates, rows):
    config = world[0].config
    recipe, groups = prepared(world, {"layer": 1}, **candidates)
    for work, group in zip(workloads(recipe, groups, config, "float32", 1), groups, strict=True):
        step = group.schedule.steps[0]
        assert work.micro_batch == rows == {x.shape[1] for x in step.rows.values()}.pop()
        assert tokens_of(work) == sum(x.shape[1] for x in step.rows.values()) * work.length
    monkeypatch.setattr(fit, "this_chip", lambda devices: CHIP)
    assert way_of(recipe, groups[0], config, "float32", None, 1)[0] == "none"


def test_some_layers_are_judged_by_the_way_that_is_taken(world, monkeypatch):
    config = world[0].config
    recipe, (group,) = prepared(world, layers=[1])
    (work,) = workloads(recipe, [group], config, "float32", 1)
    assert work.remat == "none" == world[0].model.rebuilt(unroll=True).remat
    least = min(estimate(config, way, {}, CHIP).held for way in ways(config, work, {}, CHIP))
    monkeypatch.setattr(fit, "this_chip", lambda devices: CHIP._replace(memory=1.2 * least))
    remat, tokens = way_of(recipe, group, config, "float32", None, 1)
    assert (remat, tokens) == ("none", tokens_of(work))  # one at a time


@pytest.mark.slow
def test_a_run_goes_the_way_that_was_chosen(world, together, tmp_path, monkeypatch, fused):
    (work,) = workloads(*prepared(world), world[0].config, "float32", 1)
    least = min(estimate(world[0].config, way, {}, CHIP).held for way in ways(world[0].config, work, {}, CHIP))
    monkeypatch.setattr(fit, "this_chip", lambda devices: CHIP._replace(memory=1.2 * least))
    report, _ = done(world, tmp_path / "out")
    way = {"remat": "full", "tokens_at_once": tokens_of(work), "attention": "cuDNN"}
    assert report["training"]["ways"] == [way] and fused
    check(tmp_path / "out", report, together)
    assert together[1]["training"]["ways"] == [{"remat": "none", "tokens_at_once": None, "attention": "XLA"}]


@pytest.fixture
def fused(monkeypatch):
    """The fused kernel's calls, which XLA does here."""
    calls, kernel = [], jax.nn.dot_product_attention

    def instead(*arrays, implementation, **more):
        calls.append(implementation)
        return kernel(*arrays, implementation="xla", **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(layers, "FLASH_LEAST", 1)
    monkeypatch.setattr(train_step, "flash_suits", lambda *about: True)
    return calls


@pytest.mark.slow
def test_as_many_as_the_memory_holds(world, together, tmp_path, monkeypatch):
    asked = []

    def memory():
        asked.append(1)
        return 700_000

    monkeypatch.setattr(fit, "device_memory", memory)
    groups, all_of_them = [], []
    real = module.train_candidates

    def train(model, prepared, *more, **named):
        all_of_them.extend(prepared)
        groups.extend(len(p.group.places) for p in prepared)
        return real(model, prepared, *more, **named)

    monkeypatch.setattr(module, "train_candidates", train)
    report, said = done(world, tmp_path / "out")
    assert asked and len(groups) > 1 and max(groups) == report["recipe"]["training"]["candidates_at_once"]
    assert len(said) == 1 and f"more than {max(groups)} candidates at once do not fit" in said[0]
    check(tmp_path / "out", report, together)
    for memory, most in ((None, None), (1 << 60, None), (1, 1)):
        monkeypatch.setattr(fit, "device_memory", lambda memory=memory: memory)
        own = fit.candidates_at_once(recipe_from(RECIPE, "x"), all_of_them, world[0].config, "float32", None, 1)
        assert own == (most if max(groups) > 1 else None)
    # A gold model and candidates' best states take room too.
    three = Workload(3, rank=2, length=16)
    held = {
        (models, copies): estimate(world[0].config, three._replace(models=models, copies=copies), {}, CHIP).held
        for models, copies in ((1, 4), (2, 4), (1, 5))
    }
    assert held[2, 4] - held[1, 4] == weight_bytes(world[0].config, "bfloat16")
    assert 0 < held[1, 5] - held[1, 4] < held[1, 4]
