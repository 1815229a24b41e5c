"""The saliency mask against torch's gradients, and what it does to training."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from unlearnjax.baselines import BASELINES
from unlearnjax.baselines.gradients import views
from unlearnjax.baselines.protocol import Job
from unlearnjax.baselines.salun import saliency_mask

PLAIN = {"flip": 0.0, "crop_padding": 0}


def job(subject, retain, forget, **settings):
    chosen = dataclasses.replace(BASELINES["salun"].settings, **settings)
    return Job("salun", subject, retain, forget, chosen, 0, None, False)


@pytest.mark.parametrize(("share", "augmented"), [(0.1, False), (0.5, True), (1.0, False)])
def test_the_mask_is_torchs(subject, retain, forget, theirs, share, augmented):
    weights, logits = theirs
    own = job(subject, retain, forget, batch_size=16, mask=share, **({} if augmented else PLAIN))
    data = views(forget, own.settings, 0)
    assert augmented != np.array_equal(data.pixels, forget.pixels)
    images = torch.tensor(np.asarray(data.pixels)).float() / 255
    labels = torch.tensor(np.asarray(data.labels)).long()
    for part in (slice(0, 16), slice(16, 20)):  # the sum of two batches' means
        (-F.cross_entropy(logits(images[part]), labels[part])).backward()
    flat = torch.cat([w.grad.abs().flatten() for w in weights.values()])
    ranks = torch.argsort(torch.argsort(-flat))
    kept = (ranks < int(share * flat.numel())).numpy()
    found = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(saliency_mask(own))])
    assert found.dtype == np.float32 and set(found) <= {0.0, 1.0}
    # Rounding may swap weights whose gradients are all but equal to the threshold, and nothing else.
    threshold = flat[torch.tensor(kept)].min().item()
    unequal = flat.numpy()[(found == 1) != kept]
    np.testing.assert_allclose(unequal, threshold, rtol=1e-4, atol=1e-7)
    assert unequal.size <= 2


@pytest.mark.parametrize("name", ["salun", "salun_forget"])
def test_weights_outside_of_the_mask_stay_bit_for_bit(subject, retain, forget, name):
    found = BASELINES[name].run(
        subject,
        retain,
        forget,
        seed=0,
        epochs=1,
        batch_size=20,
        mask=0.3,
        learning_rate=0.05,
        weight_decay=0.1,
        **PLAIN,
    )
    mask = saliency_mask(job(subject, retain, forget, batch_size=20, mask=0.3, **PLAIN))
    moved = 0
    for before, after, kept in zip(*map(jax.tree.leaves, (subject.trained, found.trained, mask)), strict=True):
        before, fixed = np.asarray(before), np.asarray(kept) == 0
        assert before[fixed].tobytes() == after[fixed].tobytes()
        moved += int((before != after).sum())
    assert moved >= 0.29 * sum(x.size for x in jax.tree.leaves(mask))


def test_the_whole_mask_is_random_labels(subject, retain, forget):
    settings = {"seed": 0, "epochs": 1, "batch_size": 20, **PLAIN}
    with_mask = BASELINES["salun"].run(subject, retain, forget, mask=1.0, **settings)
    without = BASELINES["random_label"].run(subject, retain, forget, **settings)
    for a, b in zip(jax.tree.leaves(with_mask.trained), jax.tree.leaves(without.trained), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
