"""A CLIP model with its tokenizer: what `load_clip` returns and `save_clip` writes."""

import functools
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from unlearnjax.errors import UserError
from unlearnjax.io.atomic import staged_folder
from unlearnjax.io.card import model_card
from unlearnjax.io.huggingface import load_tokenizer, read_json, resolve
from unlearnjax.io.safetensors import open_folder, write_sharded
from unlearnjax.models.vision.checkpoint import entries, read
from unlearnjax.models.vision.clip import CLIP, CLIPConfig, from_json, names, to_json

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class ClipModel:
    """A CLIP model.

    Attributes:
      params: the weights, by module: "vision", "text", the projections and logit_scale.
      config: the sizes; hashable.
      tokenizer: the transformers tokenizer, or None for a folder without one.
      mean, std: images are scaled to [0, 1] and normalised by these, channel by channel.
    """

    params: PyTree[Array] = field(repr=False)
    config: CLIPConfig
    tokenizer: Any = field(repr=False, default=None)
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    source: str = "unlearnjax"

    def image_features(self, images: Float[Any, "batch h w c"]) -> Float[Array, "batch projection"]:
        """Features of prepared images, not normalised."""
        return _apply(self.config, "image_features", self.params, jnp.asarray(images, jnp.float32))

    def text_features(self, tokens: Int[Any, "batch n"]) -> Float[Array, "batch projection"]:
        """Features of token ids, not normalised.

        Raises:
          UserError: more tokens than the text tower has positions, or ids outside its vocabulary.
        """
        ids = np.asarray(tokens)
        if ids.ndim != 2 or ids.shape[1] > self.config.positions:
            raise UserError(f"tokens: must be [batch, at most {self.config.positions}], not {list(ids.shape)}")
        if ids.size and (ids.min() < 0 or ids.max() >= self.config.vocabulary):
            raise UserError(f"tokens: ids must lie in 0..{self.config.vocabulary - 1}; use the model's own tokenizer")
        return _apply(self.config, "text_features", self.params, jnp.asarray(ids, jnp.int32))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(config: CLIPConfig, method: str, params: PyTree[Array], x: Array) -> Array:
    return CLIP(config).apply({"params": params}, x, method=method)  # type: ignore[return-value]


def abstract(config: CLIPConfig) -> PyTree[jax.ShapeDtypeStruct]:
    """The parameters' shapes and dtypes."""
    pixels = jax.ShapeDtypeStruct((1, config.image_size, config.image_size, config.channels), jnp.float32)
    tokens = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(CLIP(config).init, jax.random.key(0), pixels, tokens)["params"]


def new_clip(config: CLIPConfig, key: Array) -> ClipModel:
    """A model with random weights."""
    images = jnp.zeros((1, config.image_size, config.image_size, config.channels), jnp.float32)
    return ClipModel(jax.jit(CLIP(config).init)(key, images, jnp.zeros((1, 2), jnp.int32))["params"], config)


def load_clip(folder: str | Path) -> ClipModel:
    """Load a CLIP model from a Hugging Face folder or the hub.

    Raises:
      UserError: no such model, another architecture, or a tensor that is missing, left over or of another shape.
    """
    path = resolve(folder)
    raw = read_json(path / "config.json")
    if raw.get("model_type") != "clip":
        raise UserError(f"{path}: model_type is {raw.get('model_type')!r}, and not 'clip'")
    config = from_json(raw, str(path / "config.json"))
    params = read(open_folder(path), names(config), abstract(config), ignored=("position_ids",))
    place = path / "preprocessor_config.json"
    prepared = read_json(place) if place.exists() else {}
    mean, std = tuple(prepared.get("image_mean", MEAN)), tuple(prepared.get("image_std", STD))
    return ClipModel(params, config, load_tokenizer(path), mean, std, str(folder))


def save_clip(model: ClipModel, folder: str | Path, *, card: str | None = None) -> None:
    """Write a folder that transformers and `load_clip` load; it appears whole or not at all.

    Raises:
      UserError: the folder is taken.
    """
    size = {"height": model.config.image_size, "width": model.config.image_size}
    preparation = {"size": size, "crop_size": size, "do_resize": True, "do_center_crop": True, "do_rescale": True,
                   "do_normalize": True, "image_mean": list(model.mean), "image_std": list(model.std),
                   "image_processor_type": "CLIPImageProcessor"}  # fmt: skip
    tensors = sorted(entries(model.params, names(model.config)), key=lambda entry: entry.name)
    text = model_card(title=Path(folder).name, base_model=model.source) if card is None else card
    with staged_folder(folder) as staged:
        write_sharded(staged, tensors)
        (staged / "config.json").write_text(json.dumps(to_json(model.config), indent=2) + "\n", "utf-8")
        (staged / "preprocessor_config.json").write_text(json.dumps(preparation, indent=2) + "\n", "utf-8")
        (staged / "README.md").write_text(text, "utf-8")
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(str(staged))
