"""A recipe for image models: candidates, merges, lambdas and the rule that chooses, as frozen plain data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unlearnjax.merging.search import LAMBDAS
from unlearnjax.training.images.settings import ImageCandidate

RULES = ("auto", "closest", "keep")
STATISTICS = ("kept", "re-estimated")
SEARCHED = ("best_single", "greedy")  # merges that the search makes itself, beside those of `unlearnjax.merge`


@dataclass(frozen=True)
class ImageTraining:
    """How candidates are fine-tuned on the forget set.

    optimizer: `sgd` or `adamw`. batch_size: images of an update.
    batch_norm: `batch` (each batch's own statistics; the drift of the running ones is dropped) or `frozen` (the running
      ones are used and stay, which wants about a tenth of the learning rate).
    linear: train and score in the tangent space (2305.12827); the merged delta is then exact there, and the exported
      weights are those of the linearised model, which only it can use.
    group: candidates that are trained at once (null: chosen by the device).
    """

    optimizer: str = "sgd"
    batch_size: int = 256
    batch_norm: str = "batch"
    linear: bool = False
    group: int | None = None


@dataclass(frozen=True)
class ImageMerge:
    """One merge to compare: a method of `unlearnjax methods` with its hyperparameters; `best_single` (task arithmetic:
    the best pair of candidate and lambda); or `greedy` (a soup of deltas, taken in while the rule's score improves)."""

    method: str
    name: str = ""
    semantics: str | None = None
    of: tuple[str, ...] | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Selection:
    """How lambda is chosen, on validation data.

    rule: `keep` (NegMerge's for CLIP: the lowest forget accuracy among those that keep the share `keep` of the start's
      retain accuracy), `closest` (the smallest gap to the retrained model) or `auto` (`closest` for a classifier whose
      retrained model is given, else `keep`).
    lambdas: what is tried. rows: images of each set that are scored for it, at most.
    statistics: of BatchNorm after the edit: `kept`, or `re-estimated` on retain images.
    """

    rule: str = "auto"
    keep: float = 0.95
    lambdas: tuple[float, ...] = LAMBDAS
    rows: int = 2000
    statistics: str = "kept"
    seed: int = 0


@dataclass(frozen=True)
class ImageRecipe:
    """export: the name of the merge to write as a model, or `best` (by the rule's own score on validation data).

    templates: texts around a class's name, for CLIP's zero-shot heads; forget_templates: the forget set's, if others.
    baselines: names from `unlearnjax.baselines`, run beside the merges, with settings of theirs.
    """

    name: str
    candidates: tuple[ImageCandidate, ...]
    merges: tuple[ImageMerge, ...]
    training: ImageTraining = ImageTraining()
    selection: Selection = Selection()
    templates: tuple[str, ...] = ("a photo of a {}.",)
    forget_templates: tuple[str, ...] | None = None
    baselines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    export: str = "best"


def to_plain(recipe: ImageRecipe) -> dict[str, Any]:
    """The recipe as plain data with every default written out; `parse.image_recipe_from` reads it back."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple | list) else value

    found: dict[str, Any] = plain(dataclasses.asdict(recipe))
    found["merges"] = [
        {**{k: v for k, v in m.items() if k != "hyperparameters"}, **m["hyperparameters"]} for m in found["merges"]
    ]
    return {"kind": "images", **found}
