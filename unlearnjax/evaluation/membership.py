"""The membership attack by loss: does a lower NLL give a document away as one the model was trained on?

AUC near 1: members are still recognised (under-unlearned). Near 0: they stand out as unlearned (over-unlearned).
Near .5: they look like documents the model never saw.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from unlearnjax.errors import UserError


class Membership(NamedTuple):
    """`auc`, its 95% bootstrap `interval`, and the official score 1 - 2 |auc - 1/2|."""

    auc: float
    interval: tuple[float, float]
    score: float


def _losses(values: Sequence[float], which: str) -> Float[np.ndarray, " documents"]:
    losses = np.asarray(values, np.float64)
    if losses.ndim != 1 or losses.size == 0:
        raise UserError(f"membership: no {which} documents; give at least one")
    wrong = np.flatnonzero(np.isnan(losses))
    if wrong.size:
        raise UserError(f"membership: {which} document {wrong[0] + 1} has no NLL (is it a single token?); leave it out")
    return losses


def _auc(members: np.ndarray, nonmembers_sorted: np.ndarray) -> float:
    # For each member, non-members with a larger loss count 1 and equal ones 1/2.
    below = np.searchsorted(nonmembers_sorted, members, side="left")
    not_above = np.searchsorted(nonmembers_sorted, members, side="right")
    return float(1.0 - (below + not_above).sum() / (2.0 * members.size * nonmembers_sorted.size))


def auc(member_nll: Sequence[float], nonmember_nll: Sequence[float]) -> float:
    """Area under the ROC curve of the score -NLL with label 1 on members; ties count one half (the trapezoid rule).

    Raises:
      UserError: an empty side, or a NaN.
    """
    return _auc(_losses(member_nll, "member"), np.sort(_losses(nonmember_nll, "nonmember")))


def bootstrap_interval(
    member_nll: Sequence[float],
    nonmember_nll: Sequence[float],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Percentile interval of the AUC: members and non-members are resampled apart, with replacement.

    Args:
      level: coverage, in (0, 1).
      resamples: number of bootstrap samples.
      seed: of numpy's default generator; the same seed gives the same interval.
    """
    if not 0.0 < level < 1.0 or resamples < 1:
        raise UserError(f"the interval needs a level in (0, 1) and a resample, not {level} and {resamples}")
    members, nonmembers = _losses(member_nll, "member"), _losses(nonmember_nll, "nonmember")
    draw = np.random.default_rng(seed)
    areas = [
        _auc(draw.choice(members, members.size), np.sort(draw.choice(nonmembers, nonmembers.size)))
        for _ in range(resamples)
    ]
    low, high = np.quantile(areas, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def membership(
    member_nll: Sequence[float], nonmember_nll: Sequence[float], *, resamples: int = 1000, seed: int = 0
) -> Membership:
    """The attack on documents' mean token NLLs: `auc`, `bootstrap_interval` (95%) and the official score of the two."""
    area = auc(member_nll, nonmember_nll)
    interval = bootstrap_interval(member_nll, nonmember_nll, resamples=resamples, seed=seed)
    return Membership(area, interval, 1 - abs(area - 0.5) * 2)
