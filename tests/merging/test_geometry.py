"""Angles and lengths from low-rank factors against the full matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unlearnjax.adapters.lora import lora_weights
from unlearnjax.errors import UserError
from unlearnjax.merging.geometry import gram, lengths, step_angle, turning_angles


def stack(points=4, seed=0):
    rng = np.random.default_rng(seed)
    pair = lambda out, inner: {  # noqa: E731
        "a": jnp.asarray(rng.normal(size=(points, 2, 3, inner)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(points, 2, out, 3)), jnp.float32),
    }
    return {"layers": {"attention": {"q": pair(5, 7), "o": pair(7, 5)}, "mlp": {"up": pair(9, 7)}}}


def vectors(adapters):
    """Every delta as one long vector, and one per linear and layer."""
    weights = lora_weights(adapters)["layers"]
    modules = {
        f"{block}.{name}.{layer}": np.asarray(w["weight"], np.float64)[:, layer].reshape(4, -1)
        for block, linears in weights.items() for name, w in linears.items() for layer in range(2)
    }  # fmt: skip
    return np.concatenate(list(modules.values()), axis=1), modules


def angle(u, v):
    return np.degrees(np.arccos(u @ v / np.linalg.norm(u) / np.linalg.norm(v)))


def test_products_lengths_and_angles_are_those_of_the_full_deltas():
    adapters = stack()
    whole, modules = vectors(adapters)
    found = gram(adapters)
    np.testing.assert_allclose(found.whole, whole @ whole.T, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(lengths(found.whole), np.linalg.norm(whole, axis=1), rtol=1e-5)
    assert set(found.by_module) == set(modules)
    for name, own in modules.items():
        np.testing.assert_allclose(found.by_module[name], own @ own.T, rtol=1e-5, atol=1e-3)
        got = turning_angles(found.by_module[name], 1, 3)
        d1, d2, d3 = own[1], own[3] - own[1], own[3]
        wanted = {"d1_d2": angle(d1, d2), "d1_d3": angle(d1, d3), "d2_d3": angle(d2, d3)}
        assert got == pytest.approx(wanted, abs=0.01)
    assert step_angle(found.whole, (0, 1), (2, 3)) == pytest.approx(
        angle(whole[1] - whole[0], whole[3] - whole[2]), abs=0.01
    )


def test_a_straight_path_turns_by_nothing_and_a_step_back_by_180():
    adapters = stack()
    along = jnp.asarray([1.0, 2.0, 3.0, 1.0])
    line = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), adapters)
    line = {"layers": {k: {n: {"a": p["a"], "b": p["b"] * along[:, None, None, None]} for n, p in v.items()}
                       for k, v in line["layers"].items()}}  # fmt: skip
    found = gram(line).whole
    assert turning_angles(found, 1, 2) == pytest.approx({"d1_d2": 0.0, "d1_d3": 0.0, "d2_d3": 0.0}, abs=0.1)
    assert step_angle(found, (0, 2), (2, 3)) == pytest.approx(180, abs=0.1)
    assert step_angle(found, (0, 3), (1, 2)) is None  # from the first to an equal one


def test_an_adapter_without_linears_is_refused():
    with pytest.raises(UserError, match="no linears"):
        gram({"layers": {}})
