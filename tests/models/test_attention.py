"""The fused kernel's place: the same numbers where the mask is the causal one, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.test_decoder import CONFIG, FAMILY_CONFIGS, TOKENS
from unlearnjax.models import attention, layers
from unlearnjax.models.abstract import init_params
from unlearnjax.models.attention import attend, attend_causally, flash_suits
from unlearnjax.models.decoder import build

KERNEL = jax.nn.dot_product_attention


@pytest.fixture
def asked(monkeypatch):
    """The kernel's calls, done by XLA here."""
    calls = []

    def instead(*arrays, implementation, **more):
        calls.append(implementation)
        return KERNEL(*arrays, implementation="xla", **more)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    monkeypatch.setattr(layers, "FLASH_LEAST", TOKENS.shape[1])
    return calls


@pytest.mark.parametrize("group", [1, 3])
def test_it_attends_as_the_mask_does(key, asked, group):
    shape = {"query": (2, 2, group, 6, 8), "key": (2, 2, 8, 6), "value": (2, 2, 6, 8)}
    arrays = [jax.random.normal(k, s) for k, s in zip(jax.random.split(key, 3), shape.values(), strict=True)]
    mask = jnp.tril(jnp.ones((6, 6), bool))[None]
    np.testing.assert_allclose(attend_causally(*arrays, 0.3), attend(*arrays, mask, 0.3), atol=1e-5)
    assert asked == ["cudnn"]


@pytest.mark.parametrize("unroll", [True, False])
def test_it_is_taken_where_nothing_but_order_hides_a_key(key, asked, unroll):
    params = init_params(build(CONFIG).abstract(jnp.float32), key)
    plain, fused = build(CONFIG, unroll=unroll), build(CONFIG, unroll=unroll, flash=True)
    forward = lambda model, **more: model.forward(params, None, TOKENS, **more)  # noqa: E731
    np.testing.assert_allclose(forward(fused).hidden, forward(plain).hidden, atol=1e-5)
    assert asked == ["cudnn"] * (CONFIG.layers if unroll else 1)
    asked.clear()
    # The last layer asks at these positions alone.
    at = jnp.asarray([[1, 3]] * len(TOKENS))
    np.testing.assert_allclose(forward(fused, at=at).hidden, forward(plain, at=at).hidden, atol=1e-5)
    assert len(asked) == (CONFIG.layers - 1 if unroll else 1)
    asked.clear()
    segments = jnp.ones_like(TOKENS).at[:, 0].set(0)
    np.testing.assert_array_equal(forward(fused, segments=segments).hidden, forward(plain, segments=segments).hidden)
    forward(fused, cache=fused.init_cache(*TOKENS.shape, jnp.float32))
    fused.forward(params, None, TOKENS[:, 1:])  # too short
    assert asked == []


def test_a_sliding_window_is_no_causal_mask(key, asked):
    config = FAMILY_CONFIGS["windowed"]
    assert any(config.sliding)
    model = build(config, unroll=True, flash=True)
    model.forward(init_params(model.abstract(jnp.float32), key), None, TOKENS)
    assert asked == []


def test_it_suits_gpus_alone_that_compile_it(monkeypatch, asked):
    half = jnp.dtype("bfloat16")
    assert not flash_suits(128, half, [256])

    class Device:
        platform, compute_capability = "gpu", "9.0"
        client = type("Client", (), {"platform_version": "PJRT C API cuda 13000"})

    monkeypatch.setattr(attention, "_device", lambda: Device)
    with jax.numpy_dtype_promotion("standard"):  # for JAX's own code
        assert flash_suits(128, half, [256, 64]) and len(asked) == 1  # short rows do not ask it
    assert not flash_suits(128, jnp.dtype("float32"), [256]) and not flash_suits(128, half, [64])
    assert not flash_suits(256, half, [256]) and not flash_suits(20, half, [256])

    def missing(*arrays, **more):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(jax.nn, "dot_product_attention", missing)
    assert not flash_suits(128, half, [264])
    Device.compute_capability = "7.5"
    assert not flash_suits(128, half, [256])
