"""What bears the names of PEFT's merge_utils equals those functions, on tensors without ties."""

import jax
import numpy as np
import peft.utils.merge_utils as reference
import pytest
import torch

from unlearnjax.merging import merge

DRAW = np.random.default_rng(5)
DELTAS = DRAW.normal(size=(3, 14, 11)).astype(np.float32)
WEIGHTS = [1.0, -0.5, 0.25]


def expected(name: str, **settings) -> np.ndarray:
    tensors = [torch.from_numpy(x.copy()) for x in DELTAS]
    return getattr(reference, name)(tensors, torch.tensor(WEIGHTS), **settings).numpy()


def found(name: str, **settings) -> np.ndarray:
    return np.asarray(merge({"w": DELTAS}, name, semantics="peft", weights=WEIGHTS, **settings)["w"])


def test_task_arithmetic():
    for name in ("task_arithmetic", "linear"):
        np.testing.assert_allclose(found(name), expected("task_arithmetic"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_magnitude_prune(density):
    np.testing.assert_allclose(
        found("magnitude_prune", density=density), expected("magnitude_prune", density=density), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("method", ["total", "frequency"])
@pytest.mark.parametrize("density", [0.3, 0.8])
def test_ties(density, method):
    settings = {"density": density, "majority_sign_method": method}
    np.testing.assert_allclose(found("ties", **settings), expected("ties", **settings), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_on_the_same_draws(name, monkeypatch):
    """PEFT is given the entries that ours keeps of each candidate."""
    key = jax.random.key(4)
    alone = [[1.0 if i == j else 0.0 for j in range(3)] for i in range(3)]
    options = {"semantics": "peft", "density": 0.6, "key": key}
    kept = [np.asarray(merge({"w": DELTAS}, "dare_linear", weights=w, **options)["w"]) != 0 for w in alone]
    assert all(0.4 < mask.mean() < 0.8 for mask in kept)
    masks = iter(kept)
    monkeypatch.setattr(torch, "bernoulli", lambda x: torch.from_numpy(next(masks).astype(np.float32)))
    np.testing.assert_allclose(
        found(name, density=0.6, key=key), expected(name, density=0.6), rtol=1e-6, atol=1e-6
    )  # fmt: skip
