"""On a mesh every device keeps and computes its own share of a batch, from the prompts to the last row left."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.data.tokens import pack, to_device
from unlearnjax.distributed.mesh import make_mesh, parse_mesh
from unlearnjax.distributed.programs import Workload, generation_step
from unlearnjax.distributed.rules import filled, filled_number, of_params, row_shards, spread_rows
from unlearnjax.evaluation import generate as generation
from unlearnjax.evaluation import mmlu, nll
from unlearnjax.evaluation.full import token_stats
from unlearnjax.evaluation.generate import generate_candidates, places, programs
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.training import reference

CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 4, 8, "rms")
MODEL = build(CONFIG)
SCANNED = build(CONFIG, unroll=False)
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
NO_END = np.full(4, -1, np.int32)


def base(mesh=None):
    params = init_params(MODEL.abstract(jnp.float32), jax.random.key(3))
    return params if mesh is None else jax.device_put(params, of_params(mesh, MODEL.abstract(jnp.float32)))


def adapters(count):
    if not count:
        return None
    a, b = jax.random.split(jax.random.key(4))
    pair = {"a": jax.random.normal(a, (count, 2, 4, 32)), "b": jax.random.normal(b, (count, 2, 32, 4)) * 0.3}
    return {"layers": {"attention": {"q": pair}}}


def meshed(text):
    return make_mesh(parse_mesh(text))


def flops(lowered):
    return lowered.compile().cost_analysis()["flops"]


def share(state):
    """The largest part of any of the cache's arrays that a device holds."""
    leaves = jax.tree.leaves((state.cache.keys, state.cache.values))
    return max(leaf.addressable_shards[0].data.size / leaf.size for leaf in leaves)


@pytest.mark.parametrize(
    ("mesh", "count", "model"),
    [
        ("data=8", 0, MODEL), ("candidate=2,data=2,fsdp=2", 1, MODEL), slow("candidate=4,data=2", 4, MODEL),
        slow("candidate=2,fsdp=2,tensor=2", 3, SCANNED), slow("candidate=8", 1, SCANNED),
    ],
)  # fmt: skip
def test_a_smaller_batch_lies_apart_like_the_first_and_says_the_same(mesh, count, model, monkeypatch):
    monkeypatch.setattr(generation, "FIRST_LOOK", 4)
    monkeypatch.setattr(generation, "SHRINK", 2)
    draw = np.random.default_rng(0)
    prompts = [draw.integers(0, 64, draw.integers(2, 9)).tolist() for _ in range(16)]
    options = {"pad_token_id": 0, "max_new_tokens": 20, "batch_size": 16}
    free = generate_candidates(model, base(), adapters(count), prompts, eos_token_ids=(), **options)
    # Ends for all but a few rows of each candidate, all early.
    ends = sorted({row[1] for rows in free for row in rows[3:]})[:20]
    expected = generate_candidates(model, base(), adapters(count), prompts, eos_token_ids=ends, **options)

    mesh, sizes = meshed(mesh), []
    own = programs(model, mesh)

    def looking(name):
        def run(*args, **named):
            made = getattr(own, name)(*args, **named)
            state = made[0] if name == "run" else made
            assert share(state) == 1 / 8, name
            wanted = jax.tree.leaves(places(mesh, state))
            found = jax.tree.leaves(state)
            assert all(x.sharding.is_equivalent_to(place, x.ndim) for x, place in zip(found, wanted, strict=True)), name
            sizes.append(state.last.shape[1])
            return made

        return run

    watched = generation.Programs(*(looking(name) for name in generation.Programs._fields))
    monkeypatch.setattr(generation, "programs", lambda model, mesh: watched)
    assert generate_candidates(model, base(mesh), adapters(count), prompts, eos_token_ids=ends, **options) == expected
    assert sizes[0] == 16 and sizes[-1] < 16, sizes
    assert all(n % row_shards(mesh, filled_number(mesh, max(count, 1)), 16) == 0 for n in sizes)


@pytest.mark.parametrize("mesh", [slow("data=8"), slow("candidate=8"), "candidate=2,data=2,fsdp=2"])
def test_without_a_stack_every_device_computes_an_eighth(mesh):
    tokens = np.ones((16, 32), np.int32)
    mesh = meshed(mesh)

    def works(mesh):
        params, run, rows = base(mesh), programs(MODEL, mesh), np.arange(16, dtype=np.int32)
        arrays = spread_rows(params, tokens, tokens, rows)
        args = (params, None, *arrays, NO_END, None)
        out = {"prompts": flops(run.start.lower(*args, count=1))}
        state = run.grow(run.start(*args, count=1), slots=64)
        step = lambda state: flops(run.run.lower(params, None, state, np.int32(3), NO_END, None, size=64))  # noqa: E731
        out["step"] = step(state)
        order = np.arange(8, dtype=np.int32)[None]
        out["step of fewer rows"] = step(run.keep(state, order, order >= 0))
        counted = spread_rows(params, np.ones(tokens.shape, np.float32))
        out["likelihood"] = flops(nll.program(MODEL, mesh).lower(params, None, *arrays[:2], *counted, count=1))
        out["statistics"] = flops(token_stats.program(MODEL, mesh).lower(params, None, *arrays[:2], count=1))
        return out

    alone, found = works(None), works(mesh)
    assert alone["step of fewer rows"] > 0.4 * alone["step"]
    for name, all_of_it in alone.items():
        assert found[name] < 1.15 * all_of_it / 8, name


@pytest.mark.parametrize(
    ("mesh", "count"),
    [
        ("candidate=2,data=2,fsdp=2", 3), slow("candidate=2,tensor=4", 0), slow("data=8", 1), slow("fsdp=8", 2),
        slow("candidate=4,data=2", 4), slow("candidate=2,fsdp=2,tensor=2", 3), slow("data=2,fsdp=2,tensor=2", 0),
    ],
)  # fmt: skip
def test_likelihoods_statistics_and_letters_are_one_devices(mesh, count, monkeypatch):
    draw = np.random.default_rng(2)
    rows = [draw.integers(0, 64, n).tolist() for n in (30, 12, 25, 3, 17)]
    asked = mmlu.Prompts(rows, [str(i) for i in range(5)], [3, 4, 5, 6], [0, 1, 2, 3, 0], ["x"] * 5, 0)

    monkeypatch.setattr(mmlu, "_scores", lambda found, prompts: found)  # the letters' log-probabilities

    def measured(mesh):
        params, stack = base(mesh), adapters(count)
        return {
            "likelihoods": nll.token_nll_candidates(MODEL, params, stack, rows, [2, 5, 1, 1, 9], batch_size=4).mean,
            "statistics": token_stats.token_stats_candidates(MODEL, params, stack, rows, batch_size=4),
            "letters": mmlu.mmlu_candidates(MODEL, params, stack, asked, batch_size=4),
        }

    found, expected = measured(meshed(mesh)), measured(None)
    assert len(found["letters"]) == len(expected["letters"]) == max(count, 1)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)


def test_statistics_of_some_positions_at_a_time_send_nothing(monkeypatch):
    """Each device goes through its own rows' positions, however few of them at a time."""
    monkeypatch.setattr(token_stats, "LOGITS_AT_ONCE", 1)
    token_stats.program.cache_clear()
    mesh = meshed("data=8")
    rows = [np.zeros((16, 32), np.int32), np.ones((16, 32), np.int32)]
    arrays = spread_rows(base(mesh), *rows)
    text = token_stats.program(MODEL, mesh).lower(base(mesh), None, *arrays, count=1).compile().as_text()
    token_stats.program.cache_clear()
    assert '"known_trip_count":{"n":"31"}' in text.replace(" ", "")  # of one position of each row
    assert "all-" not in text


@pytest.mark.parametrize("mesh", [slow("data=8"), slow("candidate=8"), "candidate=2,fsdp=4"])
def test_the_bases_pass_before_training_is_spread_over_all_devices(mesh):
    mesh = meshed(mesh)
    draw = np.random.default_rng(1)
    tokens = pack([draw.integers(0, 64, 32).tolist() for _ in range(20)], [8] * 20)
    needs = frozenset(["nll", "distribution"])
    pass_of = jax.jit(reference._base_scores, static_argnums=(0, 4, 5, 6, 7, 8))

    def work(mesh):
        rows = jnp.arange(16, dtype=jnp.int32)
        return flops(pass_of.lower(MODEL, base(mesh), to_device(tokens), rows, 32, 24, needs, None, mesh))

    assert work(mesh) < 1.15 * work(None) / 8
    # Twelve at once do not divide among eight devices: as many more are taken.
    found, expected = (reference.base_reference(MODEL, base(m), tokens, needs, batch_size=12) for m in (mesh, None))
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-5)


def test_rows_take_the_candidates_axis_where_no_stack_has_it():
    mesh = meshed("candidate=4,data=2")
    params, rows = base(mesh), np.zeros((16, 3), np.int32)
    part = lambda x: x.addressable_shards[0].data.shape[0]  # noqa: E731
    assert part(spread_rows(params, rows)[0]) == 2
    assert part(spread_rows(params, rows, candidates=4)[0]) == 8
    assert row_shards(mesh, 1, 16) == 8 and row_shards(mesh, 4, 16) == 2 and row_shards(None, 4, 16) == 1
    # More rows than `data` divides, fewer than all devices: no less is cut than without the candidates' axis.
    assert row_shards(mesh, 1, 6) == 2
    stack = adapters(1)
    assert jax.tree.leaves(filled(params, stack))[0].shape[0] == 1


@pytest.mark.parametrize(("mesh", "count"), [("data=8", 1), ("candidate=4,data=2", 3), ("candidate=2,tensor=4", 2)])
def test_a_plan_lays_the_cache_as_the_run_does(mesh, count):
    mesh = meshed(mesh)
    work = Workload(count, rank=4, dtype="float32", batch=16, slots=32)
    planned = generation_step(CONFIG, mesh, work).held["cache"]
    params, tokens = base(mesh), np.ones((16, 32), np.int32)
    lora = filled(params, adapters(count))
    number = jax.tree.leaves(lora)[0].shape[0]
    arrays = spread_rows(params, tokens, tokens, np.arange(16, dtype=np.int32), candidates=number)
    state = programs(MODEL, mesh).start(params, lora, *arrays, NO_END, None, count=number)
    for x, shape in zip(jax.tree.leaves(state), jax.tree.leaves(planned), strict=True):
        assert x.shape == shape.shape and x.sharding.is_equivalent_to(shape.sharding, x.ndim)
