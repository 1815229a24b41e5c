"""Labelled images on the device, as training and scoring take them."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8


class Labelled(NamedTuple):
    """Images with their labels; rows are taken and prepared inside of the compiled programs."""

    pixels: UInt8[Array, "n height width channels"]
    labels: Int[Array, " n"]


def labelled(pixels: np.ndarray, labels: np.ndarray) -> Labelled:
    """uint8 [n, height, width, channels] and [n], put on the device."""
    return Labelled(jnp.asarray(pixels, jnp.uint8), jnp.asarray(labels, jnp.int32))
