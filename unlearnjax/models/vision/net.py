"""What is edited of an image model, and its logits as a pure function of that: classifiers and CLIP's image tower."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from unlearnjax.errors import UserError
from unlearnjax.models.vision.classifier import FAMILIES, Classifier, forward
from unlearnjax.models.vision.clip import CLIP, LARGEST_ID, normed
from unlearnjax.models.vision.clip_model import ClipModel

TEXTS = 256  # that are encoded at once: ImageNet's are 80 templates of 1000 classes
IMAGE_SIDE = ("vision", "visual_projection")  # of CLIP: what sees images, and so what is edited


@dataclass(frozen=True)
class Net:
    """What a model computes; hashable, a static argument of compiled programs.

    Attributes:
      family: a classifier's (see `FAMILIES`), or "clip".
      mean, std: pixels are scaled to [0, 1] and normalised by these, channel by channel.
      linear: whether the model is linearised around `fixed["start"]`: f(start) + J(start) (weights - start),
        tangent-space task arithmetic (2305.12827). f are a classifier's logits; of CLIP its image features, which are
        normalised and put through the head after that, as in that paper's code.
    """

    family: str
    config: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]
    linear: bool = False

    def logits(
        self, trained: PyTree[Array], fixed: PyTree[Array], pixels: Float[Array, "batch h w c"], by_batch: bool = False
    ) -> tuple[Float[Array, "batch classes"], PyTree[Array]]:
        """(logits, fixed) of images in [0, 255].

        Args:
          trained: what is edited. fixed: the rest: "statistics" of BatchNorm, CLIP's "head" [classes, projection],
            the "start" of a linearised model.
          by_batch: BatchNorm uses the batch's own statistics, and the running ones that are returned have moved.
        """
        mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (self.mean, self.std))
        images = (pixels / 255.0 - mean) / std
        if self.linear:
            start = fixed["start"]
            step = jax.tree.map(lambda a, b: a - b, trained, start)
            run = lambda weights: self._forward(weights, fixed, images, by_batch)  # noqa: E731
            at_start, change, moved = jax.jvp(run, (start,), (step,), has_aux=True)
            found = at_start + change
        else:
            found, moved = self._forward(trained, fixed, images, by_batch)
        if self.family == "clip":
            return jnp.einsum("bd,kd->bk", normed(found), fixed["head"]), moved
        return found, moved

    def _forward(self, trained: PyTree[Array], fixed: PyTree[Array], images: Array, by_batch: bool) -> Any:
        """(a classifier's logits or CLIP's features, `fixed`)"""
        if self.family == "clip":
            params = {**trained, "logit_scale": jnp.zeros(())}  # read whenever CLIP is set up; features do without
            return CLIP(self.config).apply({"params": params}, images, method="image_features"), fixed
        logits, moved = forward(self.family, self.config, trained, fixed["statistics"], images, by_batch)
        return logits, {**fixed, "statistics": moved}


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to be edited, with the classes of one data set.

    Attributes:
      net: what it computes. trained, fixed: of which weights (see `Net.logits`).
      labels: the classes' names, in the order of the logits. image_size, channels: of the images it takes.
      model: what it was made of.
    """

    net: Net
    trained: PyTree[Array] = field(repr=False)
    fixed: PyTree[Array] = field(repr=False)
    labels: tuple[str, ...]
    image_size: int
    channels: int
    model: Classifier | ClipModel = field(repr=False)

    def linearised(self) -> "Subject":
        """The same model in its tangent space: its logits (CLIP: its image features) are linear in `trained`.

        Raises:
          UserError: it is one already.
        """
        if self.net.linear:
            raise UserError("linearised: the model is linearised already")
        return dataclasses.replace(
            self, net=dataclasses.replace(self.net, linear=True), fixed={**self.fixed, "start": self.trained}
        )

    def edited(self, trained: PyTree[Array], statistics: PyTree[Array] | None = None) -> Classifier | ClipModel:
        """The model with other weights (and BatchNorm statistics), to be saved."""
        if isinstance(self.model, ClipModel):
            return dataclasses.replace(self.model, params={**self.model.params, **trained})
        kept = self.model.statistics if statistics is None else statistics
        return dataclasses.replace(self.model, params=trained, statistics=kept)

    def weights(self) -> tuple[int, int]:
        """How many are trained, and how many the model has in all (without statistics)."""
        return _count(self.trained), _count(self.model.params)


def _count(tree: PyTree[Array]) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


def classifier_subject(model: Classifier) -> Subject:
    """A classifier, all of whose weights are edited."""
    assert model.family in FAMILIES
    net = Net(model.family, model.config, model.mean, model.std)
    fixed = {"statistics": model.statistics}
    return Subject(net, model.params, fixed, model.labels, model.image_size, model.config.channels, model)


def clip_subject(model: ClipModel, labels: Sequence[str], templates: Sequence[str] = ("a photo of a {}.",)) -> Subject:
    """CLIP's image tower under a frozen zero-shot head for these classes (negmerge.md, section 2): of each class the
    texts of all templates are encoded, normalised, averaged, normalised and multiplied by exp(logit_scale).

    Raises:
      UserError: no classes; a template without {}; a model without a tokenizer, or one whose texts lack the end token
        that the text tower looks for; a text beyond the text tower's context.
    """
    if not labels or not templates:
        raise UserError("clip: give at least one class and one template")
    for template in templates:
        if "{}" not in template:
            raise UserError(f"clip: the template {template!r} has no {{}} for the class's name")
    if model.tokenizer is None:
        raise UserError(f"{model.source}: has no tokenizer, which the zero-shot head's texts need")
    texts = [template.replace("{}", label) for label in labels for template in templates]
    found = model.tokenizer(texts, padding=True, return_tensors="np")["input_ids"]
    end = model.config.end
    if end != LARGEST_ID and not (found == end).any(axis=1).all():
        raise UserError(f"{model.source}: its tokenizer puts no end token (id {end}) behind a text")
    parts = [model.text_features(found[begin : begin + TEXTS]) for begin in range(0, len(texts), TEXTS)]
    features = normed(jnp.concatenate(parts))
    mean = normed(jnp.mean(features.reshape(len(labels), len(templates), -1), axis=1))
    head = mean * jnp.exp(model.params["logit_scale"])
    net = Net("clip", model.config, model.mean, model.std)
    trained = {name: model.params[name] for name in IMAGE_SIDE}
    return Subject(net, trained, {"head": head}, tuple(labels), model.config.image_size, model.config.channels, model)
