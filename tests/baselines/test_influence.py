"""WoodFisher's recurrence against numpy, and the whole step against torch."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional as F

from unlearnjax.baselines import BASELINES
from unlearnjax.baselines.influence import woodfisher

PLAIN = {"flip": 0.0, "crop_padding": 0}


def recurrence(v, gradients, n):
    """The code's, in double precision."""
    k, o = v.astype(np.float64), None
    for g in gradients.astype(np.float64):
        if o is None:
            o = g
        else:
            k, o = k - (k @ g) / (n + o @ g) * o, o - (o @ g) / (n + o @ g) * o
    return k


def test_woodfisher_is_the_recurrence():
    rng = np.random.default_rng(0)
    v, gradients = rng.normal(size=7).astype(np.float32), rng.normal(size=(30, 7)).astype(np.float32)

    def tree(x):
        return {"a": jnp.asarray(x[:6].reshape(2, 3)), "b": jnp.asarray(x[6:])}

    for n, count in ((10, 30), (1000, 30), (10, 1), (10, 2)):
        found = woodfisher(tree(v), (tree(g) for g in gradients[:count]), n)
        flat = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(found)])
        np.testing.assert_allclose(flat, recurrence(v, gradients[:count], n), rtol=1e-4, atol=1e-5)
    assert np.abs(recurrence(v, gradients, 10) - v).max() > 0.1
    np.testing.assert_array_equal(woodfisher({"a": v}, [], 10)["a"], v)


def test_the_step_equals_torchs(subject, retain, forget, theirs):
    weights, logits = theirs

    def gradient(data, rows):
        images = torch.tensor(np.asarray(data.pixels[rows])).float() / 255
        loss = F.cross_entropy(logits(images), torch.tensor(np.asarray(data.labels[rows])).long())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(weights.values()))]).numpy()

    n_f, n_r, damping = 20, 40, 6
    everything = np.arange(n_f), np.arange(n_r)
    v = gradient(forget, everything[0]) * n_f / (n_f + n_r)
    v -= gradient(retain, everything[1]) * n_r * n_f / ((n_f + n_r) * n_r)
    each = np.stack([gradient(retain, np.array([i])) for i in range(damping + 2)])
    expected = 3.0 * recurrence(v, each, damping)
    found = BASELINES["influence"].run(
        subject, retain, forget, seed=0, alpha=3.0, damping=damping, batch_size=16, **PLAIN
    )
    steps = [a - np.asarray(b) for a, b in zip(*map(jax.tree.leaves, (found.trained, subject.trained)), strict=True)]
    np.testing.assert_allclose(np.concatenate([x.ravel() for x in steps]), expected, rtol=1e-3, atol=1e-5)
    assert np.abs(expected).max() > 1e-2
    for a, b in zip(jax.tree.leaves(found.fixed), jax.tree.leaves(subject.fixed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_beyond_all_bounds_is_reported(subject, retain, forget):
    found = BASELINES["influence"].run(subject, retain, forget, seed=0, alpha=1e38, damping=6, batch_size=16, **PLAIN)
    assert found.diverged_at == 0
    for a, b in zip(jax.tree.leaves(found.trained), jax.tree.leaves(subject.trained), strict=True):
        np.testing.assert_array_equal(a, b)
