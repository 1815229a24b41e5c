"""VGG-16 with batch normalisation (1409.1556), for CIFAR: five pooled stages of 3x3 convolutions and a linear head.

torchvision's has two hidden layers of 4096 and dropout before its head; `hidden` says how many here, 0 as the CIFAR
reproductions of NegMerge have it. transformers has no VGG: the names are torchvision's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from unlearnjax.models.vision.layers import BatchNorm, Conv, Linear, average_pool, max_pool


@dataclass(frozen=True)
class VGGConfig:
    """stages: the widths of each stage's convolutions. pooled: the grid of means that the head sees."""

    classes: int
    channels: int = 3
    stages: tuple[tuple[int, ...], ...] = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
    hidden: tuple[int, ...] = ()
    pooled: int = 1


class VGG(nn.Module):
    """Images [batch, height, width, channels] to logits. No dropout: unlearning fine-tunes without it."""

    config: VGGConfig

    @nn.compact
    def __call__(self, images: Float[Array, "batch h w c"], by_batch: bool = False) -> Float[Array, "batch classes"]:
        c, x = self.config, images
        for s, stage in enumerate(c.stages):
            for i, width in enumerate(stage):
                x = Conv(width, 3, bias=True, name=f"conv_{s}_{i}")(x)
                x = nn.relu(BatchNorm(name=f"norm_{s}_{i}")(x, by_batch))
            x = max_pool(x, 2, 2)
        x = average_pool(x, c.pooled).transpose(0, 3, 1, 2)  # torch flattens channels first
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(c.hidden):
            x = nn.relu(Linear(width, name=f"hidden_{i}")(x))
        return Linear(c.classes, name="classifier")(x)


def names(config: VGGConfig) -> dict[tuple[str, ...], str]:
    """Our path of each module with weights -> torchvision's name."""
    found: dict[tuple[str, ...], str] = {}
    place = 0
    for s, stage in enumerate(config.stages):
        for i in range(len(stage)):
            found[(f"conv_{s}_{i}",)] = f"features.{place}"
            found[(f"norm_{s}_{i}",)] = f"features.{place + 1}"
            place += 3  # convolution, normalisation, ReLU
        place += 1  # the pool
    for i in range(len(config.hidden)):
        found[(f"hidden_{i}",)] = f"classifier.{3 * i}"  # linear, ReLU, dropout
    found[("classifier",)] = f"classifier.{3 * len(config.hidden)}" if config.hidden else "classifier"
    return found


def from_json(raw: Mapping[str, Any], classes: int, where: str) -> VGGConfig:
    """The configuration of a folder of ours."""
    stages = tuple(tuple(stage) for stage in raw["stages"])
    return VGGConfig(classes, raw.get("num_channels", 3), stages, tuple(raw.get("hidden", ())), raw.get("pooled", 1))


def to_json(config: VGGConfig) -> dict[str, Any]:
    """config.json's entries."""
    return {
        "model_type": "vgg", "num_channels": config.channels, "stages": [list(stage) for stage in config.stages],
        "hidden": list(config.hidden), "pooled": config.pooled,
    }  # fmt: skip
