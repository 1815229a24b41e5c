"""The models of a run: what is edited, seen through the classes of what is forgotten and of what is kept."""

from typing import NamedTuple

from unlearnjax.errors import UserError
from unlearnjax.io.huggingface import read_json, resolve
from unlearnjax.models.vision.classifier import FAMILIES, Classifier, load_classifier
from unlearnjax.models.vision.clip_model import load_clip
from unlearnjax.models.vision.net import Subject, classifier_subject, clip_subject
from unlearnjax.recipes.images.data import ImageSources, Splits, classifier_splits, clip_splits
from unlearnjax.recipes.images.schema import ImageRecipe


class Subjects(NamedTuple):
    """forget, retain: the same model and weights, with the classes of either set (a classifier's are the same). gold:
    the retrained classifier."""

    forget: Subject
    retain: Subject
    gold: Subject | None


def is_image_model(model: str) -> bool:
    """Whether a folder or hub id holds an image classifier or a CLIP model."""
    kind = read_json(resolve(model) / "config.json").get("model_type")
    return kind == "clip" or kind in FAMILIES


def load_subjects(model: str, sources: ImageSources, recipe: ImageRecipe, gold: str | None) -> tuple[Subjects, Splits]:
    """Read the models and the images, and fit them to each other.

    Raises:
      UserError: from reading either; a retrained model that is no classifier like the model; `closest` without one.
    """
    kind = read_json(resolve(model) / "config.json").get("model_type")
    seed, rows = recipe.selection.seed, recipe.selection.rows
    if kind == "clip":
        _only_classifiers(recipe, gold)
        clip = load_clip(model)
        splits = clip_splits(sources, clip.config.image_size, clip.config.channels, rows, seed)
        retain = clip_subject(clip, splits.labels, recipe.templates)
        forget = clip_subject(clip, splits.forget_labels, recipe.forget_templates or recipe.templates)
    else:
        classifier = load_classifier(model)
        forget = retain = classifier_subject(classifier)
        splits = classifier_splits(sources, forget, rows, seed)
    target = None if gold is None else _like(load_classifier(gold), gold, forget)
    if recipe.selection.rule == "closest" and target is None:
        raise UserError("recipe: selection: the rule closest needs the retrained model (--gold); or take keep")
    if recipe.training.linear:
        forget = forget.linearised()
        retain = retain.linearised()
    return Subjects(forget, retain, target), splits


def _only_classifiers(recipe: ImageRecipe, gold: str | None) -> None:
    if gold is not None or recipe.selection.rule == "closest":
        raise UserError("a CLIP model is not compared with a retrained one: leave out --gold, and take the rule keep")
    if recipe.baselines:
        raise UserError("recipe: baselines are for classifiers; leave them out for a CLIP model")
    if recipe.selection.statistics != "kept":
        raise UserError("recipe: selection: a CLIP model has no BatchNorm statistics to re-estimate")


def _like(gold: Classifier, source: str, subject: Subject) -> Subject:
    if gold.labels != subject.labels:
        raise UserError(f"{source}: its classes differ from the model's; they must be the same, in the same order")
    if (gold.image_size, gold.config.channels) != (subject.image_size, subject.channels):
        raise UserError(f"{source}: takes images of another size or mode than the model")
    return classifier_subject(gold)
