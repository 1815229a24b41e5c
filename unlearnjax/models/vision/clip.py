"""CLIP (2103.00020) of any size: an image tower, a text tower, and the cosine of what they say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from unlearnjax.errors import UserError
from unlearnjax.models.vision.layers import ACTIVATIONS, Conv, LayerNorm, Linear

LARGEST_ID = 2  # as CLIPConfig.end: not this token but the largest one, as folders of old transformers mean it


@dataclass(frozen=True)
class Tower:
    """The sizes of one transformer."""

    width: int
    inner: int
    layers: int
    heads: int
    activation: str
    epsilon: float


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes. `end`: the token at whose place the text's feature is taken (LARGEST_ID: of the largest one)."""

    image: Tower
    text: Tower
    projection: int
    image_size: int
    patch: int
    channels: int
    vocabulary: int
    positions: int
    end: int


class Attention(nn.Module):
    """Attention with biases on all four linears."""

    tower: Tower

    @nn.compact
    def __call__(self, x: Float[Array, "batch n width"], mask: Bool[Array, "n n"] | None) -> Array:
        heads, size = self.tower.heads, self.tower.width // self.tower.heads
        q, k, v = (
            Linear(self.tower.width, name=f"{name}_proj")(x).reshape(*x.shape[:2], heads, size) for name in "qkv"
        )
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(jnp.float32) * size**-0.5
        if mask is not None:
            scores = jnp.where(mask[None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(x.dtype)
        return Linear(self.tower.width, name="out_proj")(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class MLP(nn.Module):
    """Two linears."""

    tower: Tower

    @nn.compact
    def __call__(self, x: Float[Array, "batch n width"]) -> Float[Array, "batch n width"]:
        inner = Linear(self.tower.inner, name="fc1")(x)
        return Linear(self.tower.width, name="fc2")(ACTIVATIONS[self.tower.activation](inner))


class Layer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    tower: Tower

    @nn.compact
    def __call__(self, x: Float[Array, "batch n width"], mask: Bool[Array, "n n"] | None) -> Array:
        norm = lambda name: LayerNorm(self.tower.epsilon, name=name)  # noqa: E731
        x = x + Attention(self.tower, name="self_attn")(norm("layer_norm1")(x), mask)
        return x + MLP(self.tower, name="mlp")(norm("layer_norm2")(x))


class Embedding(nn.Module):
    """A table."""

    rows: int
    width: int

    @nn.compact
    def __call__(self, places: Int[Array, "..."]) -> Float[Array, "... width"]:
        table: Array = self.param("weight", nn.initializers.normal(0.02), (self.rows, self.width), jnp.float32)
        return table[places]


class ImageTower(nn.Module):
    """Images to the normed state of the class token."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, images: Float[Array, "batch h w c"]) -> Float[Array, "batch width"]:
        c, tower = self.config, self.config.image
        start = self.param("class_embedding", nn.initializers.normal(tower.width**-0.5), (tower.width,), jnp.float32)
        patches = Conv(tower.width, c.patch, c.patch, padding=0, name="patch_embedding")(images)
        x = patches.reshape(patches.shape[0], -1, tower.width)
        first = jnp.broadcast_to(start.astype(x.dtype), (x.shape[0], 1, tower.width))
        x = jnp.concatenate([first, x], axis=1)
        places = jnp.arange(1 + (c.image_size // c.patch) ** 2, dtype=jnp.int32)
        x = x + Embedding(places.size, tower.width, name="position_embedding")(places)[None]
        x = LayerNorm(tower.epsilon, name="pre_layrnorm")(x)  # transformers' spelling
        for i in range(tower.layers):
            x = Layer(tower, name=f"layer_{i}")(x, None)
        return LayerNorm(tower.epsilon, name="post_layernorm")(x[:, 0])


class TextTower(nn.Module):
    """Token ids to the normed state of the end token."""

    config: CLIPConfig

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch n"]) -> Float[Array, "batch width"]:
        c, tower, length = self.config, self.config.text, tokens.shape[1]
        x = Embedding(c.vocabulary, tower.width, name="token_embedding")(tokens)
        places = jnp.arange(length, dtype=jnp.int32)
        x = x + Embedding(c.positions, tower.width, name="position_embedding")(places)[None]
        mask = places[:, None] >= places[None, :]
        for i in range(tower.layers):
            x = Layer(tower, name=f"layer_{i}")(x, mask)
        x = LayerNorm(tower.epsilon, name="final_layer_norm")(x)
        ends = tokens if c.end == LARGEST_ID else (tokens == c.end).astype(jnp.int32)
        at = jnp.argmax(ends, axis=1)
        return jnp.take_along_axis(x, at[:, None, None], axis=1)[:, 0]


class CLIP(nn.Module):
    """Both towers with their projections. Features are not normalised."""

    config: CLIPConfig

    def setup(self) -> None:
        self.vision = ImageTower(self.config)
        self.text = TextTower(self.config)
        self.visual_projection = Linear(self.config.projection, bias=False)
        self.text_projection = Linear(self.config.projection, bias=False)
        self.logit_scale = self.param("logit_scale", nn.initializers.constant(np.log(1 / 0.07)), (), jnp.float32)

    def __call__(
        self, images: Float[Array, "images h w c"], tokens: Int[Array, "texts n"]
    ) -> Float[Array, "images texts"]:
        """The cosine of each image with each text, times exp(logit_scale)."""
        pair = (normed(self.image_features(images)), normed(self.text_features(tokens)))
        return jnp.exp(self.logit_scale) * jnp.einsum("id,td->it", *pair)

    def image_features(self, images: Float[Array, "batch h w c"]) -> Float[Array, "batch projection"]:
        """What the image tower says."""
        return self.visual_projection(self.vision(images))

    def text_features(self, tokens: Int[Array, "batch n"]) -> Float[Array, "batch projection"]:
        """What the text tower says."""
        return self.text_projection(self.text(tokens))


def normed(x: Float[Array, "... d"]) -> Float[Array, "... d"]:
    """x over its length along the last axis."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def names(config: CLIPConfig) -> dict[tuple[str, ...], str]:
    """Our path of each module with weights -> its name in transformers' checkpoints."""
    found: dict[tuple[str, ...], str] = {
        ("vision",): "vision_model.embeddings",
        ("vision", "pre_layrnorm"): "vision_model.pre_layrnorm",
        ("vision", "post_layernorm"): "vision_model.post_layernorm",
        ("text",): "text_model.embeddings",
        ("text", "final_layer_norm"): "text_model.final_layer_norm",
    }
    for name, tower in (("vision", config.image), ("text", config.text)):
        for i in range(tower.layers):
            found[name, f"layer_{i}"] = f"{name}_model.encoder.layers.{i}"
    return found | {(name,): name for name in ("visual_projection", "text_projection", "logit_scale")}


def _tower(raw: Mapping[str, Any], where: str, defaults: tuple[int, int, int, int]) -> Tower:
    activation = raw.get("hidden_act", "quick_gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act is {activation!r}; supported: {', '.join(ACTIVATIONS)}")
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    width, inner, layers, heads = (raw.get(key, default) for key, default in zip(keys, defaults, strict=True))
    return Tower(width, inner, layers, heads, activation, raw.get("layer_norm_eps", 1e-5))


def from_json(raw: Mapping[str, Any], where: str) -> CLIPConfig:
    """The configuration in a config.json that transformers wrote; what it leaves out is B/32's.

    Raises:
      UserError: an activation that is not supported.
    """
    image, text = raw.get("vision_config") or {}, raw.get("text_config") or {}
    return CLIPConfig(
        _tower(image, f"{where}: vision_config", (768, 3072, 12, 12)),
        _tower(text, f"{where}: text_config", (512, 2048, 12, 8)), raw.get("projection_dim", 512),
        image.get("image_size", 224), image.get("patch_size", 32), image.get("num_channels", 3),
        text.get("vocab_size", 49408), text.get("max_position_embeddings", 77), text.get("eos_token_id", 49407),
    )  # fmt: skip


def to_json(config: CLIPConfig) -> dict[str, Any]:
    """config.json's entries."""

    def tower(sizes: Tower) -> dict[str, Any]:
        return {
            "hidden_size": sizes.width, "intermediate_size": sizes.inner, "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.heads, "hidden_act": sizes.activation, "layer_norm_eps": sizes.epsilon,
            "projection_dim": config.projection,
        }  # fmt: skip

    image = {"model_type": "clip_vision_model", "image_size": config.image_size, "patch_size": config.patch,
             "num_channels": config.channels, **tower(config.image)}  # fmt: skip
    text = {"model_type": "clip_text_model", "vocab_size": config.vocabulary, "eos_token_id": config.end,
            "bos_token_id": None, "max_position_embeddings": config.positions, **tower(config.text)}  # fmt: skip
    return {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": config.projection,
            "vision_config": image, "text_config": text, "dtype": "float32"}  # fmt: skip
