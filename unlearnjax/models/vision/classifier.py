"""An image classifier: what `load_classifier` returns and `save_classifier` writes."""

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from unlearnjax.errors import UserError, check_known
from unlearnjax.io.atomic import staged_folder
from unlearnjax.io.card import model_card
from unlearnjax.io.huggingface import read_json, resolve
from unlearnjax.io.safetensors import Entry, open_folder, write_sharded
from unlearnjax.models.vision import resnet, swin, vgg
from unlearnjax.models.vision.checkpoint import Names, entries, read

STATISTICS = ("running_mean", "running_var")


class Family(NamedTuple):
    """One kind of classifier."""

    module: Callable[[Any], nn.Module]
    names: Callable[[Any], Names]
    from_json: Callable[[Mapping[str, Any], int, str], Any]
    to_json: Callable[[Any], dict[str, Any]]


FAMILIES = {
    "resnet": Family(resnet.ResNet, resnet.names, resnet.from_json, resnet.to_json),
    "swin": Family(swin.Swin, swin.names, swin.from_json, swin.to_json),
    "vgg": Family(vgg.VGG, vgg.names, vgg.from_json, vgg.to_json),
}


@dataclass(frozen=True, eq=False)
class Classifier:
    """An image classifier.

    Attributes:
      params: what is trained and merged, by module; kernels are [out, in, height, width].
      statistics: BatchNorm's running means and variances, which are neither trained nor merged.
      family, config: what it computes; hashable.
      labels: the classes' names, in the order of the logits.
      image_size, mean, std: how images are prepared: resized to that, scaled to [0, 1], normalised by channel.
    """

    params: PyTree[Array] = field(repr=False)
    statistics: PyTree[Array] = field(repr=False)
    family: str
    config: Any
    labels: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    source: str = "unlearnjax"

    def logits(self, images: Float[Any, "batch h w c"]) -> Float[Array, "batch classes"]:
        """Class logits of prepared images, float32, with the running statistics."""
        return _logits(self.family, self.config, self.params, self.statistics, jnp.asarray(images, jnp.float32))


def forward(
    family: str,
    config: Any,
    params: PyTree[Array],
    statistics: PyTree[Array],
    images: Float[Array, "batch h w c"],
    by_batch: bool = False,
) -> tuple[Float[Array, "batch classes"], PyTree[Array]]:
    """(logits, statistics): with `by_batch` BatchNorm uses the batch's own and returns the running ones moved on; else
    it uses the running ones. Pure: to be traced, mapped and differentiated in `params`."""
    module = FAMILIES[family].module(config)
    logits, found = module.apply(
        {"params": params, "statistics": statistics}, images, by_batch, mutable=["statistics"] if by_batch else []
    )
    return logits, found.get("statistics", {}) if by_batch else statistics


@functools.partial(jax.jit, static_argnums=(0, 1))
def _logits(family: str, config: Any, params: PyTree[Array], statistics: PyTree[Array], images: Array) -> Array:
    return forward(family, config, params, statistics, images)[0]


def new_classifier(family: str, config: Any, labels: tuple[str, ...], image_size: int, key: Array) -> Classifier:
    """A classifier with random weights.

    Raises:
      UserError: an unknown family, or another number of labels than classes.
    """
    check_known([family], FAMILIES, "family", "new_classifier")
    if len(labels) != config.classes:
        raise UserError(f"new_classifier: {len(labels)} labels for {config.classes} classes; give one for each")
    init = jax.jit(FAMILIES[family].module(config).init)  # one program instead of several for each weight's shape
    found = init(key, jnp.zeros((1, image_size, image_size, config.channels)))
    return Classifier(found["params"], found.get("statistics", {}), family, config, tuple(labels), image_size)


def load_classifier(folder: str | Path) -> Classifier:
    """Load a classifier from a Hugging Face folder (ResNet and Swin as transformers writes them), or from one of ours.

    Raises:
      UserError: no such folder; an unsupported model; a tensor that is missing, left over or of another shape.
    """
    path = resolve(folder)
    raw = read_json(path / "config.json")
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"{path}: model_type is {kind!r}; supported classifiers: {', '.join(FAMILIES)}")
    family, where = FAMILIES[kind], str(path / "config.json")
    labels = _labels(raw, where)
    config = family.from_json(raw, len(labels), where)
    prepared = _preparation(path)
    pixels = jax.ShapeDtypeStruct((1, prepared["image_size"], prepared["image_size"], config.channels), jnp.float32)
    abstract = jax.eval_shape(family.module(config).init, jax.random.key(0), pixels)
    checkpoint, names = open_folder(path), family.names(config)
    statistics = [name for name in checkpoint.files if name.endswith(STATISTICS)]
    found = {
        "params": read(checkpoint, names, abstract["params"], (*STATISTICS, "num_batches_tracked")),
        "statistics": read(checkpoint.only(statistics), names, abstract.get("statistics", {})),
    }
    return Classifier(found["params"], found["statistics"], kind, config, labels, source=str(folder), **prepared)


def save_classifier(model: Classifier, folder: str | Path, *, card: str | None = None) -> None:
    """Write a folder that `load_classifier` loads, and transformers where it knows the model. It appears whole or not
    at all.

    Raises:
      UserError: the folder is taken.
    """
    family = FAMILIES[model.family]
    config = family.to_json(model.config) | {
        "id2label": {str(i): label for i, label in enumerate(model.labels)},
        "label2id": {label: i for i, label in enumerate(model.labels)},
        "dtype": "float32",
    }
    size = {"height": model.image_size, "width": model.image_size}
    preparation = {"size": size, "image_mean": list(model.mean), "image_std": list(model.std), "do_resize": True,
                   "do_normalize": True, "do_rescale": True, "image_processor_type": "ViTImageProcessor"}  # fmt: skip
    names = family.names(model.config)
    tensors = [*entries(model.params, names), *entries(model.statistics, names)]
    for name in [entry.name for entry in tensors if entry.name.endswith("running_var")]:
        # torch's count of batches, which it needs for running means without a momentum alone
        count = name.replace("running_var", "num_batches_tracked")
        tensors.append(Entry(count, (), np.int64, np.zeros((), np.int64)))
    tensors.sort(key=lambda entry: entry.name)
    text = model_card(title=Path(folder).name, base_model=model.source) if card is None else card
    with staged_folder(folder) as staged:
        write_sharded(staged, tensors)
        (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (staged / "preprocessor_config.json").write_text(json.dumps(preparation, indent=2) + "\n", "utf-8")
        (staged / "README.md").write_text(text, "utf-8")


def _labels(raw: Mapping[str, Any], where: str) -> tuple[str, ...]:
    found = raw.get("id2label")
    if not isinstance(found, dict) or sorted(found, key=int) != [str(i) for i in range(len(found))]:
        raise UserError(f"{where}: id2label must name every class from 0 on")
    return tuple(str(found[str(i)]) for i in range(len(found)))


def _preparation(path: Path) -> dict[str, Any]:
    place = path / "preprocessor_config.json"
    if not place.exists():
        raise UserError(f"{place}: missing; it says how large images are and how they are normalised")
    raw = read_json(place)
    size = raw.get("size", 224)
    if isinstance(size, dict):
        size = size.get("height", size.get("shortest_edge"))
    if not isinstance(size, int):
        raise UserError(f"{place}: size is {raw.get('size')!r}, which is no number of pixels")
    return {
        "image_size": size,
        "mean": tuple(raw.get("image_mean", Classifier.mean)),
        "std": tuple(raw.get("image_std", Classifier.std)),
    }
