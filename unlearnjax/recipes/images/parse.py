"""Plain data (a parsed YAML file with `kind: images`) to a recipe, every entry checked before anything is computed."""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

from unlearnjax.errors import UserError, check_known
from unlearnjax.merging.api import check_hyperparameters, find_rule
from unlearnjax.recipes.images.schema import (
    RULES,
    SEARCHED,
    STATISTICS,
    ImageMerge,
    ImageRecipe,
    ImageTraining,
    Selection,
)
from unlearnjax.training.images.settings import BATCH_NORM, OPTIMIZERS, ImageCandidate, check

SECTIONS = ("kind", "name", "defaults", "candidates", "grid", "merges", "training", "selection", "templates",
            "forget_templates", "baselines", "export")  # fmt: skip
SETTINGS = tuple(f.name for f in dataclasses.fields(ImageCandidate) if f.name != "name")
MERGE_KEYS = tuple(f.name for f in dataclasses.fields(ImageMerge) if f.name != "hyperparameters")
_NAME = re.compile(r"\w[\w.,+=()\[\] -]{0,99}(?<![. ])")
_KINDS = {float: (int, float), int: (int,), bool: (bool,), str: (str,)}


def image_recipe_from(raw: Any, where: str) -> ImageRecipe:
    """Check and build a recipe.

    Args:
      where: the file, for messages.

    Raises:
      UserError: an unknown key (with the nearest), a value of another kind or out of range, a name given twice, an
        unknown method or hyperparameter.
    """
    raw = _mapping(raw, where)
    check_known(raw, SECTIONS, "key", where)
    candidates = _candidates(raw, where)
    names = [c.name for c in candidates]
    merges = [_merge(item, names, f"{where}: merges[{i}]") for i, item in enumerate(_list(raw, "merges", where))]
    _check_names([m.name for m in merges], f"{where}: merges")
    selection = _section(Selection, raw.get("selection", {}), f"{where}: selection")
    training = _section(ImageTraining, raw.get("training", {}), f"{where}: training")
    _check_sections(training, selection, where)
    texts = {
        key: tuple(_texts(raw[key], f"{where}: {key}"))
        for key in ("templates", "forget_templates")
        if raw.get(key) is not None
    }
    baselines = {
        name: dict(_mapping(settings or {}, f"{where}: baselines: {name}"))
        for name, settings in _mapping(raw.get("baselines") or {}, f"{where}: baselines").items()
    }
    if baselines:
        from unlearnjax.baselines import BASELINES

        check_known(baselines, BASELINES, "baseline", f"{where}: baselines")
    export = raw.get("export", "best")
    if export != "best" and export not in [m.name for m in merges]:
        raise UserError(f"{where}: export is {export!r}, and no merge is called so; or say best")
    return ImageRecipe(
        str(raw.get("name", "unnamed")), tuple(candidates), tuple(merges), training, selection, baselines=baselines,
        export=export, **texts,
    )  # fmt: skip


def _mapping(raw: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping) or not all(isinstance(key, str) for key in raw):
        raise UserError(f"{where}: must be a mapping of names to values, not {str(raw)[:60]!r}")
    return raw


def _list(raw: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found = raw.get(key) or []
    if not isinstance(found, list):
        raise UserError(f"{where}: {key} must be a list")
    return found


def _texts(raw: Any, where: str) -> list[str]:
    if not isinstance(raw, list) or not raw or not all(isinstance(text, str) and "{}" in text for text in raw):
        raise UserError(f"{where}: must be a list of texts with {{}} where the class's name goes")
    return raw


def _typed(kind: Any, name: str, value: Any, where: str) -> Any:
    """A value of a dataclass's field, checked against the field's annotation."""
    text = str(kind)
    if value is None and "None" in text:
        return None
    for known, allowed in _KINDS.items():
        if text.startswith(known.__name__) or text == str(known):
            if not isinstance(value, allowed) or (known is not bool and isinstance(value, bool)):
                raise UserError(f"{where}: {name} is {value!r} and must be of the kind {known.__name__}")
            return known(value)
    if "tuple[float" in text and isinstance(value, list) and all(isinstance(v, int | float) for v in value):
        return tuple(float(v) for v in value)
    if "tuple[str" in text and isinstance(value, list) and all(isinstance(v, str) for v in value):
        return tuple(value)
    raise UserError(f"{where}: {name} is {value!r}, which it cannot be")


def _section(kind: Any, raw: Any, where: str) -> Any:
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    raw = _mapping(raw, where)
    check_known(raw, fields, "key", where)
    return kind(**{key: _typed(fields[key], key, value, where) for key, value in raw.items()})


def _check_sections(training: ImageTraining, selection: Selection, where: str) -> None:
    check_known([training.optimizer], OPTIMIZERS, "optimizer", f"{where}: training")
    check_known([training.batch_norm], BATCH_NORM, "batch_norm", f"{where}: training")
    check_known([selection.rule], RULES, "rule", f"{where}: selection")
    check_known([selection.statistics], STATISTICS, "statistics", f"{where}: selection")
    if training.batch_size < 1 or (training.group is not None and training.group < 1):
        raise UserError(f"{where}: training: batch_size and group must be 1 or more")
    if not 0 < selection.keep <= 1:
        raise UserError(f"{where}: selection: keep is {selection.keep:g} and must be above 0 and at most 1")
    if not selection.lambdas or not all(0 <= v < 100 for v in selection.lambdas):
        raise UserError(f"{where}: selection: lambdas must be numbers from 0 on, at least one")
    if selection.rows < 1 or selection.seed < 0:
        raise UserError(f"{where}: selection: rows must be 1 or more, and seed 0 or more")
    if training.linear and selection.statistics == "re-estimated":
        raise UserError(f"{where}: a linearised model keeps its start's BatchNorm statistics; leave one of both out")


def _candidates(raw: Mapping[str, Any], where: str) -> list[ImageCandidate]:
    defaults = _mapping(raw.get("defaults") or {}, f"{where}: defaults")
    check_known(defaults, SETTINGS, "setting", f"{where}: defaults")
    listed = [(dict(_mapping(c, f"{where}: candidates")), f"{where}: candidates[{i}]")
              for i, c in enumerate(_list(raw, "candidates", where))]  # fmt: skip
    axes = _mapping(raw.get("grid") or {}, f"{where}: grid")
    check_known(axes, SETTINGS, "setting", f"{where}: grid")
    for key, values in axes.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{where}: grid: {key} must be a list of values")
    for values in itertools.product(*axes.values()) if axes else ():
        own = dict(zip(axes, values, strict=True))
        listed.append(({"name": " ".join(f"{k}={v}" for k, v in own.items()), **own}, f"{where}: grid"))
    found = []
    for values, place in listed:
        check_known(values, ("name", *SETTINGS), "setting", place)
        if "name" not in values:
            raise UserError(f"{place}: has no name")
        candidate: ImageCandidate = _section(ImageCandidate, {**defaults, **values}, place)
        check(candidate, place)
        found.append(candidate)
    if not found:
        raise UserError(f"{where}: has no candidates; give a list, a grid, or both")
    _check_names([c.name for c in found], f"{where}: candidates")
    return found


def _merge(raw: Any, candidates: list[str], where: str) -> ImageMerge:
    values = dict(_mapping(raw, where))
    if "method" not in values:
        raise UserError(f"{where}: has no method")
    own = {key: values.pop(key) for key in MERGE_KEYS if key in values}
    merge: ImageMerge = _section(ImageMerge, own, where)
    if merge.of is not None:
        check_known(merge.of, candidates, "candidate", where)
    if merge.method in SEARCHED:
        check_known(values, (), "hyperparameter", where)
    else:
        if "lambda" in values or "lambda_" in values:
            raise UserError(f"{where}: lambda is searched; see selection: lambdas")
        method, rule = find_rule(merge.method, merge.semantics)
        check_hyperparameters(method, rule, values)
    return dataclasses.replace(merge, name=merge.name or merge.method, hyperparameters=values)


def _check_names(names: list[str], where: str) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise UserError(f"{where}: the name {name!r} cannot be a folder's; use letters, digits, . , + = - _")
        if names.count(name) > 1 or name in ("base", "retrained", "best"):
            raise UserError(f"{where}: the name {name!r} is given twice or means something else; choose another")
