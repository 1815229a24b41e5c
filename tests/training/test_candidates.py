"""A candidate among N equals itself alone, whatever its neighbours' settings; a diverging neighbour changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.adapters.lora import lora
from unlearnjax.data.schedule import Pace, plan
from unlearnjax.data.tokens import pack
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.objectives.objective import objective
from unlearnjax.training.hyperparameters import index, stack
from unlearnjax.training.loop import train
from unlearnjax.training.reference import stores_for
from unlearnjax.training.step import Task, together

CONFIG = ModelConfig("olmo", 67, 32, 48, 2, 4, 4, 8, "layer")
BASE = {
    "learning_rate": 3e-3, "weight_decay": 0.01, "warmup_updates": 2, "total_updates": 40, "schedule": 1,
    "max_grad_norm": float("inf"), "term_weights": {"npo": 0.4, "gdr": 0.2, "klr": 0.4}, "beta": 0.1,
    "lora_alpha": 8, "lora_rank": 8, "dropout": 0.0, "init_seed": 3,
}  # fmt: skip
OTHERS = [
    {"learning_rate": 1e-4, "lora_rank": 4, "lora_alpha": 16, "init_seed": 5, "schedule": 2},
    {"term_weights": {"npo": 1.0}, "beta": 0.5, "weight_decay": 0.3, "lora_rank": 2},
    {"max_grad_norm": 0.1, "warmup_updates": 10, "schedule": 0, "init_seed": 9},
]


def sides(seed=0, rows=(24, 20)):
    rng = np.random.default_rng(seed)
    out = {}
    for name, count in zip(("forget", "retain"), rows):
        texts = [rng.integers(0, 67, rng.integers(6, 30)).tolist() for _ in range(count)]
        out[name] = pack(texts, [int(rng.integers(1, len(t) - 2)) for t in texts])
    return out


def run(candidates, paces, terms=("npo", "gdr", "klr"), dropout=False, seed=0, data=None, at_once=None):
    model = build(CONFIG)
    params = init_params(model.abstract(jnp.float32), jax.random.key(1))
    # A trained head is not random: spread the logits so that the losses have somewhere to go.
    params["head"]["weight"] = params["head"]["weight"] * 8.0
    wanted = objective(terms)
    data = data or sides()
    stores = stores_for(model, params, {s: data[s] for s in wanted.sides}, wanted)
    adapter = lora(CONFIG, ("q", "v", "up", "down"), max(c["lora_rank"] for c in candidates))
    schedule = plan({s: data[s] for s in wanted.sides}, paces, buckets=1, seed=seed)
    h = stack(candidates)
    result = train(Task(model, adapter, wanted, dropout, at_once), params, stores, schedule, h)
    deltas = [
        jax.tree.map(np.asarray, adapter.delta(params, index(result.states.trainable, i), index(h, i)))
        for i in range(len(candidates))
    ]
    return result, deltas, schedule


def largest_difference(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_candidate_among_four_equals_itself_alone(dropout):
    candidates = [{**BASE, "dropout": dropout}, *({**BASE, "dropout": 0.2, **o} for o in OTHERS)]
    paces = [Pace(2, 2, 4, 7), Pace(1, 4, 4, 8), Pace(4, 1, 4, 9), Pace(2, 2, 2, 10)]
    together, deltas, schedule = run(candidates, paces, dropout=True)
    alone, (delta,), own = run(candidates[:1], paces[:1], dropout=True)
    assert own.updates[0] == schedule.updates[0] == 24  # at least the 20 updates asked for
    assert largest_difference(delta, jax.tree.map(np.zeros_like, delta)) > 1e-2
    assert largest_difference(deltas[0], delta) <= 1e-5
    np.testing.assert_allclose(together.curves[0].loss, alone.curves[0].loss, rtol=1e-4)
    assert largest_difference(deltas[0], deltas[1]) > 1e-3


def test_candidates_in_groups_equal_candidates_all_together():
    candidates = [{**BASE, "init_seed": i} for i in range(3)]
    paces = [Pace(2, 1, 1, i) for i in range(3)]
    _, whole, schedule = run(candidates, paces)
    tokens = 2 * 2 * schedule.steps[0].width
    task = Task(None, None, None, False, 2 * tokens + 1)
    assert [together(task, n, tokens) for n in (1, 2, 3, 4, 5, 8)] == [1, 2, 2, 2, 2, 2]
    assert [together(task._replace(tokens_at_once=x), 8, tokens) for x in (1, 4 * tokens, 5 * tokens)] == [1, 4, 4]
    assert [together(task._replace(tokens_at_once=4 * tokens), n, tokens, 2) for n in (6, 7, 8)] == [3, 1, 4]
    _, grouped, _ = run(candidates, paces, at_once=2 * tokens)  # a group of two, and one that is left over
    for a, b in zip(whole, grouped):
        assert largest_difference(a, b) <= 1e-6


def test_a_diverging_neighbour_changes_nothing_and_keeps_its_last_good_state():
    paces = [Pace(2, 2, 3, 7), Pace(2, 2, 3, 8)]
    wild = {**BASE, "learning_rate": 1e30, "schedule": 0, "warmup_updates": 0}
    result, deltas, _ = run([BASE, wild], paces)
    calm, (delta, _), _ = run([BASE, {**BASE, "init_seed": 4}], paces)
    assert calm.diverged_at == [None, None]
    assert result.diverged_at[0] is None
    assert result.diverged_at[1] is not None and result.diverged_at[1] >= 1
    assert largest_difference(deltas[0], delta) <= 1e-6
    np.testing.assert_allclose(result.curves[0].loss, calm.curves[0].loss, rtol=1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.device_get(result.states.trainable)))
    assert int(result.states.updates[1]) == result.diverged_at[1] == len(result.curves[1].update)


def test_a_finished_candidate_stops_changing():
    paces = [Pace(2, 2, 1, 7), Pace(2, 2, 3, 8)]
    result, deltas, schedule = run([BASE, BASE], paces)
    _, (delta, _), _ = run([BASE, BASE], [Pace(2, 2, 1, 7), Pace(2, 2, 1, 8)])
    assert schedule.updates.tolist() == [6, 18] == result.states.updates.tolist()
    assert largest_difference(deltas[0], delta) <= 1e-6


def test_rank_padding_stays_zero():
    result, _, _ = run([BASE, {**BASE, "lora_rank": 2}], [Pace(2, 1, 1, 7), Pace(2, 1, 1, 7)])
    for pair in jax.tree.leaves(result.states.trainable["layers"], is_leaf=lambda x: isinstance(x, dict) and "a" in x):
        assert bool(jnp.all(pair["a"][1, :, 2:] == 0.0)) and bool(jnp.all(pair["b"][1, :, :, 2:] == 0.0))
        assert bool(jnp.any(pair["b"][1, :, :, :2] != 0.0))


def test_accumulated_micro_batches_equal_one_large_batch():
    """For a row-mean loss, micro-batch 1 x 4 is micro-batch 4 x 1; for a token mean it is not, and must not be."""
    data = sides()
    only_npo = {**BASE, "term_weights": {"npo": 1.0}}
    paces = [Pace(1, 4, 2, 7), Pace(4, 1, 2, 7)]
    _, (fine, coarse), _ = run([only_npo, only_npo], paces, terms=("npo",), data=data)
    assert largest_difference(fine, coarse) <= 1e-5
    only_gdr = {**BASE, "term_weights": {"gdr": 1.0}}
    _, (fine, coarse), _ = run([only_gdr, only_gdr], paces, terms=("gdr",), data=data)
    assert largest_difference(fine, coarse) > 1e-5
