"""What a run writes for others to load: candidates and merges as adapters, and which merge becomes the model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Array, PyTree

from unlearnjax.adapters.apply import add_delta
from unlearnjax.adapters.lora import resolve_targets
from unlearnjax.io.peft import save_adapter
from unlearnjax.models.language_model import LanguageModel, save_model
from unlearnjax.recipes.groups import targets_of
from unlearnjax.recipes.merge_step import Exported, Merged, delta_of
from unlearnjax.recipes.schema import Recipe
from unlearnjax.recipes.train_step import Trained
from unlearnjax.training.hyperparameters import index


def changed(model: LanguageModel, delta: PyTree[Array]) -> LanguageModel:
    """The model with its weights changed."""
    return dataclasses.replace(model, params=add_delta(model.params, delta))


def save_candidates(folder: Path, model: LanguageModel, recipe: Recipe, trained: Trained) -> None:
    """Each candidate as a PEFT adapter of its own rank, or as a model where it trained weights, the diverged ones too
    (in their last finite state)."""
    for i, candidate in enumerate(recipe.candidates):
        if i in trained.deltas:
            save_model(changed(model, trained.deltas[i]), folder / candidate.name)
            continue
        targets = targets_of(recipe.adapter.targets, candidate.modules, model.config)
        save_adapter(
            folder / candidate.name, of_targets(index(trained.lora, i), targets), config=model.config,
            base_model=model.source, targets=targets, rank=candidate.rank, alpha=candidate.alpha,
            dropout=candidate.dropout,
        )  # fmt: skip


def of_targets(lora: PyTree[Array], targets: Sequence[str]) -> PyTree[Array]:
    """The pairs of these linears alone."""
    own = {block: {name: pair for name, pair in linears.items() if name in targets}
           for block, linears in lora["layers"].items()}  # fmt: skip
    return {"layers": {block: linears for block, linears in own.items() if linears}}


def save_merges(folder: Path, model: LanguageModel, recipe: Recipe, merges: Sequence[tuple[Merged, Exported]]) -> None:
    """Each merge as a PEFT adapter (of scale 1), or as a model where a candidate that went in trained weights."""
    for merged, exported in merges:
        if exported.lora is None or exported.rank is None:
            save_model(changed(model, delta_of(merged)), folder / merged.merge.name)
            continue
        held = {name for linears in exported.lora["layers"].values() for name in linears}
        targets = tuple(name for name in resolve_targets(recipe.adapter.targets, model.config) if name in held)
        save_adapter(
            folder / merged.merge.name, exported.lora, config=model.config, base_model=model.source, targets=targets,
            rank=exported.rank, alpha=exported.rank,
        )  # fmt: skip


def choose_export(
    wanted: str, merges: Sequence[Merged], models: Sequence[dict[str, Any]], candidates: Sequence[str] = ()
) -> Merged | str | None:
    """The merge to write as a model: the one named, or (`best`) the one with the best official aggregate measured; of a
    recipe without merges the name of the best candidate.

    None where neither could be made.

    Args:
      candidates: the names of those that did not diverge, of a recipe without merges; the best is one of those scored.
    """
    if wanted in candidates:
        return wanted
    if wanted != "best":
        return next((m for m in merges if m.merge.name == wanted), None)
    scores = {m["name"]: _aggregate(m["scores"]) for m in models}
    if candidates:
        return max((c for c in candidates if c in scores), key=scores.__getitem__, default=None)
    return max(merges, key=lambda m: scores[m.merge.name], default=None)


def _aggregate(scores: dict[str, Any]) -> float:
    for key in ("aggregate", "aggregate_without_mmlu", "task_aggregate"):
        if scores.get(key) is not None:
            return float(scores[key])
    return -1.0
