"""Lengths of adapters and angles between them, as deltas B A and without forming any delta.

    <B1 A1, B2 A2> = trace((B2^T B1) (A1 A2^T))                (Frobenius; summed over layers and linears)

so T adapters of rank r cost T^2 products of r x r instead of T matrices of out x in. Steps of training are differences
of adapters, and their products follow from the adapters' own because the product is bilinear.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from unlearnjax.distributed.processes import fetch
from unlearnjax.errors import UserError


class Gram(NamedTuple):
    """Inner products of T deltas, float64: over everything, and for each linear of every layer."""

    whole: Float[np.ndarray, "T T"]
    by_module: dict[str, Float[np.ndarray, "T T"]]  # "attention.q.0": the linear q of layer 0


def _is_pair(x: object) -> bool:
    return isinstance(x, dict) and set(x) == {"a", "b"}


@jax.jit
def _products(a: Float[Array, "T L r in"], b: Float[Array, "T L out r"]) -> Float[Array, "L T T"]:
    inner = jnp.einsum("slri,tlqi->lstrq", a, a, precision="highest", preferred_element_type=jnp.float32)
    outer = jnp.einsum("slor,tloq->lstrq", b, b, precision="highest", preferred_element_type=jnp.float32)
    return jnp.einsum("lstrq,lstrq->lst", inner, outer, precision="highest")


def gram(adapters: PyTree[Array]) -> Gram:
    """The inner products of T adapters.

    Args:
      adapters: a stack {"layers": {block: {linear: {"a": [T, L, r, in], "b": [T, L, out, r]}}}}, scale folded into b.

    Raises:
      UserError: no linear is adapted.
    """
    by_module = {}
    for block, linears in adapters["layers"].items():
        for name, pair in linears.items():
            for layer, products in enumerate(np.asarray(fetch(_products(pair["a"], pair["b"])), np.float64)):
                by_module[f"{block}.{name}.{layer}"] = products
    if not by_module:
        raise UserError("geometry: the adapter has no linears")
    return Gram(np.sum(list(by_module.values()), axis=0), by_module)


def lengths(products: Float[np.ndarray, "T T"]) -> Float[np.ndarray, " T"]:
    """Frobenius norms of the deltas."""
    return np.sqrt(np.maximum(np.diagonal(products), 0.0))


def step_product(products: Float[np.ndarray, "T T"], u: tuple[int | None, int], v: tuple[int | None, int]) -> float:
    """The inner product of the steps u and v, each from one delta to another; None is where training began (zero)."""

    def at(i: int | None, j: int | None) -> float:
        return 0.0 if i is None or j is None else float(products[i, j])

    return at(u[1], v[1]) - at(u[1], v[0]) - at(u[0], v[1]) + at(u[0], v[0])


def step_angle(
    products: Float[np.ndarray, "T T"], u: tuple[int | None, int], v: tuple[int | None, int]
) -> float | None:
    """The angle between two steps in degrees; None if one of them goes nowhere."""
    square = step_product(products, u, u) * step_product(products, v, v)
    if not square > 0:
        return None
    return float(np.degrees(np.arccos(np.clip(step_product(products, u, v) / np.sqrt(square), -1.0, 1.0))))


def turning_angles(products: Float[np.ndarray, "T T"], turn: int, last: int) -> dict[str, float | None]:
    """ZJUKLAB's three angles (2503.21088, figure 4): d1 to the turning point, d2 from it to the end, d3 all the way."""
    d1, d2, d3 = (None, turn), (turn, last), (None, last)
    pairs = {"d1_d2": (d1, d2), "d1_d3": (d1, d3), "d2_d3": (d2, d3)}
    return {name: step_angle(products, u, v) for name, (u, v) in pairs.items()}
