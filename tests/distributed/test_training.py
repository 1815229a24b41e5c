"""Training on a mesh equals training on one device, whatever the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.adapters.lora import lora
from unlearnjax.adapters.restricted import restricted
from unlearnjax.data.schedule import Pace, plan
from unlearnjax.data.tokens import pack
from unlearnjax.distributed.mesh import make_mesh, parse_mesh
from unlearnjax.distributed.rules import of_params
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.objectives.objective import objective
from unlearnjax.training.hyperparameters import stack
from unlearnjax.training.loop import train
from unlearnjax.training.reference import stores_for
from unlearnjax.training.step import Task

CONFIG = ModelConfig("llama", 64, 32, 48, 2, 4, 2, 8, "rms")
TERMS = ("npo", "gdr", "klr", "klr_all")
MESHES = ("candidate=2,fsdp=2,tensor=2",)
SLOW = (
    "candidate=2,data=2,fsdp=2", "data=2,fsdp=4", "candidate=8", "data=8", "fsdp=8", "tensor=8", "candidate=4,tensor=2",
)  # fmt: skip


def sides():
    draw = np.random.default_rng(0)
    out = {}
    for name, count in (("forget", 16), ("retain", 20)):
        texts = [draw.integers(0, 64, draw.integers(6, 24)).tolist() for _ in range(count)]
        out[name] = pack(texts, [int(draw.integers(1, len(t) - 2)) for t in texts])
    return out


def candidate(i):
    return {
        "learning_rate": 2e-4 * (i + 1), "weight_decay": 0.01, "warmup_updates": 1, "total_updates": 6, "schedule": 1,
        "max_grad_norm": 1.0, "term_weights": {"npo": 0.4, "gdr": 0.2, "klr": 0.3, "klr_all": 0.1}, "beta": 0.1,
        "lora_alpha": 8, "lora_rank": 4 + i, "dropout": 0.05, "init_seed": i,
        "term_parameters": {"klr_all": {"width": 32.0}},
    }  # fmt: skip


def trained(mesh, *, count=8, adapter="lora", at_once=None, unroll=True):
    model = build(CONFIG, unroll=unroll)
    params = init_params(model.abstract(jnp.float32), jax.random.key(1))
    if mesh is not None:
        params = jax.device_put(params, of_params(make_mesh(parse_mesh(mesh)), model.abstract(jnp.float32)))
    data = sides()
    wanted = objective(TERMS)
    stores = stores_for(model, params, data, wanted)
    schedule = plan(data, [Pace(4, 1, 1, i) for i in range(count)], buckets=1)
    h = stack([candidate(i) for i in range(count)])
    own = lora(CONFIG, ("q", "v", "up", "down"), 12) if adapter == "lora" else restricted(CONFIG, [1], "all")
    result = train(Task(model, own, wanted, adapter == "lora", at_once), params, stores, schedule, h)
    return result


def same(found, expected, tolerance=1e-5):
    for a, b in zip(found.curves, expected.curves, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(a.gradient_norm, b.gradient_norm, rtol=1e-4, atol=tolerance)
    pairs = zip(jax.tree.leaves(found.states.trainable), jax.tree.leaves(expected.states.trainable), strict=True)
    for x, y in pairs:
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def alone():
    return trained(None)


@pytest.mark.parametrize("mesh", [*MESHES, *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in SLOW)])
def test_a_mesh_trains_what_one_device_trains(mesh, alone):
    found = trained(mesh)
    assert len(found.states.updates.sharding.device_set) == 8
    same(found, alone)


@pytest.mark.slow
def test_groups_of_candidates_and_a_number_that_does_not_divide():
    same(trained("candidate=4,data=2", at_once=1), trained(None))
    same(trained("candidate=4,fsdp=2", count=6), trained(None, count=6))


@pytest.mark.slow
def test_weights_that_train_whole_lie_like_the_base():
    found, expected = (trained(mesh, adapter="full", count=2) for mesh in ("candidate=2,fsdp=2,tensor=2", None))
    same(found, expected)
    up = found.states.trainable["layers"]["mlp"]["up"]["weight"]
    assert up.addressable_shards[0].data.size * 8 == up.size
