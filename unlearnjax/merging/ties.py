"""TIES merging (2306.01708): trim each delta to its largest entries, elect a sign per entry, average what agrees.

Four codes bear the name and compute different things. With x_i the trimmed delta of candidate i:

| | trim | elected: the sign of | where that sum is 0 | value, summed over agreeing entries |
|---|---|---|---|---|
| "paper" | whole model | sum_i w_i x_i | majority of the elected signs | sum w_i x_i / sum of their w_i |
| "peft" | each tensor | sum_i x_i ("total"), sum_i sign x_i ("frequency") | plus | sum w_i x_i / their number |
| "mergekit" | each tensor | sum_i w_i x_i | plus | as "paper"; undivided with normalize=False |

An entry agrees if its sign (weighted, where the vote is) is the elected one; zeros never agree. lambda scales the
value.

- "paper" follows the authors' published code, which keeps floor(density * size) + 1 entries (one more than the paper's
  top-k; all of them at density 1) and, where even the majority is 0, takes the negative entries. The paper has no
  weights: here they are relative (only their ratios matter, the default is its plain mean), and a negative one enters
  its candidate negated.
- "peft" keeps k = int(density * size) entries; where that is 0 everything is trimmed and the merge is zero, as there.
  A candidate of weight 0 still votes and is counted. Weights are 1 unless given, and are not normalised.
- "mergekit" keeps k = int(density * size) too (mergekit itself refuses k = 0).

Where several entries tie with the k-th largest magnitude all of them are kept; the codes break such ties arbitrarily.
A Python density gives k in double precision, as in those codes. A density that is a JAX array (traced or not) is
float32: its k may differ by about 6e-8 * size.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32
from unlearnjax_kernels.threshold import api as threshold

from unlearnjax.merging.protocol import (
    LAMBDA,
    Hyperparameter,
    MergeMethod,
    Properties,
    Round,
    Rule,
    Settings,
    candidates,
    total,
)

DENSITY = Hyperparameter("density", "share of each delta's entries kept by the trim", low=0.0, high=1.0, low_open=True)
MAJORITY = Hyperparameter(
    "majority_sign_method",
    "elect by the sum of the values or by the number of signs",
    default="total",
    choices=("total", "frequency"),
)
NORMALIZE = Hyperparameter("normalize", "divide by the summed weights of the agreeing candidates", default=True)


class TiesState(NamedTuple):
    """How many entries to keep (limbs), the search for that threshold, and the overall majority sign (-1, 0 or 1)."""

    keep: Int32[Array, "2"]
    search: threshold.Search
    majority: Int32[Array, ""]


def keep_count(density: float | Float32[Array, ""], size: int, extra: int = 0) -> Int32[Array, "2"]:
    """min(int(density * size) + extra, size) in limbs (see the module's last paragraph on precision)."""
    if isinstance(density, (int, float)):
        return threshold.to_limbs(min(int(density * size) + extra, size))
    product = jnp.minimum(jnp.floor(jnp.asarray(density, jnp.float32) * jnp.float32(size)), jnp.float32(size))
    high = jnp.floor(product / 65536)
    low = product - high * 65536  # exact: all are multiples of the product's last bit
    return jnp.stack([low.astype(jnp.int32) + extra, high.astype(jnp.int32)])


def _start_peft(size: int, count: int, settings: Settings) -> TiesState:
    return TiesState(keep_count(settings["density"], size), threshold.search(count), jnp.int32(0))


def _start_paper(size: int, count: int, settings: Settings) -> TiesState:
    return TiesState(keep_count(settings["density"], size, extra=1), threshold.search(count), jnp.int32(0))


def _count(deltas: Float[Array, "N ..."], weights: Array, state: TiesState, settings: Settings) -> Int32[Array, "N 2"]:
    return threshold.count(deltas, state.search)


def _narrow(state: TiesState, counts: Int32[Array, "N 2"], settings: Settings) -> TiesState:
    return state._replace(search=threshold.narrow(state.search, counts, state.keep))


def _trimmed(deltas: Float[Array, "N ..."], state: TiesState) -> list[Float32[Array, "..."]]:
    pattern = state.search.pattern
    return [
        jnp.where(threshold.magnitude_bits(delta) >= pattern[i], delta, jnp.float32(0))
        for i, delta in enumerate(candidates(deltas))
    ]


def _relative(weights: Float32[Array, "N"]) -> Float32[Array, "N"]:
    """Weights over the largest: equal ones become exactly 1, so that opposite entries still cancel exactly."""
    largest = jnp.max(jnp.abs(weights))
    return weights / jnp.where(largest == 0, jnp.float32(1), largest)


def _mean_of_agreeing(
    deltas: list[Float32[Array, "..."]], weights: list[Array], positive: Array, shares: list[Array] | None
) -> Float32[Array, "..."]:
    """sum w_i x_i over entries whose weighted sign is the elected one, divided by their summed shares."""
    weighted = [w * delta for w, delta in zip(weights, deltas, strict=True)]
    agrees = [jnp.where(positive, value > 0, value < 0) for value in weighted]
    value = total([jnp.where(keep, x, jnp.float32(0)) for keep, x in zip(agrees, weighted, strict=True)])
    if shares is None:
        return value
    divisor = total([jnp.where(keep, share, jnp.float32(0)) for keep, share in zip(agrees, shares, strict=True)])
    return value / jnp.where(divisor == 0, jnp.float32(1), divisor)


def _elected_sum(
    deltas: Float[Array, "N ..."], weights: Float32[Array, "N"], state: TiesState
) -> Float32[Array, "..."]:
    relative = _relative(weights)
    return total([relative[i] * delta for i, delta in enumerate(_trimmed(deltas, state))])


def _count_signs(
    deltas: Float[Array, "N ..."], weights: Float32[Array, "N"], state: TiesState, settings: Settings
) -> Int32[Array, "2"]:
    elected = jnp.sign(_elected_sum(deltas, weights, state)).astype(jnp.int32)
    return threshold.to_limbs(jnp.sum(elected, dtype=jnp.int32))


def _majority(state: TiesState, signs: Int32[Array, "2"], settings: Settings) -> TiesState:
    return state._replace(majority=threshold.sign(signs))


def _combine_paper(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: TiesState,
    key: Array | None,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    relative = _relative(weights)
    elected = _elected_sum(deltas, weights, state)
    positive = (elected > 0) | ((elected == 0) & (state.majority > 0))
    parts = list(relative)
    return settings["lambda"] * _mean_of_agreeing(_trimmed(deltas, state), parts, positive, [jnp.abs(w) for w in parts])


def _combine_peft(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: TiesState,
    key: Array | None,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    trimmed = _trimmed(deltas, state)
    votes = [jnp.sign(delta) for delta in trimmed] if settings["majority_sign_method"] == "frequency" else trimmed
    positive = total(votes) >= 0
    agrees = [jnp.where(positive, delta > 0, delta < 0) for delta in trimmed]
    value = total([jnp.where(keep, weights[i] * trimmed[i], jnp.float32(0)) for i, keep in enumerate(agrees)])
    number = total([keep.astype(jnp.float32) for keep in agrees])
    return settings["lambda"] * value / jnp.maximum(number, jnp.float32(1))


def _combine_mergekit(
    deltas: Float[Array, "N ..."],
    weights: Float32[Array, "N"],
    state: TiesState,
    key: Array | None,
    base: Array | None,
    settings: Settings,
) -> Float32[Array, "..."]:
    trimmed = _trimmed(deltas, state)
    parts = list(weights)
    positive = total([w * delta for w, delta in zip(parts, trimmed, strict=True)]) >= 0
    shares = parts if settings["normalize"] else None
    return settings["lambda"] * _mean_of_agreeing(trimmed, parts, positive, shares)


def _check_weights(weights: np.ndarray, settings: Settings) -> str | None:
    return "all of them are 0" if not weights.any() else None


_TRIM = Round(_count, _narrow, repeat=threshold.BITS)
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
            start=_start_paper,
            rounds=(_TRIM, Round(_count_signs, _majority)),
            check_weights=_check_weights,
        ),
        Rule(
            "peft",
            "PEFT 0.21 merge_utils.ties; combination_type ties in space factors",
            _combine_peft,
            Properties(identity=_IDENTITY, zero_weight_is_absence=False, negation="unless sums cancel"),
            hyperparameters=(DENSITY, MAJORITY, LAMBDA),
            spaces=("delta", "factors"),
            default_weight="one",
            start=_start_peft,
            rounds=(_TRIM,),
        ),
        Rule(
            "mergekit",
            "mergekit 0.1.4 merge_method ties",
            _combine_mergekit,
            Properties(identity=_IDENTITY, negation="unless sums cancel"),
            hyperparameters=(DENSITY, NORMALIZE, LAMBDA),
            default_weight="one",
            start=_start_peft,
            rounds=(_TRIM,),
            check_weights=_check_weights,
        ),
    ),
)
