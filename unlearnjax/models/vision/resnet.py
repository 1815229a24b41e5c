"""ResNet (1512.03385), with torchvision's and transformers' stem for ImageNet or the small one for CIFAR."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from unlearnjax.errors import UserError
from unlearnjax.models.vision.layers import BatchNorm, Conv, Linear, average_pool, max_pool

STEMS = ("imagenet", "cifar")


@dataclass(frozen=True)
class ResNetConfig:
    """stem: "imagenet" (7x7, stride 2, then a pool of stride 2) or "cifar" (3x3, stride 1, no pool), which transformers
    does not know. The rest is transformers'.
    """

    classes: int
    channels: int = 3
    stem: str = "imagenet"
    embedding: int = 64
    widths: tuple[int, ...] = (64, 128, 256, 512)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    stride_in_first_stage: bool = False
    stride_in_first_layer: bool = False  # of a bottleneck: in its 1x1 convolution instead of its 3x3

    def strides(self, stage: int) -> int:
        return 2 if stage > 0 or self.stride_in_first_stage else 1


def resnet18(classes: int, stem: str = "cifar") -> ResNetConfig:
    """ResNet-18."""
    return ResNetConfig(classes, stem=stem)


class ConvNorm(nn.Module):
    """A convolution, its normalisation, and (unless it ends a residual branch) ReLU."""

    features: int
    size: int
    stride: int = 1
    activates: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], by_batch: bool) -> Float[Array, "batch h2 w2 features"]:
        x = Conv(self.features, self.size, self.stride, name="convolution")(x)
        x = BatchNorm(name="normalization")(x, by_batch)
        return nn.relu(x) if self.activates else x


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or 1x1, 3x3, 1x1 with a quarter of the width inside."""

    config: ResNetConfig
    features: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch h w c"], by_batch: bool) -> Float[Array, "batch h2 w2 features"]:
        if self.config.bottleneck:
            first = self.config.stride_in_first_layer
            inner = self.features // 4
            parts = [
                ConvNorm(inner, 1, self.stride if first else 1, name="layer_0"),
                ConvNorm(inner, 3, 1 if first else self.stride, name="layer_1"),
                ConvNorm(self.features, 1, activates=False, name="layer_2"),
            ]
        else:
            parts = [
                ConvNorm(self.features, 3, self.stride, name="layer_0"),
                ConvNorm(self.features, 3, activates=False, name="layer_1"),
            ]
        y = x
        for part in parts:
            y = part(y, by_batch)
        if x.shape[-1] != self.features or self.stride != 1:
            x = ConvNorm(self.features, 1, self.stride, activates=False, name="shortcut")(x, by_batch)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images [batch, height, width, channels] to logits."""

    config: ResNetConfig

    @nn.compact
    def __call__(self, images: Float[Array, "batch h w c"], by_batch: bool = False) -> Float[Array, "batch classes"]:
        c = self.config
        if c.stem == "cifar":
            x = ConvNorm(c.embedding, 3, name="embedder")(images, by_batch)
        else:
            x = max_pool(ConvNorm(c.embedding, 7, 2, name="embedder")(images, by_batch), 3, 2, 1)
        for stage, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True)):
            for i in range(depth):
                stride = c.strides(stage) if i == 0 else 1
                x = Block(c, width, stride, name=f"stage_{stage}_{i}")(x, by_batch)
        return Linear(c.classes, name="classifier")(average_pool(x)[:, 0, 0])


def names(config: ResNetConfig) -> dict[tuple[str, ...], str]:
    """Our path of each module with weights -> its name in transformers' checkpoints."""
    found: dict[tuple[str, ...], str] = {("embedder",): "resnet.embedder.embedder", ("classifier",): "classifier.1"}
    inputs = config.embedding
    for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
        for i in range(depth):
            ours, theirs = f"stage_{stage}_{i}", f"resnet.encoder.stages.{stage}.layers.{i}"
            for layer in range(3 if config.bottleneck else 2):
                found[ours, f"layer_{layer}"] = f"{theirs}.layer.{layer}"
            if i == 0 and (inputs != width or config.strides(stage) != 1):
                found[ours, "shortcut"] = f"{theirs}.shortcut"
        inputs = width
    return found


def from_json(raw: Mapping[str, Any], classes: int, where: str) -> ResNetConfig:
    """The configuration of a folder that transformers wrote, or of ours (which has a `stem`).

    Raises:
      UserError: what this ResNet would compute otherwise.
    """
    if raw.get("hidden_act", "relu") != "relu":
        raise UserError(f"{where}: hidden_act is {raw['hidden_act']!r}; only relu is supported")
    stem = raw.get("stem", "imagenet")
    if stem not in STEMS:
        raise UserError(f"{where}: stem is {stem!r}; valid: {', '.join(STEMS)}")
    kind = raw.get("layer_type", "bottleneck")
    if kind not in ("basic", "bottleneck"):
        raise UserError(f"{where}: layer_type is {kind!r}; valid: basic, bottleneck")
    return ResNetConfig(
        classes, raw.get("num_channels", 3), stem, raw.get("embedding_size", 64),
        tuple(raw.get("hidden_sizes", (256, 512, 1024, 2048))), tuple(raw.get("depths", (3, 4, 6, 3))),
        kind == "bottleneck", raw.get("downsample_in_first_stage", False), raw.get("downsample_in_bottleneck", False),
    )  # fmt: skip


def to_json(config: ResNetConfig) -> dict[str, Any]:
    """config.json's entries; transformers reads a folder with the ImageNet stem."""
    return {
        "model_type": "resnet", "architectures": ["ResNetForImageClassification"], "num_channels": config.channels,
        "embedding_size": config.embedding, "hidden_sizes": list(config.widths), "depths": list(config.depths),
        "layer_type": "bottleneck" if config.bottleneck else "basic", "hidden_act": "relu",
        "downsample_in_first_stage": config.stride_in_first_stage,
        "downsample_in_bottleneck": config.stride_in_first_layer,
        **({"stem": config.stem} if config.stem != "imagenet" else {}),
    }  # fmt: skip
