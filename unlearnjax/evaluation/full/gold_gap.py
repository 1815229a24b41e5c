"""How far a model's scores are from the gold model's: the one that was trained on the retain rows only.

The official terms reward a forget score of 0, but a model that never saw the forget rows does not score 0: it guesses
emails from names, and shares words with any text of the kind. So the goal of a term is what gold reaches, and a model
that forgets more than gold has as large a gap as one that forgets less:

    difference = value - gold                mean_absolute = mean over the terms of |difference|

Terms are the raw means of regurgitation and knowledge per split and task (a forget term above gold's still knows too
much, one below gives itself away).
"""

import math
from collections.abc import Mapping
from typing import Any

from unlearnjax.errors import UserError

SPLITS = ("forget", "retain")
SCALARS = ("membership_auc", "membership_score", "task_aggregate", "mmlu", "aggregate", "aggregate_without_mmlu")


def gap(value: Any, gold: Any) -> dict[str, float] | None:
    """value, gold and difference; None unless both are finite numbers."""
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in (value, gold)):
        return None
    return {"value": float(value), "gold": float(gold), "difference": float(value) - float(gold)}


def gold_gap(scores: Mapping[str, Any], gold: Mapping[str, Any]) -> dict[str, Any]:
    """The distance of one model's Scores (see `unlearnjax.evaluation.semeval.score`) to the gold model's.

    Returns:
      terms {split: {task: {"regurgitation" | "knowledge": {value, gold, difference}, or None where there is no such
      term}}}, mean_absolute (over the terms there are, None without any), mean_absolute_of {split: the same},
      largest {split, task, kind, difference} (of the absolutely largest, the first of equals; None without terms);
      membership_auc, membership_score, task_aggregate, mmlu, aggregate, aggregate_without_mmlu, probe (accuracy):
      {value, gold, difference}, or None where one of the two is missing or not finite; degenerate and nll
      {split: the same}.

    Raises:
      UserError: the two do not have the same tasks, so they are of different rows.
    """
    terms: dict[str, dict[str, dict[str, Any]]] = {}
    absolute: dict[str, list[float]] = {split: [] for split in SPLITS}
    largest: dict[str, Any] | None = None
    for split in SPLITS:
        odd = sorted(set(scores[split]) ^ set(gold[split]))
        if odd:
            raise UserError(
                f"{split}: only one of the model's and the gold model's scores has task {odd[0]!r}; "
                "score both on the same rows"
            )
        terms[split] = {}
        for task, means in scores[split].items():
            terms[split][task] = {kind: gap(value, gold[split][task].get(kind)) for kind, value in means.items()}
            for kind, found in terms[split][task].items():
                if found is None:
                    continue
                absolute[split].append(abs(found["difference"]))
                if largest is None or abs(found["difference"]) > abs(largest["difference"]):
                    largest = {"split": split, "task": task, "kind": kind, "difference": found["difference"]}
    return {
        "terms": terms,
        "mean_absolute": _mean([x for values in absolute.values() for x in values]),
        "mean_absolute_of": {split: _mean(values) for split, values in absolute.items()},
        "largest": largest,
        **{name: gap(scores.get(name), gold.get(name)) for name in SCALARS},
        "probe": gap((scores.get("probe") or {}).get("accuracy"), (gold.get("probe") or {}).get("accuracy")),
        **{
            name: {s: gap((scores.get(name) or {}).get(s), (gold.get(name) or {}).get(s)) for s in SPLITS}
            for name in ("degenerate", "nll")
        },
    }


def _mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
