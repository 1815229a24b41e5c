"""Gradients of a model that stays as it is: over a whole data set, and of single rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from unlearnjax.baselines.protocol import Job, Settings
from unlearnjax.data.augment import Strength, augment
from unlearnjax.data.labelled import Labelled
from unlearnjax.models.vision.net import Net
from unlearnjax.training.images.step import cross_entropy

VIEWS_AT_ONCE = 500


def views(data: Labelled, settings: Settings, seed: int, stream: int = 0) -> Labelled:
    """Every image once, flipped and cropped at random, as the codes' loaders give it wherever they take gradients.
    `stream`: other draws for the same seed."""
    if not settings.flip and not settings.crop_padding:
        return data
    zero, none = jnp.float32(0.0), jnp.int32(0)
    strength = Strength(jnp.float32(settings.flip), jnp.int32(settings.crop_padding), zero, none, zero)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), seed), stream)
    found = []
    for i, start in enumerate(range(0, data.labels.shape[0], VIEWS_AT_ONCE)):
        found.append(_view(jax.random.fold_in(key, i), data.pixels[start : start + VIEWS_AT_ONCE], strength))
    return Labelled(jnp.concatenate(found), data.labels)


@jax.jit
def _view(key: Array, pixels: Array, strength: Strength) -> Array:
    return augment(key, pixels.astype(jnp.float32), strength, most_operations=0).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=0)
def rows_gradient(
    net: Net,
    trained: PyTree[Array],
    fixed: PyTree[Array],
    data: Labelled,
    rows: Int[Array, " batch"],
    weight: Float[Array, " batch"],
    total: PyTree[Array] | None = None,
) -> PyTree[Array]:
    """Of the weighted sum of these rows' cross-entropies, added to `total`; BatchNorm uses its running statistics."""

    def objective(trained: PyTree[Array]) -> Float[Array, ""]:
        logits, _ = net.logits(trained, fixed, data.pixels[rows].astype(jnp.float32))
        return jnp.sum(weight * cross_entropy(logits, data.labels[rows], jnp.zeros(())))

    found = jax.grad(objective)(trained)
    return found if total is None else jax.tree.map(jnp.add, total, found)


def summed_gradient(job: Job, data: Labelled, *, by_batch: bool) -> PyTree[Array]:
    """Over all rows in their order: the sum of each batch's mean gradient (`by_batch`), or the mean over the rows. They
    differ by the number of batches, and in how much the rows of the last, smaller batch count."""
    count, subject = int(data.labels.shape[0]), job.subject
    size = min(job.settings.batch_size, count)
    total = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), subject.trained)
    for start in job.watched(range(0, count, size), -(-count // size), "batch"):
        rows = np.arange(start, start + size)
        real = rows < count  # what fills the last batch counts 0
        weight = (real / (real.sum() if by_batch else count)).astype(np.float32)
        rows = np.minimum(rows, count - 1).astype(np.int32)
        total = rows_gradient(subject.net, subject.trained, subject.fixed, data, rows, weight, total)
    return total
