"""Forgetting by other labels: data whose forget rows' labels differ from epoch to epoch, and random labels (RL)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from unlearnjax.baselines.protocol import Job, Unlearned
from unlearnjax.data.labelled import Labelled
from unlearnjax.training.images.fine_tune import Order

LABELS = (0, 1)  # a stream of draws apart from those of each epoch's order


class Epochs(NamedTuple):
    """Rows for all epochs: those that stay the same first, then each epoch's own."""

    data: Labelled
    order: Order


def epochs_of(same: Labelled, own: list[Labelled], *, shuffled: bool) -> Epochs:
    """Epoch e has all rows of `same` and of own[e]: own rows first, each shuffled, or all shuffled together.

    `own` is held in memory for all epochs at once: 140 MB for 10 epochs of 4500 images of CIFAR-10.
    """
    kept, count = int(same.labels.shape[0]), int(own[0].labels.shape[0])
    data = Labelled(*(jnp.concatenate(parts) for parts in zip(same, *own, strict=True)))

    def order(seed: int, epoch: int) -> Int[np.ndarray, " rows"]:
        rng = np.random.default_rng([seed, epoch])
        first = kept + epoch * count + np.arange(count)
        if shuffled:
            return rng.permutation(np.concatenate([first, np.arange(kept)]))
        return np.concatenate([rng.permutation(first), rng.permutation(kept)])

    return Epochs(data, order)


def random_labels(seed: int, epochs: int, rows: int, classes: int) -> Int[np.ndarray, "epochs rows"]:
    """Uniform over all classes and drawn anew for every epoch: one in `classes` is the true label by chance."""
    return np.random.default_rng([seed, *LABELS]).integers(classes, size=(epochs, rows), dtype=np.int32)


def random_label(job: Job, mask: PyTree[Array] | None = None) -> Unlearned:
    """Train on the forget rows with random labels and on the retain rows with their own (RL: Golatkar et al.
    1911.04933; Unlearn-Saliency unlearn/RL.py, its branch for CIFAR-10).

    "forget first" is that branch; "shuffled" is the one for CIFAR-100, and was CIFAR-10's in the first release. Where
    the forget rows end inside of a batch, retain rows fill it; the code begins a new batch.
    """
    return _train(job, job.retain, mask)


def random_label_forget(job: Job, mask: PyTree[Array] | None = None) -> Unlearned:
    """The same without the retain rows (a row of NegMerge's table, 2410.05583, whose code is not public)."""
    return _train(job, Labelled(*(x[:0] for x in job.forget)), mask)


def _train(job: Job, same: Labelled, mask: PyTree[Array] | None) -> Unlearned:
    epochs, rows = job.candidate().epochs, job.forget.labels.shape[0]
    labels = random_labels(job.seed, epochs, rows, len(job.subject.labels))
    own = [Labelled(job.forget.pixels, jnp.asarray(x)) for x in labels]
    data, order = epochs_of(same, own, shuffled=job.settings.order == "shuffled")
    return job.tune(data, order=order, mask=mask)
