"""FGSM's labels against torch, and a class that comes and goes."""

import dataclasses

import jax
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from unlearnjax.baselines import BASELINES
from unlearnjax.baselines.boundary import adversarial_labels, expanded
from unlearnjax.errors import UserError


# No step of half a pixel value (0.1 is 25.5), which rounding takes either way.
@pytest.mark.parametrize("bound", [0.02, 0.12, 0.3])
def test_adversarial_labels_equal_torchs(subject, forget, theirs, bound):
    _, logits = theirs
    x = (torch.tensor(np.asarray(forget.pixels)).float() / 255).requires_grad_(True)
    F.cross_entropy(logits(x), torch.tensor(np.asarray(forget.labels)).long()).backward()
    moved = torch.round(torch.clamp(x + x.grad.sign() * bound, 0, 1) * 255) / 255
    with torch.no_grad():
        expected, plain = logits(moved).argmax(1).numpy(), logits(x).argmax(1).numpy()
    np.testing.assert_array_equal(adversarial_labels(subject, forget, bound), expected)
    if bound == 0.3:
        assert (expected != plain).any()


def test_shrinking_moves_rows_towards_the_labels_of_their_neighbours(subject, retain, forget):
    # Without augmentation every epoch has the same labels, which the model comes to give.
    settings = {"seed": 0, "flip": 0.0, "crop_padding": 0, "batch_size": 20, "learning_rate": 0.05, "epochs": 20}
    found = BASELINES["boundary_shrink"].run(subject, retain, forget, bound=0.5, **settings)
    assert len(found.losses) == 20 and found.losses[-1] < 0.7 * found.losses[0]


def test_an_expanded_model_has_one_more_class_and_the_same_logits(subject, forget):
    grown = expanded(subject, 0)
    pixels = forget.pixels.astype("float32")
    before, _ = subject.net.logits(subject.trained, subject.fixed, pixels)
    after, _ = grown.net.logits(grown.trained, grown.fixed, pixels)
    assert len(grown.labels) == after.shape[1] == before.shape[1] + 1
    np.testing.assert_allclose(after[:, :-1], before, atol=1e-6)
    head, inputs = grown.trained["classifier"], 6
    assert all(np.abs(x[-1]).max() <= inputs**-0.5 and np.any(x[-1] != 0) for x in head.values())


def test_the_new_class_is_gone_after_expanding(subject, retain, forget):
    found = BASELINES["boundary_expand"].run(
        subject, retain, forget, seed=0, epochs=30, batch_size=20, learning_rate=0.1, flip=0.0, crop_padding=0
    )
    assert jax.tree.map(np.shape, found.trained) == jax.tree.map(np.shape, subject.trained)
    assert found.losses[-1] < 0.5 < found.losses[0]  # the new class was learned


def test_expanding_needs_a_head_that_is_trained(subject, retain, forget):
    headless = dataclasses.replace(subject, trained={"conv_0_0": subject.trained["conv_0_0"]})
    for bad in (headless, subject.linearised()):
        with pytest.raises(UserError, match="needs a classifier with a head of its own"):
            BASELINES["boundary_expand"].run(bad, retain, forget, seed=0)
