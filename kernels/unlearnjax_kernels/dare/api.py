"""Random keeping as the rest of the code calls it.

    bits(seed, candidate, places)            uniform uint32 per entry
    kept(seed, candidate, places, density)   True with probability `density`
    places(shape, part)                      the entries' places in their whole tensor
    drop(x, seed, candidate, density, start) x where it is kept, 0 elsewhere

Where an entry lies on a mesh or in a stream does not matter: its bits are a function of its place. In XLA the bits fuse
into whatever uses them, and nothing but that is written.
"""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, UInt32

from unlearnjax_kernels.dare import pallas, reference
from unlearnjax_kernels.dare.xla import Part, bits, kept, places

Implementation = Literal["xla", "pallas", "pallas_interpret", "reference"]
__all__ = ["Implementation", "Part", "bits", "drop", "kept", "places"]


def drop(
    x: Float[Array, "..."],
    seed: UInt32[Array, "2"],
    candidate: int | UInt32[Array, ""],
    density: Float32[Array, ""],
    start: int | UInt32[Array, ""] = 0,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "..."]:
    """x where it is kept (DARE 2311.03099, equation 1, before the rescaling), 0 elsewhere.

    Args:
      x: any shape and floating dtype: a whole tensor, or a part of it that is contiguous in row-major order.
      seed, candidate: what the draw is for.
      density: the probability of staying.
      start: the place of x's first entry in its tensor.
      implementation: None is "xla" everywhere. "pallas" is the TPU kernel (no one has timed it against XLA's fusion
        yet); "reference" needs concrete arrays.

    Raises:
      ValueError: an unknown implementation.
    """
    first, share = jnp.asarray(start).astype(jnp.uint32), jnp.asarray(density, jnp.float32)
    if implementation in ("pallas", "pallas_interpret"):
        return pallas.drop(x, seed, candidate, share, first, implementation == "pallas_interpret")
    if implementation == "reference":
        found = reference.drop(np.asarray(x), np.asarray(seed), int(candidate), float(density), int(start))
        return jnp.asarray(found)
    if implementation in (None, "xla"):
        place = places(x.shape) + first
        return jnp.where(kept(seed, candidate, place, share), x, jnp.zeros((), x.dtype))
    raise ValueError(f"unknown implementation {implementation!r}; valid: xla, pallas, pallas_interpret, reference")
