"""TIES merging (2306.01708): trim each delta to its largest entries, elect a sign per entry, average what agrees.

Four codes bear the name and compute different things. With x_i the trimmed delta of candidate i:

| | trim | elected: the sign of | where that sum is 0 | value, summed over agreeing entries |
|---|---|---|---|---|
| "paper" | whole model | sum_i w_i x_i | majority of the elected signs | sum w_i x_i / sum of their w_i |
| "peft" | each tensor | sum_i x_i ("total"), sum_i sign x_i ("frequency") | plus | sum w_i x_i / their number |
| "mergekit" | each tensor | sum_i w_i x_i | plus | as "paper"; undivided with normalize=False |
| "fusion_bench" | whole model | as "paper" | as "paper" | sum w_i x_i; merge_func mean or max of them |

An entry agrees if its sign (weighted, where the vote is) is the elected one; zeros never agree. lambda scales the
value.

- "paper" follows the authors' published code, which keeps floor(density * size) + 1 entries (one more than the paper's
  top-k; all of them at density 1) and, where even the majority is 0, takes the negative entries. The paper has no
  weights: here they are relative (only their ratios matter, the default is its plain mean), and a negative one enters
  its candidate negated.
- "peft" keeps k = int(density * size) entries; where that is 0 everything is trimmed and the merge is zero, as there.
  A candidate of weight 0 still votes and is counted. Weights are 1 unless given, and are not normalised.
- "mergekit" keeps k = int(density * size) too (mergekit itself refuses k = 0).
- "fusion_bench" trims like "paper" and sums by default, with lambda .3 (its scaling_factor). It has no weights: here a
  delta is multiplied by its own, 1 unless given.

`trim` says what becomes of ties at the threshold, and how k is rounded.
"""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32
from unlearnjax_kernels.threshold import api as threshold

from unlearnjax.merging import elect, trim
from unlearnjax.merging.arithmetic import mergekit_rule, peft_rule
from unlearnjax.merging.protocol import (
    LAMBDA,
    Draws,
    Hyperparameter,
    MergeMethod,
    Properties,
    Round,
    Rule,
    Settings,
    rounds_on,
    total,
)
from unlearnjax.merging.sparsify import LARGEST
from unlearnjax.merging.trim import DENSITY, Trim

MERGE_FUNCTION = Hyperparameter(
    "merge_func", "what becomes of the agreeing entries", default="sum", choices=("sum", "mean", "max")
)


class TiesState(NamedTuple):
    """The trim of the whole model, and its overall majority sign (-1, 0 or 1)."""

    trim: Trim
    majority: Int32[Array, ""]


def _start(size: int, count: int, settings: Settings) -> TiesState:
    """The code's k-th smallest entry is itself kept: one more than density * size."""
    return TiesState(trim.start(size, count, settings, extra=1), jnp.int32(0))


def _count_signs(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: TiesState,
    draws: Draws,
    base: Any,
    settings: Settings,
) -> Int32[Array, "2"]:
    votes = elect.weighted_sum(trim.trimmed(deltas, state.trim, draws), elect.relative(weights))
    return threshold.to_limbs(jnp.sum(jnp.sign(votes).astype(jnp.int32), dtype=jnp.int32))


def _majority(state: TiesState, signs: Int32[Array, "2"], settings: Settings) -> TiesState:
    return state._replace(majority=threshold.sign(signs))


def _combine_paper(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: TiesState,
    draws: Draws,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    return settings["lambda"] * elect.paper(deltas, weights, state.majority, state.trim.search.low)


def _combine_fusion_bench(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: TiesState,
    draws: Draws,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    weighted = [weights[i] * delta for i, delta in enumerate(trim.trimmed(deltas, state.trim, draws))]
    votes = elect.weighted_sum(trim.trimmed(deltas, state.trim, draws), elect.relative(weights))
    elected = jnp.where(votes == 0, state.majority.astype(jnp.float32), jnp.sign(votes))
    kept = [jnp.where(jnp.where(elected > 0, x > 0, x < 0), x, jnp.float32(0)) for x in weighted]
    if settings["merge_func"] == "max":
        largest = functools.reduce(jnp.maximum, [jnp.abs(x) for x in kept])
        return settings["lambda"] * elected * largest
    value = total(kept)
    if settings["merge_func"] == "mean":
        value = value / jnp.maximum(total([(x != 0).astype(jnp.float32) for x in kept]), jnp.float32(1))
    return settings["lambda"] * value


def _check_weights(weights: np.ndarray, settings: Settings) -> str | None:
    return "all of them are 0" if not weights.any() else None


_ROUNDS = (*rounds_on("trim", trim.ROUNDS), Round(_count_signs, _majority))
_IDENTITY = (("density", 1.0), ("lambda", 1.0))

TIES = MergeMethod(
    "ties",
    "trim to the largest entries, elect a sign, average the entries that agree",
    (
        Rule(
            "paper",
            "TIES-Merging 2306.01708, the authors' code",
            _combine_paper,
            Properties(identity=_IDENTITY, negation="unless sums cancel"),
            hyperparameters=(DENSITY, LAMBDA),
            scope="tree",
            start=_start,
            rounds=_ROUNDS,
            check_weights=_check_weights,
        ),
        peft_rule(LARGEST, "PEFT 0.21 merge_utils.ties; combination_type ties in space factors", elects=True),
        mergekit_rule(LARGEST, "mergekit 0.1.4 merge_method ties", elects=True, normalizes=True, rescales=False),
        Rule(
            "fusion_bench",
            "fusion_bench 0.2.33 ties_merging",
            _combine_fusion_bench,
            Properties(identity=_IDENTITY, negation="unless sums cancel"),
            hyperparameters=(DENSITY, MERGE_FUNCTION, LAMBDA._replace(default=0.3)),
            scope="tree",
            default_weight="one",
            start=_start,
            rounds=_ROUNDS,
            check_weights=_check_weights,
        ),
    ),
)
