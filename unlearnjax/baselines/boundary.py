"""Boundary unlearning (Chen et al. 2303.11570): moving the forget rows over the nearest boundary, or to a new class."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from unlearnjax.baselines.gradients import views
from unlearnjax.baselines.protocol import Job, Unlearned
from unlearnjax.baselines.relabelled import epochs_of
from unlearnjax.data.labelled import Labelled
from unlearnjax.errors import UserError
from unlearnjax.models.vision.net import Net, Subject
from unlearnjax.training.images.step import cross_entropy

HEAD = "classifier"  # the last linear layer of every family
AT_ONCE = 250


def boundary_shrink(job: Job) -> Unlearned:
    """Train on the forget rows with the classes that the given model sees in their adversarial neighbours
    (Unlearn-Saliency unlearn/boundary_sh.py).

    Those are of the images as they are trained on, flipped and cropped anew for every epoch. Where the attack fails the
    label is still the true one.
    """
    bound, epochs = job.settings.bound, job.candidate().epochs
    assert bound is not None
    own = []
    for epoch in job.watched(range(epochs), epochs, "epoch of labels"):
        seen = views(job.forget, job.settings, job.seed, epoch)
        own.append(Labelled(seen.pixels, adversarial_labels(job.subject, seen, bound)))
    data, order = epochs_of(Labelled(*(x[:0] for x in job.forget)), own, shuffled=False)
    return job.tune(data, order=order, flip=0.0, crop_padding=0)


def adversarial_labels(subject: Subject, data: Labelled, bound: float) -> Int[Array, " n"]:
    """What the model, with its running statistics, takes each image for after one step of the fast gradient sign method
    away from its label: `bound` (of a pixel range of 1) in every channel, clipped, rounded to whole pixel values.

    The usual bound of 0.1 is 25.5 of those; which way the half goes is rounding noise, here as in the code.
    """
    found = []
    for start in range(0, data.labels.shape[0], AT_ONCE):
        pixels, labels = (x[start : start + AT_ONCE] for x in data)
        found.append(_attacked(subject.net, subject.trained, subject.fixed, pixels, labels, bound))
    return jnp.concatenate(found)


@functools.partial(jax.jit, static_argnums=0)
def _attacked(
    net: Net, trained: PyTree[Array], fixed: PyTree[Array], pixels: Array, labels: Array, bound: Float[Array, ""]
) -> Int[Array, " batch"]:
    def loss(images: Float[Array, "batch h w c"]) -> Float[Array, ""]:
        return jnp.sum(cross_entropy(net.logits(trained, fixed, images)[0], labels, jnp.zeros(())))

    images = pixels.astype(jnp.float32)
    moved = jnp.clip(images / 255.0 + bound * jnp.sign(jax.grad(loss)(images)), 0.0, 1.0)
    return jnp.argmax(net.logits(trained, fixed, jnp.round(moved * 255.0))[0], axis=-1).astype(jnp.int32)


def boundary_expand(job: Job) -> Unlearned:
    """Train on the forget rows with the label of a class that the model gets for this and loses again
    (Unlearn-Saliency unlearn/boundary_ex.py).

    That code keeps the new class when it measures; the paper prunes it.

    Raises:
      UserError: a model without a trained head, or a linearised one.
    """
    subject = job.subject
    if HEAD not in subject.trained or subject.net.linear:
        raise UserError(f"{job.name}: needs a classifier with a head of its own that is not linearised")
    new = jnp.full(job.forget.labels.shape, len(subject.labels), jnp.int32)
    found = job._replace(subject=expanded(subject, job.seed)).tune(Labelled(job.forget.pixels, new))
    head = {name: x[:-1] for name, x in found.trained[HEAD].items()}
    return found._replace(trained={**found.trained, HEAD: head})


def expanded(subject: Subject, seed: int) -> Subject:
    """The subject with one more class, whose weights and bias are drawn as torch's Linear draws them: uniformly within
    1 / sqrt(inputs)."""
    head = subject.trained[HEAD]
    limit = head["weight"].shape[1] ** -0.5
    keys = dict(
        zip(sorted(head), jax.random.split(jax.random.fold_in(jax.random.key(4), seed), len(head)), strict=True)
    )
    grown = {
        name: jnp.concatenate([x, jax.random.uniform(keys[name], (1, *x.shape[1:]), x.dtype, -limit, limit)])
        for name, x in head.items()
    }
    config = dataclasses.replace(subject.net.config, classes=subject.net.config.classes + 1)
    return dataclasses.replace(
        subject,
        net=dataclasses.replace(subject.net, config=config),
        trained={**subject.trained, HEAD: grown},
        labels=(*subject.labels, "forgotten"),
    )
