"""A small VGG that was trained on images with a colour per class, and the same VGG in torch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from unlearnjax.data.labelled import Labelled, labelled
from unlearnjax.models.vision.classifier import new_classifier
from unlearnjax.models.vision.net import classifier_subject
from unlearnjax.models.vision.vgg import VGGConfig
from unlearnjax.training.images.fine_tune import fine_tune
from unlearnjax.training.images.settings import ImageCandidate

CLASSES = 4


def made(seed, rows):
    rng = np.random.default_rng(seed)
    labels = rng.integers(CLASSES, size=rows)
    colours = np.array([[40, 90, 200], [200, 60, 60], [90, 200, 40], [120, 120, 120]])
    pixels = colours[labels][:, None, None] + rng.normal(scale=40, size=(rows, 8, 8, 3))
    return labelled(np.clip(pixels, 0, 255).astype(np.uint8), labels)


@pytest.fixture(scope="package")
def retain():
    return made(1, 40)


@pytest.fixture(scope="package")
def forget():
    return made(2, 20)


@pytest.fixture(scope="package")
def subject(retain, forget):
    config = VGGConfig(CLASSES, stages=((4,), (6,)))
    start = classifier_subject(new_classifier("vgg", config, tuple("abcd"), 8, jax.random.key(0)))
    rows = Labelled(*(jnp.concatenate(parts) for parts in zip(retain, forget, strict=True)))
    (found,) = fine_tune(start, rows, [ImageCandidate("start", epochs=15)], batch_size=20, batch_norm="batch")
    return dataclasses.replace(start, trained=found.trained, fixed=found.fixed)


def in_torch(subject):
    """(weights by path, whose gradients torch tracks; the logits of images in [0, 1])."""
    weights = {
        path: torch.tensor(np.asarray(leaf), requires_grad=True)
        for path, leaf in (
            (tuple(k.key for k in p), x) for p, x in jax.tree_util.tree_leaves_with_path(subject.trained)
        )
    }
    running = jax.tree.map(lambda x: torch.tensor(np.asarray(x)), subject.fixed["statistics"])

    def logits(images):
        mean, std = (torch.tensor(x)[:, None, None] for x in (subject.net.mean, subject.net.std))
        x = (images.permute(0, 3, 1, 2) - mean) / std
        for stage in range(2):
            conv, norm = f"conv_{stage}_0", f"norm_{stage}_0"
            x = F.conv2d(x, weights[conv, "weight"], weights[conv, "bias"], padding=1)
            x = F.batch_norm(x, running[norm]["running_mean"], running[norm]["running_var"],
                             weights[norm, "weight"], weights[norm, "bias"])  # fmt: skip
            x = F.max_pool2d(F.relu(x), 2)
        return F.linear(x.mean((2, 3)), weights["classifier", "weight"], weights["classifier", "bias"])

    return weights, logits


@pytest.fixture
def theirs(subject):
    return in_torch(subject)
