"""Plain data (a parsed YAML file) to a recipe: every entry is checked here, before anything is computed."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

from unlearnjax.errors import UserError, check_known
from unlearnjax.models.config import Remat
from unlearnjax.recipes.schema import (
    EACH,
    SCHEDULES,
    SEARCH,
    AdapterSpec,
    Candidate,
    Evaluation,
    Merge,
    Recipe,
    Search,
    Training,
    rule_of,
)

SECTIONS = ("name", "defaults", "candidates", "grid", "merges", "adapter", "training", "search", "evaluation")
HYPERPARAMETERS = tuple(f.name for f in dataclasses.fields(Candidate) if f.name != "name")
# What the report and the output folder call other things.
SUITES = ("official", "full")
RESERVED = ("base", "gold", "best")
# A candidate's or a merge's name is a folder's name, on every file system.
_NAME = re.compile(r"\w[\w.,+=()\[\] -]*(?<![. ])")
_LONGEST_NAME = 120  # bytes; folders are written beside their place under a longer name, of at most 255


class _Range(NamedTuple):
    """What a value must be: the test, and the same in words."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    """A number that float32 holds; booleans are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 3.4e38


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, Sequence) and all(isinstance(v, str) for v in value))


def _is_scales(value: Any) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str) or not len(value):
        return False
    return all(_is_number(v) and v >= 0 for v in value) and len(set(value)) == len(value)


def _is_layers(value: Any) -> bool:
    return isinstance(value, Sequence) and all(_is_whole(v) and v >= 0 for v in value) and len(value) > 0


_POSITIVE = _Range(lambda v: _is_number(v) and v > 0, "a number above 0")
_COUNT = _Range(lambda v: _is_whole(v) and 0 < v < 2**31, "a whole number above 0")
_SEED = _Range(lambda v: _is_whole(v) and 0 <= v < 2**32, "a whole number from 0 to 2^32 - 1")
_COUNT_OR_NULL = _Range(lambda v: v is None or _COUNT.holds(v), "a whole number above 0, or null")
_FLAG = _Range(lambda v: isinstance(v, bool), "true or false")
_TEXT = _Range(lambda v: isinstance(v, str) and v != "", "text (in quotes, if it looks like something else)")
_RANGES: dict[type, dict[str, _Range]] = {
    Candidate: {
        "name": _TEXT,
        "objective": _Range(lambda v: isinstance(v, (str, Mapping)), "a name or a mapping of terms to weights"),
        "learning_rate": _POSITIVE,
        "weight_decay": _Range(lambda v: _is_number(v) and v >= 0, "a number of at least 0"),
        "max_grad_norm": _Range(lambda v: v is None or _POSITIVE.holds(v), "a number above 0, or null"),
        "schedule": _TEXT,
        "warmup_ratio": _Range(lambda v: _is_number(v) and 0 <= v <= 1, "a number from 0 to 1"),
        "warmup_epochs": _Range(lambda v: v is None or (_is_number(v) and v >= 0), "a number of at least 0, or null"),
        "epochs": _COUNT,
        "micro_batch": _COUNT,
        "accumulation": _COUNT,
        "beta": _POSITIVE,
        "parameters": _Range(lambda v: isinstance(v, Mapping), "a mapping of terms to their parameters"),
        "rank": _COUNT,
        "alpha": _POSITIVE,
        "dropout": _Range(lambda v: _is_number(v) and 0 <= v < 1, "a number from 0 to below 1"),
        "init_seed": _SEED,
        "order_seed": _SEED,
        "adapter": _TEXT,
        "layers": _Range(
            lambda v: _TEXT.holds(v) or _is_layers(v), "all, auto, last-<count>, or a list of numbers from 0"
        ),
        "modules": _TEXT,
        "order": _Range(lambda v: v is None or _TEXT.holds(v), "a name, or null"),
        "order_parameters": _Range(lambda v: isinstance(v, Mapping), "a mapping of names to values"),
        "separator": _Range(lambda v: isinstance(v, str), "text, which may be empty"),
        "append_eos": _FLAG,
        "chat_template": _FLAG,
    },
    AdapterSpec: {
        "type": _TEXT,
        "targets": _Range(lambda v: _is_names(v) and len(v) > 0, "`all`, or a list of names"),
    },
    Training: {
        "order": _TEXT,
        "buckets": _COUNT,
        "seed": _SEED,
        "prompt_tokens": _COUNT_OR_NULL,
        "row_tokens": _COUNT_OR_NULL,
        "layer": _COUNT_OR_NULL,
        "idk": _Range(lambda v: v is None or _TEXT.holds(v), "a file's name, or null"),
        "waypoints": _Range(lambda v: v == 0 or _COUNT.holds(v), "a whole number of at least 0"),
        "keep_best": _COUNT_OR_NULL,
        "best_rows": _COUNT,
        "remat": _Range(lambda v: v is None or v in get_args(Remat), "none, linears, full, or null"),
        "tokens_at_once": _COUNT_OR_NULL,
        "candidates_at_once": _COUNT_OR_NULL,
    },
    Merge: {
        "method": _TEXT,
        "space": _TEXT,
        "semantics": _Range(lambda v: v is None or isinstance(v, str), "a name, or null"),
        "of": _Range(
            lambda v: v is None or v == EACH or (not isinstance(v, str) and _is_names(v) and len(v) > 0),
            "a list of candidates' names, `each`, or null",
        ),
        "weights": _Range(
            lambda v: v is None or (isinstance(v, Sequence) and not isinstance(v, str) and all(map(_is_number, v))),
            "a list of numbers, one per candidate",
        ),
        "name": _Range(lambda v: isinstance(v, str), _TEXT.words),
        "rank": _COUNT_OR_NULL,
        "compress": _COUNT_OR_NULL,
        "length": _Range(lambda v: v is None or _POSITIVE.holds(v), "a number above 0, or null"),
        "negate": _FLAG,
        "scale": _Range(lambda v: v == SEARCH or _POSITIVE.holds(v), "a number above 0, or `search`"),
    },
    Search: {
        "scales": _Range(_is_scales, "a list of different numbers of at least 0"),
        "keep": _Range(lambda v: _POSITIVE.holds(v) and v <= 1, "a number above 0, of at most 1"),
        "rows": _COUNT,
    },
    Evaluation: {
        "semantics": _TEXT,
        "max_new_tokens": _COUNT,
        "batch_size": _COUNT,
        "waypoint_rows": _COUNT,
        "suite": _TEXT,
        "full_rows": _COUNT,
        "full_draws": _COUNT,
        "export": _TEXT,
        "candidates": _Range(
            lambda v: v in ("all", "none") or (not isinstance(v, str) and _is_names(v) and len(v) > 0),
            "`all`, `none`, or a list of names",
        ),
    },
}


def _mapping(raw: Any, what: str, where: str) -> dict[str, Any]:
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: must be a mapping of {what}, not {raw!r}")
    for key in raw:
        if not isinstance(key, str):
            raise UserError(f"{where}: the key {key!r} is not text")
    return dict(raw)


def _list(raw: Any, what: str, where: str) -> list[Any]:
    if not isinstance(raw, Sequence) or isinstance(raw, str):
        raise UserError(f"{where}: must be a list of {what}, not {raw!r}")
    return list(raw)


def _check_ranges(kind: type, values: Mapping[str, Any], where: str) -> None:
    for name, (holds, words) in _RANGES[kind].items():
        if name in values and not holds(values[name]):
            raise UserError(f"{where}: {name} must be {words}, not {values[name]!r}")


def _section(kind: type, raw: Any, where: str) -> Any:
    values = _mapping({} if raw is None else raw, "settings", where)
    check_known(values, _RANGES[kind], "key", where)
    _check_ranges(kind, values, where)
    return kind(**values)


def _candidate(values: Mapping[str, Any], where: str) -> Candidate:
    from unlearnjax.objectives.objective import expand
    from unlearnjax.recipes.groups import check_training

    check_known(values, ["name", *HYPERPARAMETERS], "hyperparameter", where)
    _check_ranges(Candidate, values, where)
    candidate = Candidate(**values)
    check_known([candidate.schedule], SCHEDULES, "schedule", where)
    if isinstance(candidate.objective, Mapping):
        for term, weight in _mapping(candidate.objective, "terms to weights", f"{where}: objective").items():
            if not _is_number(weight):
                raise UserError(f"{where}: objective: the weight of {term} must be a finite number, not {weight!r}")
    weights = expand(candidate.objective, where)
    if not any(weights.values()):
        raise UserError(f"{where}: objective: at least one term needs a weight that is not 0")
    _check_parameters(candidate.parameters, weights, where)
    candidate = dataclasses.replace(candidate, objective=weights)
    check_training(candidate, where)
    return candidate


def _check_parameters(parameters: Mapping[str, Any], weights: Mapping[str, float], where: str) -> None:
    from unlearnjax.objectives.objective import TERMS

    where = f"{where}: parameters"
    for term, values in _mapping(parameters, "terms to their parameters", where).items():
        check_known([term], TERMS, "objective term", where)
        if term not in weights:
            raise UserError(f"{where}: {term} is not in the candidate's objective; leave its parameters out")
        own = TERMS[term].parameters
        if not own:
            raise UserError(f"{where}: {term} has no parameters of its own")
        given = _mapping(values, "names to numbers", f"{where}: {term}")
        check_known(given, own, f"parameter of {term}", where)
        for name, value in given.items():
            if not _is_number(value):
                raise UserError(f"{where}: {term}: {name} must be a finite number, not {value!r}")


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "+".join(f"{term}{weight}" for term, weight in value.items())
    return "none" if value is None else str(value)


def _candidates(raw: Mapping[str, Any], where: str) -> tuple[Candidate, ...]:
    """The listed candidates, then one per point of the grid; all of them on top of the defaults."""
    given = {name: {} if raw.get(name) is None else raw[name] for name in ("defaults", "grid")}
    defaults = _mapping(given["defaults"], "hyperparameters", f"{where}: defaults")
    grid = _mapping(given["grid"], "hyperparameters to lists of values", f"{where}: grid")
    for section, values in (("defaults", defaults), ("grid", grid)):
        check_known(values, HYPERPARAMETERS, "hyperparameter", f"{where}: {section}")
    listed = raw.get("candidates") or []
    entries = []
    for i, entry in enumerate(_list(listed, "candidates", f"{where}: candidates"), start=1):
        entries.append({"name": f"candidate-{i}", **_mapping(entry, "hyperparameters", f"{where}: candidate {i}")})
    for name, values in grid.items():
        if not _list(values, "values", f"{where}: grid: {name}"):
            raise UserError(f"{where}: grid: {name} has no values; give at least one")
    for point in itertools.product(*grid.values()) if grid else ():
        name = "-".join(f"{k}{_short(v)}" for k, v in zip(grid, point, strict=True))
        entries.append({"name": name, **dict(zip(grid, point, strict=True))})
    if not entries:
        raise UserError(f"{where}: no candidates; list them under candidates or grid")
    return tuple(_candidate({**defaults, **e}, f"{where}: candidate {e['name']!r}") for e in entries)


def _check_merge(merge: Merge, candidates: Sequence[str], full: Sequence[str], where: str) -> None:
    """Everything that `unlearnjax.merge` would refuse after the training, before it."""
    import numpy as np

    from unlearnjax.merging.api import check_count, check_hyperparameters, methods

    check_known([merge.method], methods(), "merge method", where)
    check_known([merge.space], methods()[merge.method].spaces, f"space of {merge.method}", where)
    for name, value in merge.hyperparameters.items():
        if not isinstance(value, (bool, int, float, str)):
            raise UserError(f"{where}: {name} must be a number, true or false, or a name, not {value!r}")
    try:
        method, rule = rule_of(merge)
        settings = check_hyperparameters(method, rule, merge.hyperparameters)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('merge: ')}") from None
    if merge.space not in rule.spaces:
        able = [r.semantics for r in method.rules if merge.space in r.spaces]
        raise UserError(
            f"{where}: {merge.method} with semantics {rule.semantics} does not work in space {merge.space}; "
            f"semantics that do: {', '.join(able)}"
        )
    if rule.wants_base(settings):
        hint = "; pass origin: base" if "origin" in settings else ""
        raise UserError(f"{where}: {merge.method} works on whole weights, and a run merges adapters{hint}")
    if merge.rank is not None and merge.space == "factors":
        raise UserError(f"{where}: rank is what a delta is exported with; in space factors leave it out")
    if merge.compress is not None and merge.space != "core":
        raise UserError(f"{where}: compress is for space core; in space {merge.space} leave it out")
    if merge.of == EACH:
        if merge.scale != SEARCH:
            raise UserError(f"{where}: of each needs scale: search, which chooses among the candidates")
    elif merge.of is not None:
        check_known(merge.of, candidates, "candidate", f"{where}: of")
        if len(set(merge.of)) < len(merge.of):
            raise UserError(f"{where}: of names a candidate twice: {', '.join(merge.of)}")
    mine = [name for name in full if merge.of in (None, EACH) or name in (merge.of or ())]
    if mine and merge.space != "delta":
        raise UserError(f"{where}: space {merge.space} is for LoRAs, and {mine[0]} trains weights; take space delta")
    if mine and merge.rank is not None:
        raise UserError(f"{where}: rank is of an adapter, and {mine[0]} trains weights; leave it out")
    count = 1 if merge.of == EACH else len(candidates if merge.of is None else merge.of)
    try:
        check_count(method, rule, count)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('merge: ')}") from None
    if merge.weights is not None:
        if len(merge.weights) != count:
            raise UserError(f"{where}: {len(merge.weights)} weights for {count} candidates; give one for each")
        problem = rule.check_weights(np.asarray(merge.weights, np.float32), settings)
        if problem:
            raise UserError(f"{where}: weights {list(merge.weights)} do not suit {merge.method}: {problem}")


def _merge(raw: Any, candidates: Sequence[Candidate], where: str) -> Merge:
    given = _mapping(raw, "a method and its hyperparameters", where)
    if "method" not in given:
        raise UserError(f"{where}: names no method")
    own = {k: v for k, v in given.items() if k in _RANGES[Merge]}
    rest = {k: v for k, v in given.items() if k not in own}
    _check_ranges(Merge, own, where)
    merge = Merge(**own, hyperparameters=rest)
    names, full = ([c.name for c in candidates if c.adapter in kinds] for kinds in (("lora", "full"), ("full",)))
    _check_merge(merge, names, full, where)
    if merge.name:
        return merge
    extras = [f"{k}{_short(v)}" for k, v in sorted(rest.items())]
    extras += [] if merge.compress is None else [f"compress{merge.compress}"]
    extras += [] if merge.length is None else [f"length{_short(merge.length)}"]
    extras += [] if merge.scale == 1 else [f"scale{_short(merge.scale)}"]
    extras += ["negated"] if merge.negate else []
    of = [] if merge.of is None else [merge.of if isinstance(merge.of, str) else "+".join(merge.of)]
    parts = [merge.method, *of, merge.space, *([merge.semantics] if merge.semantics else []), *extras]
    return dataclasses.replace(merge, name="-".join(parts))


def _check_names(names: Sequence[str], where: str) -> None:
    """Each name is a folder and a row of the report: it must be usable as both, and be there once."""
    seen = set()
    for name in names:
        if not _NAME.fullmatch(name) or len(name.encode()) > _LONGEST_NAME:
            raise UserError(f"{where}: {name!r} can't be a folder's name; use some letters, digits, -, _, . and +")
        # Where capitals don't count, the second of two would overwrite the first one's folder.
        key = name.casefold()
        if key in RESERVED:
            raise UserError(f"{where}: the name {name!r} has a meaning of its own in the report; choose another")
        if key in seen:
            raise UserError(f"{where}: the name {name!r} is used twice; give each candidate and merge its own")
        seen.add(key)


def recipe_from(raw: Any, where: str) -> Recipe:
    """Check plain data (a parsed YAML file) and make a recipe of it.

    Args:
      raw: the data; see `SECTIONS` for its keys.
      where: what an error message calls it, such as the file.

    Raises:
      UserError: an unknown key (with the nearest valid one), a value out of range, a merge that could not be computed,
        or a name used twice.
    """
    raw = _mapping(raw, f"the keys {', '.join(SECTIONS)}", where)
    check_known(raw, SECTIONS, "key", where)
    if not _TEXT.holds(raw.get("name", "unnamed")):
        raise UserError(f"{where}: name must be {_TEXT.words}, not {raw['name']!r}")
    candidates = _candidates(raw, where)
    adapter = _section(AdapterSpec, raw.get("adapter"), f"{where}: adapter")
    check_known([adapter.type], ["lora"], "adapter type", f"{where}: adapter")
    training = _section(Training, raw.get("training"), f"{where}: training")
    check_known([training.order], ["bucketed", "published"], "order", f"{where}: training")
    evaluation = _section(Evaluation, raw.get("evaluation"), f"{where}: evaluation")
    check_known([evaluation.semantics], ["official"], "semantics", f"{where}: evaluation")
    check_known([evaluation.suite], SUITES, "suite", f"{where}: evaluation")
    search = _section(Search, raw.get("search"), f"{where}: search")
    search = dataclasses.replace(search, scales=tuple(search.scales))
    listed = enumerate(_list(raw.get("merges") or [], "merges", f"{where}: merges"), start=1)
    merges = tuple(_merge(m, candidates, f"{where}: merge {i}") for i, m in listed)
    _check_names([c.name for c in candidates] + [m.name for m in merges], where)
    if not isinstance(evaluation.candidates, str):
        check_known(
            evaluation.candidates, [c.name for c in candidates], "candidate", f"{where}: evaluation: candidates"
        )
        evaluation = dataclasses.replace(evaluation, candidates=tuple(evaluation.candidates))
    if not merges and evaluation.export == "best" and not any(evaluation.evaluates(c.name) for c in candidates):
        raise UserError(
            f"{where}: evaluation: without merges the best candidate is exported, and none is evaluated; evaluate "
            "some, or name the one to export"
        )
    if evaluation.export != "best":
        what = "merge" if merges else "candidate"
        names = [m.name for m in merges] or [c.name for c in candidates]
        check_known([evaluation.export], names, what, f"{where}: evaluation: export")
    return Recipe(raw.get("name", "unnamed"), candidates, merges, adapter, training, evaluation, search)
