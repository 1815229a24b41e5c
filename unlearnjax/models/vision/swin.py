"""Swin transformer (2103.14030): attention in windows that every other block shifts, a pyramid of widths."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from unlearnjax.errors import UserError
from unlearnjax.models.vision.layers import ACTIVATIONS, EPSILON, Conv, LayerNorm, Linear

MASKED = -100.0  # what a score between regions that are no neighbours is lowered by, as published


@dataclass(frozen=True)
class SwinConfig:
    """transformers' sizes; widths double from stage to stage. The defaults are Swin-T's. No dropout, no stochastic
    depth: unlearning fine-tunes without them."""

    classes: int
    channels: int = 3
    image_size: int = 224
    patch: int = 4
    embedding: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    ratio: float = 4.0
    qkv_bias: bool = True
    activation: str = "gelu"
    epsilon: float = EPSILON


def _relative(window: int) -> np.ndarray:
    """[window^2, window^2]: the row of the bias table for each pair of places in a window."""
    places = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij")).reshape(2, -1)
    apart = places[:, :, None] - places[:, None, :] + window - 1
    return apart[0] * (2 * window - 1) + apart[1]


def _regions(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """[windows, window^2, window^2]: what is added to the scores of a shifted map, whose windows at the edge hold parts
    from opposite sides."""

    def along(size: int) -> np.ndarray:
        at = np.arange(size)
        return (at >= size - window).astype(int) + (at >= size - shift)

    region = along(height)[:, None] * 3 + along(width)[None]
    windows = _cut(region[None, :, :, None], window)[..., 0]
    return np.where(windows[:, None, :] == windows[:, :, None], 0.0, MASKED).astype(np.float32)


def _cut(x: Any, window: int) -> Any:
    """[batch, h, w, c] -> [batch * windows, window^2, c]."""
    batch, h, w, c = x.shape
    x = x.reshape(batch, h // window, window, w // window, window, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window * window, c)


def _joined(windows: Array, window: int, h: int, w: int) -> Array:
    """[batch * windows, window^2, c] -> [batch, h, w, c]."""
    x = windows.reshape(-1, h // window, w // window, window, window, windows.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, h, w, windows.shape[-1])


class WindowAttention(nn.Module):
    """Attention among the places of a window, with a learnt bias for each distance."""

    config: SwinConfig
    heads: int
    window: int

    @nn.compact
    def __call__(self, x: Float[Array, "windows n width"], regions: np.ndarray | None) -> Array:
        width, n = x.shape[-1], x.shape[1]
        size = width // self.heads
        q, k, v = (
            Linear(width, bias=self.config.qkv_bias, name=name)(x).reshape(-1, n, self.heads, size)
            for name in ("query", "key", "value")
        )
        shape = ((2 * self.window - 1) ** 2, self.heads)
        table = self.param("relative_position_bias_table", nn.initializers.normal(0.02), shape, jnp.float32)
        bias = table[_relative(self.window)].transpose(2, 0, 1)[None]
        scores = jnp.einsum("wqhd,wkhd->whqk", q, k).astype(jnp.float32) * size**-0.5
        if regions is not None:
            bias = bias + jnp.asarray(regions)[:, None]  # [windows of one image, heads, n, n]
        scores = scores.reshape(-1, bias.shape[0], *scores.shape[1:]) + bias[None]
        weights = jax.nn.softmax(scores.reshape(-1, self.heads, n, n), axis=-1).astype(x.dtype)
        mixed = jnp.einsum("whqk,wkhd->wqhd", weights, v).reshape(x.shape)
        return Linear(width, name="dense")(mixed)


class Block(nn.Module):
    """x += attention(norm(x)) in windows, moved by `shift`; x += mlp(norm(x))."""

    config: SwinConfig
    heads: int
    shift: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h w c"]:
        c, (h, w), width = self.config, x.shape[1:3], x.shape[-1]
        window, shift = (min(h, w), 0) if min(h, w) <= c.window else (c.window, self.shift)
        y = LayerNorm(c.epsilon, name="layernorm_before")(x)
        down, right = -h % window, -w % window
        y = jnp.pad(y, ((0, 0), (0, down), (0, right), (0, 0)))
        y = jnp.roll(y, (-shift, -shift), (1, 2)) if shift else y
        regions = _regions(h + down, w + right, window, shift) if shift else None
        y = WindowAttention(c, self.heads, window, name="attention")(_cut(y, window), regions)
        y = _joined(y, window, h + down, w + right)
        y = jnp.roll(y, (shift, shift), (1, 2)) if shift else y
        x = x + y[:, :h, :w]
        y = LayerNorm(c.epsilon, name="layernorm_after")(x)
        y = ACTIVATIONS[c.activation](Linear(int(c.ratio * width), name="intermediate")(y))
        return x + Linear(width, name="output")(y)


class Downsample(nn.Module):
    """Four neighbours become one place of twice the width."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"]) -> Float[Array, "batch h2 w2 c2"]:
        h, w, width = x.shape[1:]
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)))
        x = jnp.concatenate([x[:, row::2, column::2] for column in range(2) for row in range(2)], axis=-1)
        return Linear(2 * width, bias=False, name="reduction")(LayerNorm(EPSILON, name="norm")(x))


class Swin(nn.Module):
    """Images [batch, height, width, channels] to logits. It has no BatchNorm: `by_batch` changes nothing."""

    config: SwinConfig

    @nn.compact
    def __call__(self, images: Float[Array, "batch h w c"], by_batch: bool = False) -> Float[Array, "batch classes"]:
        c = self.config
        pads = [(0, -size % c.patch) for size in images.shape[1:3]]
        x = jnp.pad(images, ((0, 0), *pads, (0, 0)))
        x = Conv(c.embedding, c.patch, c.patch, padding=0, bias=True, name="projection")(x)
        x = LayerNorm(EPSILON, name="embedding_norm")(x)
        for stage, (depth, heads) in enumerate(zip(c.depths, c.heads, strict=True)):
            for i in range(depth):
                x = Block(c, heads, c.window // 2 if i % 2 else 0, name=f"stage_{stage}_{i}")(x)
            if stage + 1 < len(c.depths):
                x = Downsample(name=f"downsample_{stage}")(x)
        x = LayerNorm(c.epsilon, name="norm")(x)
        return Linear(c.classes, name="classifier")(jnp.mean(x, axis=(1, 2)))


def names(config: SwinConfig) -> dict[tuple[str, ...], str]:
    """Our path of each module with weights -> its name in transformers' checkpoints."""
    found: dict[tuple[str, ...], str] = {
        ("projection",): "swin.embeddings.patch_embeddings.projection",
        ("embedding_norm",): "swin.embeddings.norm",
        ("norm",): "swin.layernorm",
        ("classifier",): "classifier",
    }
    for stage, depth in enumerate(config.depths):
        theirs = f"swin.encoder.layers.{stage}"
        for i in range(depth):
            ours, block = f"stage_{stage}_{i}", f"{theirs}.blocks.{i}"
            found[(ours,)] = block
            found[ours, "attention"] = f"{block}.attention.self"
            found[ours, "attention", "dense"] = f"{block}.attention.output.dense"
            found[ours, "intermediate"] = f"{block}.intermediate.dense"
            found[ours, "output"] = f"{block}.output.dense"
        if stage + 1 < len(config.depths):
            found[(f"downsample_{stage}",)] = f"{theirs}.downsample"
    return found


def from_json(raw: Mapping[str, Any], classes: int, where: str) -> SwinConfig:
    """The configuration of a folder that transformers wrote.

    Raises:
      UserError: what this Swin would compute otherwise.
    """
    activation = raw.get("hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise UserError(f"{where}: hidden_act is {activation!r}; supported: {', '.join(ACTIVATIONS)}")
    if raw.get("use_absolute_embeddings", False):
        raise UserError(f"{where}: use_absolute_embeddings is not supported")
    for key in ("image_size", "patch_size"):
        if not isinstance(raw.get(key, 0), int):
            raise UserError(f"{where}: {key} is {raw[key]!r}; only squares are supported")
    config = SwinConfig(
        classes, raw.get("num_channels", 3), raw.get("image_size", 224), raw.get("patch_size", 4),
        raw.get("embed_dim", 96), tuple(raw.get("depths", (2, 2, 6, 2))), tuple(raw.get("num_heads", (3, 6, 12, 24))),
        raw.get("window_size", 7), raw.get("mlp_ratio", 4.0), raw.get("qkv_bias", True), activation,
        raw.get("layer_norm_eps", EPSILON),
    )  # fmt: skip
    side = -(-config.image_size // config.patch)
    for stage in range(len(config.depths)):
        if side < config.window:
            raise UserError(
                f"{where}: stage {stage} has {side}x{side} places, fewer than its window of {config.window}; "
                "window_size or image_size is wrong"
            )
        side = -(-side // 2)
    return config


def to_json(config: SwinConfig) -> dict[str, Any]:
    """config.json's entries."""
    return {
        "model_type": "swin", "architectures": ["SwinForImageClassification"], "num_channels": config.channels,
        "image_size": config.image_size, "patch_size": config.patch, "embed_dim": config.embedding,
        "depths": list(config.depths), "num_heads": list(config.heads), "window_size": config.window,
        "mlp_ratio": config.ratio, "qkv_bias": config.qkv_bias, "hidden_act": config.activation,
        "layer_norm_eps": config.epsilon,
    }  # fmt: skip
