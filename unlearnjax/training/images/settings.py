"""What may differ between candidates of an image model, as plain data and as arrays."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from unlearnjax.data.augment import Strength
from unlearnjax.errors import UserError
from unlearnjax.training.hyperparameters import SCHEDULES

OPTIMIZERS = ("sgd", "adamw")
BATCH_NORM = ("frozen", "batch")
MAPPINGS = ("vmap", "unroll")


@dataclass(frozen=True)
class ImageCandidate:
    """One fine-tune's settings.

    Attributes:
      epochs: passes over its rows. schedule: of the learning rate (`steps`: a tenth after half and after three quarters
        of the updates), after warmup_updates of linear warmup.
      momentum: of SGD (AdamW has none). max_grad_norm: None is no clipping.
      label_smoothing: share spread evenly over the classes.
      flip: probability of a horizontal flip. crop_padding: pixels of zeros around, before a random crop.
      magnitude, operations: RandAugment's M and N (N = 0: none), as timm's rand-mM-nN-mstd0.5.
      ascend: climb the loss instead of descending. l1: weight of the sum of magnitudes of all weights, which falls
        linearly to 0 (l1-sparse, 2304.04934).
      seed: of the order of rows and of the augmentation.
    """

    name: str
    learning_rate: float = 0.05
    weight_decay: float = 5e-4
    epochs: int = 10
    momentum: float = 0.9
    schedule: str = "cosine"
    warmup_updates: int = 0
    max_grad_norm: float | None = None
    label_smoothing: float = 0.0
    flip: float = 0.0
    crop_padding: int = 0
    magnitude: float = 0.0
    operations: int = 0
    ascend: bool = False
    l1: float = 0.0
    seed: int = 0


class Settings(NamedTuple):
    """One candidate's (or, stacked, all candidates'). Counts are in updates."""

    learning_rate: Float[Array, ""]
    weight_decay: Float[Array, ""]
    momentum: Float[Array, ""]
    label_smoothing: Float[Array, ""]
    max_grad_norm: Float[Array, ""]  # inf: no clipping
    warmup_updates: Float[Array, ""]
    total_updates: Float[Array, ""]
    schedule: Int[Array, ""]  # index into SCHEDULES
    sign: Float[Array, ""]  # of the loss: -1 climbs it
    l1: Float[Array, ""]
    seed: Int[Array, ""]
    strength: Strength


LARGEST_CROP_PADDING = 64
MAGNITUDE_STD = 0.5  # timm's mstd0.5


def check(candidate: ImageCandidate, where: str) -> None:
    """Refuse settings out of range.

    Raises:
      UserError: which candidate and setting, and what is allowed.
    """
    c = candidate
    rules: list[tuple[str, bool, str]] = [
        ("learning_rate", 0 < c.learning_rate < math.inf, "above 0"),
        ("weight_decay", 0 <= c.weight_decay < math.inf, "0 or more"),
        ("epochs", c.epochs >= 1, "1 or more"), ("momentum", 0 <= c.momentum < 1, "from 0 to below 1"),
        ("schedule", c.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ("warmup_updates", c.warmup_updates >= 0, "0 or more"),
        ("max_grad_norm", c.max_grad_norm is None or c.max_grad_norm > 0, "above 0, or null"),
        ("label_smoothing", 0 <= c.label_smoothing < 1, "from 0 to below 1"), ("flip", 0 <= c.flip <= 1, "from 0 to 1"),
        ("crop_padding", 0 <= c.crop_padding <= LARGEST_CROP_PADDING, f"from 0 to {LARGEST_CROP_PADDING}"),
        ("magnitude", 0 <= c.magnitude <= 10, "from 0 to 10"), ("operations", 0 <= c.operations <= 3, "from 0 to 3"),
        ("l1", 0 <= c.l1 < math.inf, "0 or more"), ("seed", 0 <= c.seed < 2**31, "from 0 to 2^31 - 1"),
    ]  # fmt: skip
    for name, good, allowed in rules:
        if not good:
            raise UserError(f"{where}: candidate {c.name}: {name} is {getattr(c, name)!r} and must be {allowed}")


def stack(candidates: Sequence[ImageCandidate], updates: Sequence[int]) -> Settings:
    """All candidates' settings, a leading axis N on every leaf. `updates`: how many each will take."""

    def column(values: Iterable[Any], dtype: Any = jnp.float32) -> Array:
        return jnp.asarray(list(values), dtype)

    return Settings(
        learning_rate=column(c.learning_rate for c in candidates),
        weight_decay=column(c.weight_decay for c in candidates),
        momentum=column(c.momentum for c in candidates),
        label_smoothing=column(c.label_smoothing for c in candidates),
        max_grad_norm=column(math.inf if c.max_grad_norm is None else c.max_grad_norm for c in candidates),
        warmup_updates=column(c.warmup_updates for c in candidates),
        total_updates=column(updates),
        schedule=column((SCHEDULES.index(c.schedule) for c in candidates), jnp.int32),
        sign=column(-1.0 if c.ascend else 1.0 for c in candidates),
        l1=column(c.l1 for c in candidates),
        seed=column((c.seed for c in candidates), jnp.uint32),
        strength=Strength(
            flip=column(c.flip for c in candidates),
            crop_padding=column((c.crop_padding for c in candidates), jnp.int32),
            magnitude=column(c.magnitude for c in candidates),
            operations=column((c.operations for c in candidates), jnp.int32),
            magnitude_std=column(MAGNITUDE_STD for _ in candidates),
        ),
    )
