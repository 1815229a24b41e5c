"""Fine-tuned baselines: which way the loss goes, what the penalty does, how BatchNorm is treated."""

import dataclasses

import jax
import numpy as np

from unlearnjax.baselines import BASELINES
from unlearnjax.evaluation.images import Sheet, score
from unlearnjax.training.images.fine_tune import fine_tune
from unlearnjax.training.images.settings import ImageCandidate

PLAIN = {"flip": 0.0, "crop_padding": 0}


def test_ascent_raises_the_forget_loss(subject, retain, forget):
    found = BASELINES["gradient_ascent"].run(
        subject, retain, forget, seed=0, learning_rate=0.01, epochs=15, batch_size=20, **PLAIN
    )
    assert len(found.losses) == 15 and found.losses[-1] > found.losses[0]
    before, after = (
        score(subject.net, trained, Sheet(forget, fixed)).confidence.mean()
        for trained, fixed in ((subject.trained, subject.fixed), (found.trained, found.fixed))
    )
    assert after < before


def test_finetune_is_sgd_on_the_retain_rows_with_batch_statistics(subject, retain, forget):
    found = BASELINES["finetune"].run(subject, retain, forget, seed=5, epochs=2, batch_size=20)
    candidate = ImageCandidate("x", 0.01, 5e-4, 2, 0.9, "constant", flip=0.5, crop_padding=4, seed=5)
    (same,) = fine_tune(subject, retain, [candidate], batch_size=20, batch_norm="batch")
    for a, b in zip(jax.tree.leaves(found[:2]), jax.tree.leaves((same.trained, same.fixed)), strict=True):
        np.testing.assert_array_equal(a, b)
    moved = jax.tree.map(lambda a, b: np.any(a != b), found.fixed, subject.fixed)
    assert all(jax.tree.leaves(moved))


def test_the_penalty_shrinks_all_weights_and_falls_with_the_updates(subject, retain, forget):
    def magnitudes(trained):
        return sum(float(np.abs(x).sum()) for x in jax.tree.leaves(trained))

    run = BASELINES["l1_sparse"].run
    without, light, heavy = (
        run(subject, retain, forget, seed=0, epochs=4, batch_size=20, l1=l1, **PLAIN) for l1 in (0.0, 1e-3, 1e-2)
    )
    assert magnitudes(heavy.trained) < magnitudes(light.trained) < magnitudes(without.trained)
    # Where the loss has no say (no learning signal reaches a dead head): SGD's steps of the penalty alone, by hand.
    dead = dataclasses.replace(subject, trained={**subject.trained, "classifier": jax.tree.map(
        lambda x: 0 * x, subject.trained["classifier"])})  # fmt: skip
    settings = {"epochs": 1, "batch_size": 20, "learning_rate": 1e-3, "momentum": 0.0, "weight_decay": 0.0, "l1": 0.1}
    found = run(dead, retain, forget, seed=0, **settings, **PLAIN)
    before, after = dead.trained["conv_0_0"]["weight"], found.trained["conv_0_0"]["weight"]
    # After the first update the head is no longer 0, and its gradients (below 1e-3) reach the convolution.
    np.testing.assert_allclose(before - after, 1e-3 * 0.1 * (1 + 0.5) * np.sign(before), atol=2e-5)
