"""Confidence intervals of proportions."""

import math

from unlearnjax.errors import UserError

Z95 = 1.959963984540054  # the normal distribution's 97.5% point


def wilson_interval(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927, as in Newcombe 1998, method 3), 95% by default.

    Raises:
      UserError: no trials, or more successes than trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise UserError(f"an interval needs 0 <= successes <= trials and a trial, not {successes} of {trials}")
    p = successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    # At the ends the formula gives exactly 0 and 1 but for rounding.
    return (0.0 if successes == 0 else centre - half), (1.0 if successes == trials else centre + half)
