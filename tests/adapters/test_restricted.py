"""Training some layers: what trains, what stays, and what is not computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.adapters.full import full
from unlearnjax.adapters.restricted import change_on_host, restricted
from unlearnjax.data.schedule import Pace, plan
from unlearnjax.data.tokens import pack
from unlearnjax.errors import UserError
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.objectives.objective import objective
from unlearnjax.training.hyperparameters import index, stack
from unlearnjax.training.loop import train
from unlearnjax.training.reference import stores_for
from unlearnjax.training.state import init_state
from unlearnjax.training.step import Task, Work, loss_of

LAYERS = 4
CONFIG = ModelConfig("qwen3", 67, 32, 48, LAYERS, 4, 2, 8, "rms", qk_norm="head")
SETTINGS = {
    "learning_rate": 1e-3, "weight_decay": 0.0, "warmup_updates": 0, "total_updates": 8, "schedule": 0,
    "max_grad_norm": float("inf"), "term_weights": {"ga": 1.0, "gdr": 1.0}, "beta": 0.1, "lora_alpha": 1,
    "lora_rank": 1, "dropout": 0.0, "init_seed": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def base():
    return init_params(build(CONFIG).abstract(jnp.float32), jax.random.key(1))


def data():
    rng = np.random.default_rng(0)
    texts = {s: [rng.integers(0, 67, 12).tolist() for _ in range(8)] for s in ("forget", "retain")}
    return {s: pack(own, [5] * 8) for s, own in texts.items()}


def task(adapter):
    return Task(build(CONFIG, unroll=True), adapter, objective(("ga", "gdr")), False)


def gradient_of(adapter, base):
    """The gradient of one step's loss, and the operations that XLA counts for it."""
    own = task(adapter)
    stores = stores_for(own.model, base, data(), own.objective)
    h = index(stack([SETTINGS]), 0)
    state = init_state(adapter, base, h)
    rows = jnp.arange(4, dtype=jnp.int32)
    weight, flags = jnp.asarray([1.0, 0.0, 0.0, 0.0]), (jnp.asarray(True), jnp.asarray(0), jnp.asarray(1.0))
    work = Work({"forget": rows, "retain": rows}, jnp.zeros(4, jnp.int32), weight, *flags, jnp.asarray(False))

    def loss(trainable):
        return loss_of(own, base, trainable, stores, work, h, state, 12, 8)[0]

    compiled = jax.jit(jax.grad(loss)).lower(state.trainable).compile()
    return compiled(state.trainable), compiled.cost_analysis()["flops"]


@pytest.mark.parametrize(("modules", "blocks"), [("mlp", {"mlp"}), ("self_attn", {"attention"}), ("all", None)])
def test_the_gradient_is_full_trainings_at_what_trains(base, modules, blocks):
    whole, _ = gradient_of(full(), base)
    part, _ = gradient_of(restricted(CONFIG, [2, 1], modules), base)
    blocks = blocks or set(base["layers"])
    assert set(part["layers"]) == blocks
    for name in blocks:
        wanted = jax.tree.map(lambda x: x[1:3], whole["layers"][name])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), part["layers"][name], wanted)
        assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted)) > 1e-4


def test_there_is_no_backward_pass_below_the_lowest_trained_layer(base):
    flops = [gradient_of(restricted(CONFIG, layers), base)[1] for layers in ([3], [1], [0])]
    assert flops[0] < 0.75 * flops[1] and flops[1] < 0.95 * flops[2]


def test_optimizer_state_is_for_what_trains(base):
    h = index(stack([SETTINGS]), 0)
    state = init_state(restricted(CONFIG, [0, 1]), base, h)
    per_layer = sum(x[0].size for x in jax.tree.leaves(base["layers"]["mlp"]))
    for tree in (state.trainable, state.moments.mu, state.moments.nu, state.gradient):
        assert sum(x.size for x in jax.tree.leaves(tree)) == 2 * per_layer


@pytest.mark.parametrize("apart", [pytest.param(False, marks=pytest.mark.slow), True])
def test_candidates_train_and_the_rest_stays(base, apart):
    adapter = restricted(CONFIG, [1, 2])
    own, sides = task(adapter), data()
    params = own.model.apart(base) if apart else base
    stores = stores_for(own.model, base, sides, own.objective)
    candidates = [SETTINGS, {**SETTINGS, "learning_rate": 3e-3}]
    paces = [Pace(2, 1, 2, 0)] * 2
    many = train(own, params, stores, plan(sides, paces, buckets=1), stack(candidates))
    alone = train(own, params, stores, plan(sides, paces[:1], buckets=1), stack(candidates[:1]))
    first, second = (adapter.delta(base, index(many.states.trainable, i), None) for i in range(2))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        first, adapter.delta(base, index(alone.states.trainable, 0), None),
    )  # fmt: skip
    assert set(first["layers"]) == {"mlp"}
    for x, y in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert x.shape[0] == LAYERS
        assert not np.any(x[jnp.asarray([0, 3])]) and np.all(np.abs(x[1:3]).max(axis=(1, 2)) > 1e-3)
        assert float(jnp.abs(y).max()) > 1.5 * float(jnp.abs(x).max())


def test_layers_taken_apart_are_the_base_where_nothing_trains(base):
    adapter = restricted(CONFIG, [1])
    h = index(stack([SETTINGS]), 0)
    variables = adapter.apply(base, adapter.init(jax.random.key(0), base, h), h)
    tokens = jnp.arange(12, dtype=jnp.int32)[None]
    a, b = (build(CONFIG, unroll=True).forward(p, None, tokens).hidden for p in (base, variables.params))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("layers", "modules", "message"),
    [
        ([4], "mlp", "layer 4 of a model with 4; give 0 to 3"), ([-1], "mlp", "layer -1 of a model"),
        ([], "mlp", "names no layer"), ([1, 1], "mlp", "a layer twice"), ([1], "mpl", "unknown modules 'mpl'"),
    ],
)  # fmt: skip
def test_layers_that_cannot_be(layers, modules, message):
    with pytest.raises(UserError, match=message):
        restricted(CONFIG, layers, modules)


@pytest.mark.parametrize("modules", ["mlp", "all"])
def test_the_change_on_the_host_is_the_delta(base, modules):
    """Bit for bit, of a trainable that moved."""
    adapter, h = restricted(CONFIG, [2, 0], modules), index(stack([SETTINGS]), 0)
    start = adapter.init(jax.random.key(0), base, h)
    moved = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), start)
    wanted, found = adapter.delta(base, moved, h), change_on_host(base, moved, [2, 0])
    assert jax.tree.structure(wanted) == jax.tree.structure(found)
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(b[0]).max() > 0 and np.abs(b[1]).max() == 0
