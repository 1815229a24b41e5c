"""Random augmentation of a batch of images inside the compiled training program.

How strong it is differs between candidates, so every strength is an array and `augment` is mapped over candidates like
the rest of their step.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from unlearnjax.data.randaugment import MAX_LEVEL, OPERATIONS, apply_operation, operation_argument

# ImageNet's mean colour (CLIP's is (123, 117, 104)) and its luma, by the number of channels.
FILL = {3: (124.0, 116.0, 104.0), 1: (117.0,)}


class Strength(NamedTuple):
    """One candidate's; those of N candidates have a leading axis N. All zero: images stay as they are."""

    flip: Float[Array, ""]  # the probability of a horizontal flip
    crop_padding: Int[Array, ""]  # pixels of zeros on each side, before a random crop back to the image's size
    magnitude: Float[Array, ""]  # RandAugment's M, 0 to 10
    operations: Int[Array, ""]  # RandAugment's N
    magnitude_std: Float[Array, ""]  # of the level of each operation about M; 0.5 in timm's `rand-mM-nN-mstd0.5`


def augment(
    key: PRNGKeyArray,
    images: Float[Array, "batch h w c"],
    strength: Strength,
    *,
    most_operations: int,
    crops: bool = True,
    fill: tuple[float, ...] | None = None,
) -> Float[Array, "batch h w c"]:
    """Flip and crop each image, then apply RandAugment.

    RandAugment is timm's `rand-mM-nN-mstdS`: N times an operation drawn uniformly and applied with probability 0.5, at
    a level drawn from Normal(M, S) and clipped to [0, 10]; see `randaugment` for where it differs.

    A row's randomness depends on the key and its place in the batch, not on the batch's size or `most_operations`.

    Args:
      key: of this batch and candidate.
      images: whole numbers 0 to 255 in float32; 1 or 3 channels. So is what is returned.
      strength: one candidate's.
      most_operations: no candidate's `operations` is larger. 0 compiles RandAugment away.
      crops: False compiles random crops away, where every candidate's `crop_padding` is 0.
      fill: the colour that rotations, shears and translations move in; default: ImageNet's mean.
    """
    batch, _, _, channels = images.shape
    colour = jnp.asarray(FILL[channels] if fill is None else fill, jnp.float32)

    def one(row: Int[Array, ""], image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        for_place, for_operations = jax.random.split(jax.random.fold_in(key, row))

        def operation(step: Int[Array, ""], image: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
            wanted = step < strength.operations
            return _random_operation(jax.random.fold_in(for_operations, step), image, strength, wanted, colour)

        # A loop, because unrolled steps take twice as long on a CPU: XLA fuses them and computes values repeatedly.
        return jax.lax.fori_loop(0, most_operations, operation, _flip_and_crop(for_place, image, strength, crops))

    return jax.vmap(one)(jnp.arange(batch), images)


def _flip_and_crop(
    key: PRNGKeyArray, image: Float[Array, "h w c"], strength: Strength, crops: bool
) -> Float[Array, "h w c"]:
    height, width, _ = image.shape
    flip, down, right = jax.random.uniform(key, (3,))
    columns = jnp.arange(width)
    columns = jnp.where(flip < strength.flip, columns[::-1], columns)
    if not crops:
        return image[:, columns]

    def offset(uniform: Float[Array, ""]) -> Int[Array, ""]:
        positions = (2 * strength.crop_padding + 1).astype(jnp.float32)
        return jnp.floor(uniform * positions).astype(jnp.int32) - strength.crop_padding

    # The window into the padded image, in the image's own coordinates: the padding itself is never made, so that its
    # width needs no bound. A gather, because one-hot matrices take six times as long on a CPU (1.8 ms for 128 images).
    rows, columns = jnp.arange(height) + offset(down), columns + offset(right)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))[None]
    window = image[jnp.clip(rows, 0, height - 1)[:, None], jnp.clip(columns, 0, width - 1)[None]]
    return jnp.where(inside[..., None], window, 0.0)


def _random_operation(
    key: PRNGKeyArray,
    image: Float[Array, "h w c"],
    strength: Strength,
    wanted: Bool[Array, ""],
    fill: Float[Array, " c"],
) -> Float[Array, "h w c"]:
    for_choice, for_level = jax.random.split(key)
    choice, applied, negative = jax.random.uniform(for_choice, (3,))
    operation = jnp.floor(choice * len(OPERATIONS)).astype(jnp.int32)
    level = strength.magnitude + strength.magnitude_std * jax.random.normal(for_level)
    argument = operation_argument(operation, jnp.clip(level, 0.0, MAX_LEVEL), negative < 0.5)
    return apply_operation(image, jnp.where(wanted & (applied < 0.5), operation, -1), argument, fill)
