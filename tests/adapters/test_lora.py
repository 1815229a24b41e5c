"""LoRA as functions: start, scale, padding to a common rank, delta, names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.adapters.apply import add_delta
from unlearnjax.adapters.full import full
from unlearnjax.adapters.lora import lora, lora_weights, resolve_targets, scaled
from unlearnjax.distributed.mesh import make_mesh, parse_mesh
from unlearnjax.distributed.rules import of_candidates, of_params
from unlearnjax.errors import UserError
from unlearnjax.merging import merge_lora
from unlearnjax.models.abstract import init_params
from unlearnjax.models.config import ModelConfig
from unlearnjax.models.decoder import build
from unlearnjax.models.protocol import Dropout
from unlearnjax.training.hyperparameters import index, stack

CONFIG = ModelConfig("llama", 31, 16, 24, 2, 4, 2, 4, "rms")
VALUES = {
    "learning_rate": 1.0, "weight_decay": 0.0, "warmup_updates": 0, "total_updates": 1, "schedule": 0,
    "max_grad_norm": 1.0, "term_weights": {"npo": 1.0}, "beta": 0.1, "lora_alpha": 6, "lora_rank": 3,
    "dropout": 0.0, "init_seed": 0,
}  # fmt: skip
H = index(stack([VALUES]), 0)
TARGETS = ("q", "k", "o", "down")


@pytest.fixture(scope="module")
def model():
    built = build(CONFIG)
    return built, init_params(built.abstract(jnp.float32), jax.random.key(0))


def random_b(tree, key):
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten([x + 0.1 * jax.random.normal(k, x.shape, jnp.float32) for x, k in zip(leaves, keys)])


def test_starts_at_the_base_and_like_peft(model):
    built, params = model
    adapter = lora(CONFIG, TARGETS, 4)
    trainable = adapter.init(jax.random.key(1), params, H)
    pair = trainable["layers"]["mlp"]["down"]
    assert pair["a"].shape == (2, 4, 24) and pair["b"].shape == (2, 16, 4)
    live = np.asarray(pair["a"][:, :3])
    bound = 24**-0.5
    assert np.abs(live).max() <= bound and np.abs(live).max() > 0.9 * bound
    assert np.std(live) == pytest.approx(bound / 3**0.5, rel=0.15)  # uniform
    assert not np.any(pair["a"][:, 3:]) and not np.any(pair["b"])
    tokens = jnp.asarray([[1, 2, 3, 4]], jnp.int32)
    variables = adapter.apply(params, trainable, H)
    base = built.forward(params, None, tokens).hidden
    np.testing.assert_array_equal(built.forward(variables.params, variables.lora, tokens).hidden, base)


def test_start_does_not_depend_on_the_largest_rank(model):
    _, params = model
    small = lora(CONFIG, TARGETS, 3).init(jax.random.key(1), params, H)
    large = lora(CONFIG, TARGETS, 8).init(jax.random.key(1), params, H)
    for block, names in small["layers"].items():
        for name, pair in names.items():
            np.testing.assert_array_equal(pair["a"], large["layers"][block][name]["a"][:, :3])


def test_forward_equals_the_delta_added_to_the_weights(model):
    built, params = model
    adapter = lora(CONFIG, TARGETS, 3)
    trainable = random_b(adapter.init(jax.random.key(1), params, H), jax.random.key(2))
    variables = adapter.apply(params, trainable, H)
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6]], jnp.int32)
    merged = add_delta(params, adapter.delta(params, trainable, H))
    with_adapter = built.forward(variables.params, variables.lora, tokens).hidden
    np.testing.assert_allclose(with_adapter, built.forward(merged, None, tokens).hidden, atol=2e-5)
    np.testing.assert_allclose(
        adapter.delta(params, trainable, H)["layers"]["attention"]["q"]["weight"][1],
        2.0 * trainable["layers"]["attention"]["q"]["b"][1] @ trainable["layers"]["attention"]["q"]["a"][1],
        atol=1e-6,
    )
    assert "v" not in adapter.delta(params, trainable, H)["layers"]["attention"]
    jax.tree.map(
        np.testing.assert_array_equal, lora_weights(scaled(trainable, 2.0)), adapter.delta(params, trainable, H)
    )


def test_dropout_keeps_the_mean_and_depends_on_its_key(model):
    built, params = model
    adapter = lora(CONFIG, ("q",), 3)
    trainable = random_b(adapter.init(jax.random.key(1), params, H), jax.random.key(2))
    variables = adapter.apply(params, trainable, H)
    tokens = jnp.asarray([[1, 2, 3, 4]], jnp.int32)
    run = jax.jit(lambda key, rate: built.forward(params, variables.lora, tokens, dropout=Dropout(key, rate)).hidden)
    rate = jnp.asarray(0.3, jnp.float32)
    none = built.forward(params, variables.lora, tokens).hidden
    np.testing.assert_allclose(run(jax.random.key(0), jnp.zeros((), jnp.float32)), none, atol=1e-5)
    draws = jax.vmap(lambda k: run(k, rate))(jax.random.split(jax.random.key(0), 256))
    assert float(jnp.std(draws, axis=0).max()) > 0
    np.testing.assert_array_equal(run(jax.random.key(3), rate), run(jax.random.key(3), rate))


def test_dropout_masks_have_the_rate_and_are_independent():
    """Rate, neighbours, and pairs of masks that differ in layer, linear or seed: within 5 standard deviations."""
    from unlearnjax.models.layers import drop

    rate, shape = 0.3, (512, 1024)
    deviation = lambda p: 5 * (p * (1 - p) / (shape[0] * shape[1])) ** 0.5  # noqa: E731
    root = jax.random.key(0)
    keys = [root, jax.random.key(1), *(jax.random.fold_in(root, i) for i in range(4))]
    one = jax.jit(lambda k: (drop(jnp.ones(shape), Dropout(k, jnp.float32(rate)), "q"),
                             drop(jnp.ones(shape), Dropout(k, jnp.float32(rate)), "k")))  # fmt: skip
    masks = [np.asarray(m) for k in keys for m in one(k)]
    assert {round(float(v), 5) for v in np.unique(masks[0])} == {0.0, round(1 / (1 - rate), 5)}
    gone = [m == 0.0 for m in masks]
    for i, mask in enumerate(gone):
        assert abs(mask.mean() - rate) < deviation(rate)
        for axis in (0, 1):
            both = mask & np.roll(mask, 1, axis=axis)
            assert abs(both.mean() - rate**2) < deviation(rate**2)
        for other in gone[:i]:
            assert abs((mask & other).mean() - rate**2) < deviation(rate**2)
        # By feature and by token too: a hash that left a column's bits fixed would pass the means above.
        assert np.abs(mask.mean(axis=0) - rate).max() < 6 * (rate * (1 - rate) / shape[0]) ** 0.5
        assert np.abs(mask.mean(axis=1) - rate).max() < 6 * (rate * (1 - rate) / shape[1]) ** 0.5


def test_full_training_starts_at_the_base_and_its_delta_is_the_difference(model):
    _, params = model
    adapter = full()
    trainable = adapter.init(jax.random.key(0), params, H)
    assert all(not np.any(x) for x in jax.tree.leaves(adapter.delta(params, trainable, H)))
    moved = jax.tree.map(lambda x: x + 1.0, trainable)
    assert all(np.allclose(x, 1.0, atol=1e-6) for x in jax.tree.leaves(adapter.delta(params, moved, H)))


def test_a_delta_with_unknown_leaves_is_refused(model):
    _, params = model
    with pytest.raises(ValueError, match="bogus"):
        add_delta(params, {"bogus": jnp.zeros(3)})


def test_targets():
    assert resolve_targets("all", CONFIG) == ("q", "k", "v", "o", "gate", "up", "down")
    assert resolve_targets(["v_proj", "q"], CONFIG) == ("q", "v")
    with pytest.raises(UserError, match="unknown linear 'qq'"):
        resolve_targets(["qq"], CONFIG)
    with pytest.raises(UserError, match="'lm_head' is not supported"):
        resolve_targets(["lm_head"], CONFIG)
    with pytest.raises(UserError, match="no linear"):
        resolve_targets([], CONFIG)


@pytest.mark.parametrize("sizes", ["candidate=4,fsdp=2", "fsdp=8", "fsdp=2,tensor=4", "data=8"])
@pytest.mark.parametrize("kind", ["merged", "host", "one device"])
def test_changed_weights_lie_where_the_base_did(sizes, kind):
    config = ModelConfig("llama", 64, 32, 64, 2, 4, 4, 8, "rms")
    mesh, abstract = make_mesh(parse_mesh(sizes)), build(config).abstract(jnp.bfloat16)
    base = jax.device_put(init_params(abstract, jax.random.key(0)), of_params(mesh, abstract))
    draw = lambda *shape: jax.random.normal(jax.random.key(shape[-1]), shape)  # noqa: E731
    lora = {"layers": {"mlp": {
        "up": {"a": draw(4, 2, 3, 32), "b": draw(4, 2, 64, 3)}, "down": {"a": draw(4, 2, 3, 64), "b": draw(4, 2, 32, 3)}
    }}}  # fmt: skip
    if kind == "merged":
        lora = jax.device_put(lora, of_candidates(mesh, abstract, lora))
    delta = merge_lora(lora, jnp.ones(4), "ties", "delta", density=0.5)
    if kind == "host":
        delta = jax.device_get(delta)
    moved = add_delta(base, delta)
    for one, other in zip(jax.tree.leaves(base), jax.tree.leaves(moved), strict=True):
        assert one.sharding == other.sharding and one.dtype == other.dtype
    up = base["layers"]["mlp"]["up"]["weight"]
    expected = (np.asarray(up, np.float32) + np.asarray(delta["layers"]["mlp"]["up"]["weight"])).astype(up.dtype)
    np.testing.assert_array_equal(np.asarray(moved["layers"]["mlp"]["up"]["weight"]), expected)
