"""Losses of micro-batches that mix forget and retain rows.

Selective Amnesia (2504.12996, its code unlearn.py): L = -CE_forget + m CE_retain, each the mean over the answer tokens
of its side of the micro-batch, 0 where the micro-batch lacks the side. In the first epoch m = 1.2; after it, with ref
the mean CE_retain of the first epoch's micro-batches,

    m = clip(a b^(CE_retain - ref) + c, 1.2, 2.3) rounded to one decimal where CE_retain > ref, else 1.2,

a = .3, b = 6, c = .8. `pool_retain_rows` is the same with ref as the code computes it: the sum of these means divided
by the number of retain *rows*, so about a sixth of the mean at its batches of 12, which raises m more often.

SUGD and AGAD (AILS-NTUA's code): the mean over the micro-batch's rows of factor x (mean CE of the row's answer tokens),
factor -1 for forget rows (`row_ga`) and the term's weight for retain rows (`row_retain`).
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jaxtyping import Array

from unlearnjax.data.tokens import Side
from unlearnjax.objectives.protocol import Adaptive, Scores, Term, row_sums, token_mean
from unlearnjax.training.hyperparameters import Hyperparameters

ADAPTIVE = {"a": 0.3, "b": 6.0, "c": 0.8, "least": 1.2, "most": 2.3}


def part(side: Side, retained: bool) -> Side:
    """The micro-batches with one side's rows alone."""
    assert side.retained is not None
    own = side.retained if retained else ~side.retained
    return side._replace(assign=side.assign * own.astype(jnp.float32)[None])


def _ascent(scores: Scores, side: Side, h: Hyperparameters) -> Array:
    return token_mean(scores.log_probability, part(side, retained=False))


def _descent(scores: Scores, side: Side, h: Hyperparameters) -> Array:
    return -token_mean(scores.log_probability, part(side, retained=True))


def _by_row(scores: Scores, side: Side, retained: bool) -> Array:
    """Each micro-batch's sum over one side's rows of their mean log-probability, over the number of all its rows."""
    means = row_sums(scores.log_probability, side) / jnp.maximum(jnp.sum(side.mask.astype(jnp.float32), axis=1), 1.0)
    return part(side, retained).assign @ means / jnp.maximum(jnp.sum(side.assign, axis=1), 1.0)


def multiplier(loss: Array, reference: Array, own: Mapping[str, Array]) -> Array:
    """Selective Amnesia's m after its first epoch, by the retain loss and its reference."""
    risen = own["a"] * own["b"] ** (loss - reference) + own["c"]
    rounded = jnp.round(10.0 * risen) / 10.0
    return jnp.where(loss > reference, jnp.clip(rounded, own["least"], own["most"]), own["least"])


def _adaptive(name: str, by_rows: bool) -> Term:
    def remember(losses: Array, side: Side, epoch: Array, memory: Mapping[str, Array]) -> dict[str, Array]:
        rows = jnp.sum(part(side, retained=True).assign, axis=1)
        first = jnp.where(epoch == 0, 1.0, 0.0)
        count = rows if by_rows else (rows > 0.0).astype(jnp.float32)
        return {"sum": memory["sum"] + first * jnp.sum(losses), "count": memory["count"] + first * jnp.sum(count)}

    def weigh(losses: Array, memory: Mapping[str, Array], epoch: Array, h: Hyperparameters) -> Array:
        own = h.term_parameters[name]
        later = multiplier(losses, memory["sum"] / jnp.maximum(memory["count"], 1.0), own)
        return jnp.where(epoch == 0, own["least"], later)

    adaptive = Adaptive(("sum", "count"), remember, weigh)
    return Term(name, "pool", frozenset(), _descent, parameters=ADAPTIVE, adaptive=adaptive)


pool_ga = Term("pool_ga", "pool", frozenset(), _ascent)
pool_retain = _adaptive("pool_retain", by_rows=False)
pool_retain_rows = _adaptive("pool_retain_rows", by_rows=True)
row_ga = Term("row_ga", "pool", frozenset(), lambda scores, side, h: _by_row(scores, side, retained=False))
row_retain = Term("row_retain", "pool", frozenset(), lambda scores, side, h: -_by_row(scores, side, retained=True))
