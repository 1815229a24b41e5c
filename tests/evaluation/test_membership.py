"""The membership attack: AUC against scikit-learn's ROC curve, and the bootstrap interval."""

import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.evaluation.membership import auc, bootstrap_interval, membership

metrics = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("decimals", [0, 1, 12])
def test_equals_the_roc_trapezoid_with_ties(decimals):
    draw = np.random.default_rng(decimals)
    for sizes in ((1, 1), (1, 7), (30, 20), (150, 150)):
        members = np.round(draw.normal(2.0, 0.6, sizes[0]), decimals)
        nonmembers = np.round(draw.normal(2.3, 0.6, sizes[1]), decimals)
        wrong, right, _ = metrics.roc_curve([1] * sizes[0] + [0] * sizes[1], -np.concatenate([members, nonmembers]))
        assert auc(members, nonmembers) == pytest.approx(metrics.auc(wrong, right), abs=1e-12)


def test_the_ends_and_the_score():
    assert auc([1.0, 2.0], [3.0, 4.0]) == 1.0
    assert auc([3.0, float("inf")], [1.0, 2.0]) == 0.0
    assert auc([1.0, 1.0], [1.0]) == 0.5
    assert membership([1.0, 2.0], [3.0]).score == 0.0
    assert membership([1.0, 1.0], [1.0]).score == 1.0
    assert membership([1.0, 3.0], [2.0, 4.0]).score == pytest.approx(0.5)  # AUC 3/4


def test_interval_is_that_of_the_sampling_distribution():
    draw = np.random.default_rng(0)
    members, nonmembers = draw.normal(0.0, 1.0, 150), draw.normal(0.0, 1.0, 150)
    low, high = bootstrap_interval(members, nonmembers, resamples=2000)
    area = auc(members, nonmembers)
    assert low < area < high
    # The standard deviation of the AUC of two equal distributions is sqrt((n + m + 1) / (12 n m)) = .0334.
    assert high - low == pytest.approx(2 * 1.96 * 0.0334, rel=0.15)
    assert bootstrap_interval(members, nonmembers, resamples=2000) == (low, high)
    assert bootstrap_interval(members, nonmembers, resamples=2000, seed=1) != (low, high)
    # Resampling is stratified: with one document on each side there is nothing to vary.
    assert bootstrap_interval([1.0], [2.0]) == (1.0, 1.0)


def test_errors():
    with pytest.raises(UserError, match="no nonmember documents"):
        auc([1.0], [])
    with pytest.raises(UserError, match="member document 2 has no NLL"):
        auc([1.0, float("nan")], [1.0])
    with pytest.raises(UserError, match="level"):
        bootstrap_interval([1.0], [1.0], level=1.0)
