"""What candidates know on the way: scores at waypoints of training, and the angles of their paths (2503.21088)."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from unlearnjax.adapters.lora import scaled
from unlearnjax.evaluation.full.sampled import spread
from unlearnjax.evaluation.journal import Journal
from unlearnjax.evaluation.protocol import evaluate_candidates
from unlearnjax.merging.geometry import gram, lengths, turning_angles
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.prepare import Data
from unlearnjax.recipes.progress import bars
from unlearnjax.recipes.resume import weights_digest
from unlearnjax.recipes.schema import Evaluation
from unlearnjax.training.interrupt import Stop
from unlearnjax.training.waypoints import Waypoint, read_waypoint

SPLITS = ("forget", "retain")


def turning_point(trajectory: Mapping[str, Any]) -> int | None:
    """The waypoint (its index, 0 is before training) with the lowest mean of all terms; None if that is an end.

    In the paper regurgitation and knowledge fall on both splits at first, and then rise again.
    """
    series = [values for split in SPLITS for task in trajectory[split].values() for values in task.values()]
    means = [np.mean([values[i] for values in series]) for i in range(len(trajectory["updates"]))]
    lowest = int(np.argmin(means))
    return lowest if 0 < lowest < len(means) - 1 else None


def _series(scores: Sequence[Mapping[str, Any]], split: str) -> dict[str, dict[str, list[float]]]:
    """{task: {kind: a value for each waypoint}}, of the terms that there are."""
    first = scores[0][split]
    return {
        task: {kind: [s[split][task][kind] for s in scores] for kind, value in kinds.items() if value is not None}
        for task, kinds in first.items()
    }


def _path(points: Sequence[PyTree[np.ndarray]], turn: int | None) -> dict[str, Any]:
    """Lengths and angles of one candidate's adapters at the waypoints; `turn` counts them from 1."""
    products = gram(jax.tree.map(lambda *xs: jnp.stack(xs), *points))
    with np.errstate(invalid="ignore"):
        own = lengths(products.whole).tolist()
    # A candidate that diverged can be too long for its length to be a number.
    found: dict[str, Any] = {"length": [0.0, *(x if math.isfinite(x) else None for x in own)], "angles": None}
    if turn is not None:
        last = len(points) - 1
        by_module = {name: turning_angles(own, turn - 1, last) for name, own in products.by_module.items()}
        found["angles"] = {"whole": turning_angles(products.whole, turn - 1, last), "by_module": by_module}
    return found


def trajectories(
    model: LanguageModel,
    folder: Path,
    steps: Sequence[int],
    like: PyTree[Array],
    scale: Array,
    settings: Evaluation,
    data: Data,
    *,
    journal: Journal | None = None,
    progress: bool = False,
    stop: Stop | None = None,
) -> list[dict[str, Any]]:
    """Score every candidate at every waypoint, on some rows of each split (`settings.waypoint_rows`).

    Args:
      folder, steps: where `recorder` wrote the waypoints, and of which steps.
      like: the trained adapters, stacked over N. scale: [N], alpha / rank.
      journal, stop: see `evaluate_all`.

    Returns:
      Per candidate: updates (0 first), forget and retain {task: {kind: [score at each waypoint]}}, nll {split: [...]},
      length (the delta's Frobenius norm at each), turning_point (an entry of `updates`, or None), and angles in degrees
      {whole: {d1_d2, d1_d3, d2_d3}, by_module: {linear.layer: the same}}, or None without a turning point.
    """
    forget, retain = (spread(rows, settings.waypoint_rows) for rows in (data.forget, data.retain))
    waypoints: list[Waypoint] = [read_waypoint(folder, step, like) for step in steps]

    def scores(name: str, stack: PyTree[Array] | None) -> list[dict[str, Any]]:
        kept = None if journal is None else journal.within(f"waypoint-{name}", adapters=weights_digest(stack))
        with bars(progress, f"waypoint {name}", stop) as bar:
            return evaluate_candidates(
                model.model, model.params, stack, model.require_tokenizer(), forget, retain, progress=bar, journal=kept,
                max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size, warn=lambda *_: None,
            )  # fmt: skip

    before = scores("0", None)[0]
    after = [scores(str(step), scaled(w.trainable, scale)) for step, w in zip(steps, waypoints, strict=True)]
    found = []
    for n in range(len(scale)):
        own = [before, *(at[n] for at in after)]
        one: dict[str, Any] = {
            "updates": [0, *(int(w.updates[n]) for w in waypoints)],
            **{split: _series(own, split) for split in SPLITS},
            "nll": {split: [s["nll"][split] for s in own] for split in SPLITS},
        }
        turn = turning_point(one)
        adapters = [jax.tree.map(lambda x, n=n: x[n], scaled(w.trainable, scale)) for w in waypoints]
        found.append({**one, "turning_point": None if turn is None else one["updates"][turn], **_path(adapters, turn)})
    return found
