"""SalUn (Fan et al. 2310.12508): random labels, for the weights alone that the forget rows' loss depends on most."""

import functools

import jax
from jaxtyping import Array, Float, PyTree
from unlearnjax_kernels.threshold.api import kth_magnitude, magnitude_bits

from unlearnjax.baselines.gradients import summed_gradient, views
from unlearnjax.baselines.protocol import Job, Unlearned
from unlearnjax.baselines.relabelled import random_label, random_label_forget


def salun(job: Job) -> Unlearned:
    """`random_label` under a saliency mask.

    Weights outside of the mask stay bit for bit, as in the paper and in the newest code (commit 3152cfe); before that,
    the code masked gradients alone, and weight decay moved all weights.
    """
    return random_label(job, saliency_mask(job))


def salun_forget(job: Job) -> Unlearned:
    """`random_label_forget` under the same mask (a row of NegMerge's table, 2410.05583)."""
    return random_label_forget(job, saliency_mask(job))


def saliency_mask(job: Job) -> PyTree[Float[Array, "..."]]:
    """1 for the share `mask` of all weights with the largest |g|, 0 for the others; float32, like the weights.

    g is the sum over batches of the gradient of each one's mean loss on the forget rows, at the given weights, with
    BatchNorm's running statistics (Unlearn-Saliency generate_mask.py; its first releases summed |g| of each batch while
    taking steps, and kept the smallest). Ranked over all weights together, biases and normalisations among them.
    Weights that tie with the last one are in; the code keeps some of them.
    """
    assert job.settings.mask is not None
    total = summed_gradient(job, views(job.forget, job.settings, job.seed), by_batch=True)
    keep = int(job.settings.mask * sum(leaf.size for leaf in jax.tree.leaves(total)))
    return _largest(total, keep)


@functools.partial(jax.jit, static_argnums=1)
def _largest(tree: PyTree[Array], keep: int) -> PyTree[Float[Array, "..."]]:
    (threshold,) = kth_magnitude([leaf[None] for leaf in jax.tree.leaves(tree)], keep)
    return jax.tree.map(lambda x: (magnitude_bits(x) >= threshold).astype(x.dtype), tree)
