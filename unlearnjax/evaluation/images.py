"""Scoring edited image models: rows of a data set, and every point start - lambda * direction of a sweep."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from unlearnjax.data.labelled import Labelled
from unlearnjax.errors import UserError
from unlearnjax.models.vision.layers import MOMENTUM
from unlearnjax.models.vision.net import Net

BATCH = 500


class Scored(NamedTuple):
    """Of each row: whether the largest logit is its label's, and its label's softmax probability (float32).

    A sweep's have leading axes [directions, lambdas].
    """

    correct: Bool[np.ndarray, "*points rows"]
    confidence: Float[np.ndarray, "*points rows"]

    def accuracy(self) -> Float[np.ndarray, "*points"]:
        """In percent."""
        return 100 * self.correct.mean(axis=-1)


class Sheet(NamedTuple):
    """Rows to score, and the weights that are not edited: CLIP's head differs between data sets."""

    data: Labelled
    fixed: PyTree[Array]


def score(net: Net, trained: PyTree[Array], sheet: Sheet, batch: int = BATCH) -> Scored:
    """Score all rows of a sheet.

    Raises:
      UserError: there are none.
    """
    count = int(sheet.data.labels.shape[0])
    found = jax.device_get([_of_rows(net, trained, sheet, own) for own in _rows(sheet, batch)])
    return Scored(*(np.concatenate(values)[:count] for values in zip(*found, strict=True)))


def sweep(
    net: Net,
    start: PyTree[Array],
    directions: Sequence[PyTree[Array]],
    lambdas: Sequence[float],
    sheets: Mapping[str, Sheet],
    *,
    one_program: bool | None = None,
    batch: int = BATCH,
) -> dict[str, Scored]:
    """Score start - lambda * direction for all directions and lambdas on every sheet.

    Args:
      one_program: one compiled program per sheet's size for all points, the lambdas of a direction mapped together;
        needs memory for all directions. False: one program that is called for each point and batch. Default: the
        first on accelerators, the second on a CPU, where convolutions are slow inside of loops.

    Returns:
      For each sheet the scores with leading axes [directions, lambdas].

    Raises:
      UserError: no directions, lambdas, or rows of a sheet.
    """
    if not directions or not lambdas:
        raise UserError("sweep: give at least one direction and one lambda")
    together = jax.default_backend() != "cpu" if one_program is None else one_program
    run = _together if together else _points
    return {name: run(net, start, directions, lambdas, sheet, batch) for name, sheet in sheets.items()}


def edit(start: PyTree[Array], direction: PyTree[Array], factor: float | Float[Array, ""]) -> PyTree[Array]:
    """start - factor * direction; where the product is 0 the weight is the start's, bit for bit."""

    def one(weight: Array, change: Array) -> Array:
        step = jnp.asarray(factor, weight.dtype) * change
        return jnp.where(step == 0, weight, weight - step)  # -0.0 - -0.0 is 0.0

    return jax.tree.map(one, start, direction)


@functools.partial(jax.jit, static_argnums=0)
def _of_rows(net: Net, trained: PyTree[Array], sheet: Sheet, rows: Array) -> tuple[Array, Array]:
    logits, _ = net.logits(trained, sheet.fixed, sheet.data.pixels[rows].astype(jnp.float32))
    labels = sheet.data.labels[rows]
    own = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), labels[:, None], axis=-1)[:, 0]
    return jnp.argmax(logits, axis=-1) == labels, own


_edited = jax.jit(edit)


@functools.partial(jax.jit, static_argnums=0)
def _all_points(net: Net, start: PyTree, directions: PyTree, factors: Array, sheet: Sheet, rows: Array) -> tuple:
    def one(direction: PyTree) -> tuple[Array, Array]:
        edited = jax.vmap(lambda factor: edit(start, direction, factor))(factors)
        return jax.lax.map(lambda own: jax.vmap(lambda w: _of_rows(net, w, sheet, own))(edited), rows)

    return jax.lax.map(one, directions)


def _rows(sheet: Sheet, batch: int) -> Array:
    """[batches, batch]: all rows in order, and the last one again until the last batch is full."""
    count = int(sheet.data.labels.shape[0])
    if not count:
        raise UserError("there are no rows to score")
    size = min(batch, count)
    return jnp.minimum(jnp.arange(-(-count // size) * size, dtype=jnp.int32), count - 1).reshape(-1, size)


def _points(
    net: Net, start: PyTree, directions: Sequence[PyTree], lambdas: Sequence[float], sheet: Sheet, batch: int
) -> Scored:
    found = []
    for direction in directions:
        own = jax.device_put(direction)  # once, not for every lambda
        found.append([score(net, _edited(start, own, jnp.float32(factor)), sheet, batch) for factor in lambdas])
    return Scored(*(np.stack([[getattr(one, name) for one in row] for row in found]) for name in Scored._fields))


def _together(
    net: Net, start: PyTree, directions: Sequence[PyTree], lambdas: Sequence[float], sheet: Sheet, batch: int
) -> Scored:
    rows, count = _rows(sheet, batch), int(sheet.data.labels.shape[0])
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
    found = _all_points(net, start, stacked, jnp.asarray(lambdas, jnp.float32), sheet, rows)
    # [directions, batches, lambdas, batch]
    flat = [np.moveaxis(np.asarray(x), 1, 2).reshape(len(directions), len(lambdas), -1)[..., :count] for x in found]
    return Scored(*flat)


def re_estimated(net: Net, trained: PyTree[Array], sheet: Sheet, batch: int = BATCH) -> PyTree[Array]:
    """`fixed` with BatchNorm's statistics measured anew for edited weights: means over the batches of `sheet` (the last
    one, where it is not full, is left out unless it is the only one).

    Raises:
      UserError: a model without BatchNorm, or a linearised one; no rows.
    """
    count = int(sheet.data.labels.shape[0])
    size = min(batch, count)
    if net.linear or not sheet.fixed.get("statistics"):
        raise UserError(
            "re_estimated: only models with BatchNorm have statistics, and linearised ones keep their start's"
        )
    if not count:
        raise UserError("re_estimated: there are no rows")
    fixed = {**sheet.fixed, "statistics": jax.tree.map(jnp.zeros_like, sheet.fixed["statistics"])}
    total = None
    for begin in range(0, count - size + 1, size):
        own = jnp.arange(begin, begin + size, dtype=jnp.int32)
        found = _batch_statistics(net, trained, Sheet(sheet.data, fixed), own)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    return {**sheet.fixed, "statistics": jax.tree.map(lambda x: x / (MOMENTUM * (count // size)), total)}


@functools.partial(jax.jit, static_argnums=0)
def _batch_statistics(net: Net, trained: PyTree, sheet: Sheet, rows: Array) -> PyTree[Array]:
    """The running ones, moved towards the batch's own."""
    _, moved = net.logits(trained, sheet.fixed, sheet.data.pixels[rows].astype(jnp.float32), True)
    return moved["statistics"]
