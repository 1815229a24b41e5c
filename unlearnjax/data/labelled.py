"""Labelled images on the device, as training and scoring take them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from unlearnjax.errors import UserError


class Labelled(NamedTuple):
    """Images with their labels; rows are taken and prepared inside of the compiled programs."""

    pixels: UInt8[Array, "n height width channels"]
    labels: Int[Array, " n"]


def labelled(pixels: np.ndarray, labels: np.ndarray) -> Labelled:
    """uint8 [n, height, width, channels] and integers [n], put on the device.

    Raises:
      UserError: another dtype (pixels in [0, 1] would all become black) or shape.
    """
    if (
        (pixels.dtype, pixels.ndim) != (np.uint8, 4)
        or not np.issubdtype(labels.dtype, np.integer)
        or labels.shape != pixels.shape[:1]
    ):
        raise UserError(
            f"labelled: pixels are {pixels.dtype} {list(pixels.shape)} and labels {labels.dtype} {list(labels.shape)}; "
            "they must be uint8 [n, height, width, channels] and integers [n]"
        )
    return Labelled(jnp.asarray(pixels, jnp.uint8), jnp.asarray(labels, jnp.int32))
