"""What traces say together: average indirect effects by place and layer, with intervals, and where to unlearn.

Two readings of the same scores:

- `rome` (2202.05262, section 2.1): the indirect effect of an activation is the answer's probability with it put back
  less the corrupted run's; AIE is its mean over facts, ATE the mean of clean less corrupted.
- `sha256`: the figures of Selective Amnesia's code. They show the probability itself, nothing subtracted, and three of
  their places are not what they are called: the subject's "last" token is its first, the "first" token after it is the
  second, and its "middle" includes the last.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from unlearnjax.errors import UserError
from unlearnjax.tracing.trace import Traced

SEMANTICS = ("rome", "sha256")
DRAWS = 2000  # of the bootstrap

# Each place's positions of a fact, given the subject's first one, the one behind it, and the number of tokens.
_Places = dict[str, Callable[[int, int, int], range]]
ROME: _Places = {
    "before the subject": lambda b, e, n: range(b),
    "subject's first": lambda b, e, n: range(b, b + 1),
    "subject's middle": lambda b, e, n: range(b + 1, e - 1),
    "subject's last": lambda b, e, n: range(e - 1, e),
    "first after": lambda b, e, n: range(e, min(e + 1, n - 1)),
    "further": lambda b, e, n: range(e + 1, n - 1),
    "last": lambda b, e, n: range(n - 1, n),
}
SHA256: _Places = {
    **ROME,
    "subject's middle": lambda b, e, n: range(b + 1, e),
    "subject's last": lambda b, e, n: range(b, b + 1),
    "first after": lambda b, e, n: range(e + 1, min(e + 2, n)),
}
SUBJECT = "subject's last"


class Mean(NamedTuple):
    """A mean over facts by layer, and its 95% interval; empty where no fact has such a place, the interval also where
    all that have it are about one subject."""

    mean: list[float]
    low: list[float]
    high: list[float]
    facts: int


def default_width(layers: int) -> int:
    """How many layers to unlearn in: Selective Amnesia's share, 6 of 16."""
    return max(1, math.ceil(3 * layers / 8))


def check_width(width: int, layers: int) -> None:
    """Raise `UserError` for a number of contiguous layers that the model does not have."""
    if not 1 <= width <= layers:
        raise UserError(f"trace: a range of {width} layers in a model with {layers}; give 1 to {layers}")


def effects(traces: Sequence[Traced], semantics: str = "rome", seed: int = 0) -> dict[str, Any]:
    """The average effects, as plain data: `total` (ATE) and {kind: {place: Mean by layer}}.

    A fact's effect at a place is the mean over the place's tokens. Intervals are percentiles of a bootstrap that draws
    subjects, with all their facts: facts about one subject are not independent. (`total` has no `low` and `high` where
    there is one subject.)

    Raises:
      UserError: no traces.
    """
    if not traces:
        raise UserError("trace: no fact is left to trace; see what was skipped and why")
    places = ROME if semantics == "rome" else SHA256
    subjects = [t.subject for t in traces]
    weights = _resamples(subjects, seed)
    kinds = {
        kind: {
            place: _mean([_at(t, t.restored[kind], where, semantics) for t in traces], subjects, weights)._asdict()
            for place, where in places.items()
        }
        for kind in traces[0].restored
    }
    total = _mean([np.asarray([t.clean - t.corrupted]) for t in traces], subjects, weights)
    return {
        "semantics": semantics, "facts": len(traces), "subjects": len(set(subjects)),
        "clean": float(np.mean([t.clean for t in traces])), "corrupted": float(np.mean([t.corrupted for t in traces])),
        "total": {key: own[0] for key in ("mean", "low", "high") if (own := getattr(total, key))}, "kinds": kinds,
    }  # fmt: skip


def _at(t: Traced, scores: np.ndarray, where: Callable[[int, int, int], range], semantics: str) -> np.ndarray | None:
    positions = list(where(t.begin, t.end, len(t.tokens)))
    if not positions:
        return None
    mean: np.ndarray = scores[positions].astype(np.float64).mean(axis=0)
    return mean - t.corrupted if semantics == "rome" else mean


def _resamples(subjects: Sequence[str], seed: int) -> np.ndarray:
    """How often each fact is in each resample: float64 [DRAWS, facts]."""
    names, of = np.unique(subjects, return_inverse=True)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=DRAWS)
    return counts[:, of].astype(np.float64)


def _resampled(table: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The means of a table of facts in each resample that holds any."""
    share = weights.sum(axis=1)
    means: np.ndarray = (weights @ table)[share > 0] / share[share > 0, None]
    return means


def _mean(values: Sequence[np.ndarray | None], subjects: Sequence[str], weights: np.ndarray) -> Mean:
    own = [i for i, value in enumerate(values) if value is not None]
    if not own:
        return Mean([], [], [], 0)
    table = np.stack([values[i] for i in own])  # type: ignore[misc]
    mean = table.mean(axis=0).tolist()
    if len({subjects[i] for i in own}) == 1:
        return Mean(mean, [], [], len(own))
    low, high = np.percentile(_resampled(table, weights[:, own]), [2.5, 97.5], axis=0)
    return Mean(mean, low.tolist(), high.tolist(), len(own))


def recommend(traces: Sequence[Traced], kind: str, width: int, seed: int = 0) -> dict[str, Any]:
    """The contiguous layers to unlearn in: the range of `width` with the largest summed AIE of `kind` at the last token
    of the subject, where ROME finds the facts' MLPs at work.

    Returns:
      Plain data: `layers` [first, last], both included; `share`, the part of all layers' positive effect that lies in
      them; `stability`, how many of the bootstrap's resamples (of subjects) choose the same range, None where there is
      one subject; `curve`, the AIE by layer.

    Raises:
      UserError: a width that the model does not have, no traces, or a kind that was not traced.
    """
    if not traces:
        raise UserError("trace: no fact is left to trace; see what was skipped and why")
    if kind not in traces[0].restored:
        raise UserError(f"trace: {kind} was not traced, so no layers can be recommended by it; trace it too")
    layers = traces[0].restored[kind].shape[1]
    check_width(width, layers)
    table = np.stack([_at(t, t.restored[kind], ROME[SUBJECT], "rome") for t in traces])  # type: ignore[misc]
    subjects = [t.subject for t in traces]
    curve = table.mean(axis=0)
    first = best_range(curve, width)
    stability = None
    if len(set(subjects)) > 1:
        drawn = [best_range(row, width) for row in _resampled(table, _resamples(subjects, seed))]
        stability = float(np.mean(np.asarray(drawn) == first))
    positive = np.maximum(curve, 0.0)
    return {
        "kind": kind, "place": SUBJECT, "layers": [first, first + width - 1],
        "share": float(positive[first : first + width].sum() / max(positive.sum(), 1e-30)),
        "stability": stability, "curve": curve.tolist(),
    }  # fmt: skip


def doubt(found: Mapping[str, Any], best: Mapping[str, Any]) -> str | None:
    """Why what `recommend` returned says little, in words; None if nothing is known against it.

    Args:
      found: what `effects` returned for the same traces.
    """
    total, (first, last) = found["total"], best["layers"]
    if sum(best["curve"][first : last + 1]) <= 0:
        return (
            f"no range of {last + 1 - first} layers gives any of the answers' probability back, by {best['kind']} at "
            f"the {SUBJECT} token; those named are merely the least bad"
        )
    if total.get("low", total["mean"]) <= 0:
        return (
            f"noise on the subjects does not reliably lower the answers' probability (by {total['mean']:.3f} in the "
            "mean); raise noise, or give other facts"
        )
    if found["subjects"] == 1:
        return "all facts are about one subject, so there are no intervals; give facts about more"
    return None


def best_range(curve: np.ndarray | Sequence[float], width: int) -> int:
    """Of an effect by layer: where the range of the largest sum begins; of equal ones the lowest."""
    return int(np.argmax(np.convolve(curve, np.ones(width), mode="valid")))
