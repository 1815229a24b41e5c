"""What a run writes for others to load: candidates and merges as adapters, and which merge becomes the model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Array, PyTree

from unlearnjax.adapters.lora import resolve_targets
from unlearnjax.io.peft import save_adapter
from unlearnjax.models.language_model import LanguageModel
from unlearnjax.recipes.merge_step import Exported, Merged
from unlearnjax.recipes.schema import Recipe
from unlearnjax.training.hyperparameters import index


def save_candidates(folder: Path, model: LanguageModel, recipe: Recipe, lora: PyTree[Array]) -> None:
    """Each candidate as a PEFT adapter of its own rank, the diverged ones too (in their last finite state)."""
    targets = resolve_targets(recipe.adapter.targets, model.config)
    for i, candidate in enumerate(recipe.candidates):
        save_adapter(
            folder / candidate.name, index(lora, i), config=model.config, base_model=model.source,
            targets=targets, rank=candidate.rank, alpha=candidate.alpha, dropout=candidate.dropout,
        )  # fmt: skip


def save_merges(folder: Path, model: LanguageModel, recipe: Recipe, merges: Sequence[tuple[Merged, Exported]]) -> None:
    """Each merge as a PEFT adapter (of scale 1)."""
    targets = resolve_targets(recipe.adapter.targets, model.config)
    for merged, exported in merges:
        save_adapter(
            folder / merged.merge.name, exported.lora, config=model.config, base_model=model.source, targets=targets,
            rank=exported.rank, alpha=exported.rank,
        )  # fmt: skip


def choose_export(wanted: str, merges: Sequence[Merged], models: Sequence[dict[str, Any]]) -> Merged | None:
    """The merge to write as a model: the one named, or (`best`) the one with the best official aggregate measured.

    None where there are no merges, or the one named could not be made.
    """
    if wanted != "best":
        return next((m for m in merges if m.merge.name == wanted), None)
    scores = {m["name"]: _aggregate(m["scores"]) for m in models}
    return max(merges, key=lambda m: scores[m.merge.name], default=None)


def _aggregate(scores: dict[str, Any]) -> float:
    for key in ("aggregate", "aggregate_without_mmlu", "task_aggregate"):
        if scores.get(key) is not None:
            return float(scores[key])
    return -1.0
