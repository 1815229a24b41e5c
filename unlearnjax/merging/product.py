"""LoRA deltas that are not formed yet: a merge forms one layer's at a time, where it reads them."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float32

from unlearnjax.distributed.rules import gathered


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product:
    """scale_i b_i a_i of N candidates: to a merge a leaf [N, L, out, in] of float32, whose first stacked axis is L.

    `mesh`: the devices that the factors are cut over as `cut_for_merging` says, where there are several.
    """

    a: Float32[Array, "N L r in"]
    b: Float32[Array, "N L out r"]
    scale: Float32[Array, "N"]
    mesh: Mesh | None = dataclasses.field(default=None, metadata={"static": True})

    dtype = jnp.dtype(jnp.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.b.shape[:3], self.a.shape[3])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def layer(self, i: Any) -> Float32[Array, "N out in"]:
        """The deltas of one layer."""
        a, b = (jax.lax.dynamic_index_in_dim(x, i, axis=1, keepdims=False) for x in (self.a, self.b))
        return scaled_product(b, self._gathered(a), self.scale)

    def all_layers(self) -> Float32[Array, "N L out in"]:
        return scaled_product(self.b, self._gathered(self.a), self.scale)

    def _gathered(self, a: Array) -> Array:
        return a if self.mesh is None else gathered(self.mesh, a)


def is_product(x: object) -> bool:
    return isinstance(x, Product)


def scaled_product(
    b: Float32[Array, "*N out r"], a: Float32[Array, "*N r in"], scale: Float32[Array, "*M"]
) -> Float32[Array, "*N out in"]:
    """scale * b @ a; of a stack each with its own."""
    # A TPU would multiply in bfloat16 by default, and deltas are float32.
    found = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    return scale.reshape(*scale.shape, *(1,) * (found.ndim - scale.ndim)) * found


@jax.jit
def largest_possible(x: Product) -> Float32[Array, "N"]:
    """No entry of a candidate's deltas is larger in magnitude; NaN or infinity where a factor holds one."""
    a, b = (jnp.max(jnp.abs(factor), axis=(1, 2, 3)) for factor in (x.a, x.b))
    return jnp.abs(x.scale) * jnp.float32(x.a.shape[2]) * a * b


@jax.jit
def finite(x: Product) -> Bool[Array, "N"]:
    """Which candidates' deltas hold neither NaN nor infinity, formed layer by layer."""
    found = jax.lax.map(lambda i: jnp.isfinite(x.layer(i)).all(axis=(1, 2)), jnp.arange(x.shape[1]))
    return found.all(axis=0)
