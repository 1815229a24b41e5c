"""Trim, elect and average in numpy, one step after another: what the other back ends must equal."""

import numpy as np

from unlearnjax_kernels.threshold.reference import magnitude_bits


def elect_mean(
    deltas: np.ndarray,
    thresholds: np.ndarray,
    weights: np.ndarray,
    votes: np.ndarray,
    shares: np.ndarray,
    tie: int,
    by_sign: bool = False,
) -> np.ndarray:
    """See `api.elect_mean`."""
    per = lambda numbers: numbers.astype(np.float32).reshape(-1, *(1,) * (deltas.ndim - 1))  # noqa: E731
    x = deltas.astype(np.float32)
    x = np.where(magnitude_bits(x) >= thresholds.reshape(per(votes).shape), x, np.float32(0))
    voted = per(votes) * x
    total = np.sum(np.sign(voted) if by_sign else voted, axis=0, dtype=np.float32)
    elected = np.where(total == 0, tie, np.sign(total))
    agrees = np.where(elected > 0, voted > 0, voted < 0)
    value = np.sum(np.where(agrees, per(weights) * x, np.float32(0)), axis=0, dtype=np.float32)
    divisor = np.sum(np.where(agrees, per(shares), np.float32(0)), axis=0, dtype=np.float32)
    return value / np.where(divisor == 0, np.float32(1), divisor)
