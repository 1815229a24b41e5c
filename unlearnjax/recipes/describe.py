"""What a run says about itself: the parts of report.json, and the merged model's card."""

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax

from unlearnjax.data.rows import fingerprint
from unlearnjax.evaluation.mmlu import Prompts
from unlearnjax.io.card import model_card
from unlearnjax.recipes.groups import AUTO
from unlearnjax.recipes.prepare import Data, Sources
from unlearnjax.recipes.schema import Candidate
from unlearnjax.recipes.train_step import Trained
from unlearnjax.report.scores import render_markdown_table
from unlearnjax.training.loop import Result


def describe_hardware() -> dict[str, Any]:
    """What computed it."""
    device = jax.devices()[0]
    cpu = platform.processor() or platform.machine()
    return {
        "platform": device.platform,
        "device": cpu if device.platform == "cpu" else device.device_kind,
        "device_count": jax.device_count(),
        "cpu_count": os.cpu_count() or 1,
        "jax": jax.__version__,
    }


def describe_data(sources: Sources, data: Data) -> dict[str, Any]:
    """Source, number of rows and fingerprint of each set."""
    out = {}
    for name in Data._fields:
        items = getattr(data, name)
        if items is not None:
            label = _label(getattr(sources, name))
            out[name] = {"source": label, "rows": len(items), "sha256": fingerprint(items)}
    return out


def describe_mmlu(source: str, prompts: Prompts) -> dict[str, Any]:
    """Where MMLU's questions came from, their number, and how many solved ones stood before each."""
    return {"source": _label(source), "questions": len(prompts.ids), "shots": prompts.shots}


def _label(source: str) -> str:
    # A path tells a reader of the report nothing beyond the file's name, and may be private.
    return Path(source).name if Path(source).expanduser().exists() else source


def describe_training(trained: Trained) -> dict[str, Any]:
    """How long the training took (the rate leaves out the steps that compiled a program, if there are others), and how
    each group's steps went through the model."""
    result = trained.result
    rate = result.steady_candidate_steps / result.steady_seconds if result.steady_seconds > 0 else None
    return {
        "seconds": result.seconds,
        "candidate_steps": result.candidate_steps,
        "candidate_steps_per_second": rate,
        "ways": [
            {"remat": way.remat, "tokens_at_once": way.tokens_at_once, "attention": "cuDNN" if way.flash else "XLA"}
            for way in trained.ways
        ],
    }


def describe_candidates(
    candidates: Sequence[Candidate],
    result: Result,
    layers: Mapping[str, Sequence[int]] = MappingProxyType({}),
    kept: Mapping[int, int] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Each candidate's settings, whether it diverged, and its curves.

    Args:
      layers: what `layers: auto` stands for, by `modules`. kept: after how many updates each was best, by its place.
    """
    entries = []
    for place, (candidate, curve, at) in enumerate(zip(candidates, result.curves, result.diverged_at, strict=True)):
        hyperparameters = dataclasses.asdict(candidate)
        if candidate.layers == AUTO:
            own = layers[candidate.modules]
            hyperparameters["layers"] = f"auto ({own[0]} to {own[-1]})"
        entries.append(
            {
                "name": hyperparameters.pop("name"),
                "hyperparameters": hyperparameters,
                "status": "finished" if at is None else "diverged",
                "diverged_at": at,
                "updates": len(curve.update),
                **({"kept_after": kept[place]} if place in kept else {}),
                "curves": {
                    "update": curve.update,
                    "loss": curve.loss,
                    **curve.terms,
                    "gradient_norm": curve.gradient_norm,
                },
            }
        )
    return entries


def describe_model(source: str, report: dict[str, Any], name: str) -> str:
    """README.md of the merge, or of the candidate, `name` of the model `source`."""
    cite = "{source} ({rows} rows, sha256 {sha256})".format
    merged = next((m for m in report["merges"] if m["name"] == name), None)
    if merged is None:
        method = f"The candidate {name} of the recipe below."
    else:
        method = _merge_method(merged)
    return model_card(
        title=f"{Path(source).name}, unlearned ({name})",
        base_model=source,
        merge=merged is not None,
        method=method,
        scores=render_markdown_table(report),
        recipe=report["recipe"],
        forget=cite(**report["data"]["forget"]),
        retain=cite(**report["data"]["retain"]),
    )


def _merge_method(merged: Mapping[str, Any]) -> str:
    step = f", times {merged['scale']:g}" if "scale" in merged else ""
    step += ", subtracted from the base" if merged.get("negated") else ""
    return (
        f"{merged['method']} merge ({merged['semantics']} semantics, space {merged['space']}) of the candidates "
        f"{', '.join(merged['candidates'])}{step}."
    )
