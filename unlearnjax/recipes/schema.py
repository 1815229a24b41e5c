"""A recipe: candidates, objective, adapter, merges and evaluation, as frozen plain data."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unlearnjax.errors import UserError, check_known

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True)
class Candidate:
    """One candidate's settings. Everything here may differ between the candidates of a run.

    Attributes:
      objective: a shorthand (`npo`, `graddiff`, ...) or {term: weight}.
      learning_rate, weight_decay, max_grad_norm (null: no clipping), schedule, warmup_ratio (share of the updates).
      epochs: passes over the forget set. micro_batch: rows per micro-batch. accumulation: micro-batches per update.
      beta: NPO's inverse temperature.
      rank, alpha, dropout: of the LoRA (scale alpha / rank).
      init_seed, order_seed: of the adapter (and its dropout), and of the order of rows.
    """

    name: str = ""
    objective: str | Mapping[str, float] = "zjuklab"
    learning_rate: float = 1e-4
    weight_decay: float = 0.01
    max_grad_norm: float | None = None
    schedule: str = "linear"
    warmup_ratio: float = 0.1
    epochs: int = 5
    micro_batch: int = 2
    accumulation: int = 4
    beta: float = 0.1
    rank: int = 32
    alpha: float = 32.0
    dropout: float = 0.05
    init_seed: int = 42
    order_seed: int = 42


@dataclass(frozen=True)
class AdapterSpec:
    """What trains. `targets`: `all` linears of every layer, or a list of names."""

    type: str = "lora"
    targets: str | Sequence[str] = "all"


@dataclass(frozen=True)
class Training:
    """How the candidates run together. `order`: `bucketed` or `published`; `buckets`: compiled widths at most."""

    order: str = "bucketed"
    buckets: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Merge:
    """One merge to compare. `hyperparameters` are the method's own; `weights` one per candidate, in their order."""

    method: str
    space: str = "delta"
    semantics: str | None = None
    weights: Sequence[float] | None = None
    name: str = ""
    rank: int | None = None  # of the exported adapter; default: the candidates' largest
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The official protocol's settings. `export`: the merge to write as a model: `best`, or its name."""

    semantics: str = "official"
    max_new_tokens: int = 256
    batch_size: int = 32
    export: str = "best"


@dataclass(frozen=True)
class Recipe:
    name: str
    candidates: tuple[Candidate, ...]
    merges: tuple[Merge, ...]
    adapter: AdapterSpec = AdapterSpec()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()


CANDIDATE_FIELDS = tuple(f.name for f in dataclasses.fields(Candidate))
SECTIONS = ("name", "defaults", "candidates", "grid", "merges", "adapter", "training", "evaluation")

# field -> (test, what it must be)
_POSITIVE = (lambda v: v > 0 and math.isfinite(v), "a number above 0")
_WHOLE = (lambda v: isinstance(v, int) and v > 0, "a whole number above 0")
_SEED = (lambda v: isinstance(v, int) and 0 <= v < 2**32, "a whole number from 0 to 2^32 - 1")
_RANGES: dict[str, tuple[Any, str]] = {
    "learning_rate": _POSITIVE,
    "weight_decay": (lambda v: v >= 0 and math.isfinite(v), "a number of at least 0"),
    "warmup_ratio": (lambda v: 0 <= v <= 1, "a number from 0 to 1"),
    "epochs": _WHOLE,
    "micro_batch": _WHOLE,
    "accumulation": _WHOLE,
    "rank": _WHOLE,
    "beta": _POSITIVE,
    "alpha": _POSITIVE,
    "dropout": (lambda v: 0 <= v < 1, "a number from 0 to below 1"),
    "init_seed": _SEED,
    "order_seed": _SEED,
}


def _candidate(values: Mapping[str, Any], where: str) -> Candidate:
    check_known(values, CANDIDATE_FIELDS, "hyperparameter", where)
    for name, (valid, what) in _RANGES.items():
        if name in values:
            value = values[name]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not valid(value):
                raise UserError(f"{where}: {name} must be {what}, not {value!r}")
    clip = values.get("max_grad_norm")
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float)) or clip <= 0):
        raise UserError(f"{where}: max_grad_norm must be a number above 0 or null, not {clip!r}")
    if values.get("schedule", "linear") not in SCHEDULES:
        check_known([values["schedule"]], SCHEDULES, "schedule", where)
    candidate = Candidate(**values)
    from unlearnjax.objectives.objective import expand

    if not isinstance(candidate.objective, (str, Mapping)):
        raise UserError(f"{where}: objective must be a name or a mapping of terms to weights")
    weights = expand(candidate.objective, where)
    if not any(w != 0 for w in weights.values()) or not all(math.isfinite(w) for w in weights.values()):
        raise UserError(f"{where}: the objective needs finite weights, at least one of them not 0")
    return dataclasses.replace(candidate, objective=weights)


def _section(kind: type, raw: Any, where: str) -> Any:
    raw = raw or {}
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: must be a mapping, not {type(raw).__name__}")
    check_known(raw, [f.name for f in dataclasses.fields(kind)], "key", where)
    return kind(**raw)


def _merge(raw: Any, count: int, where: str) -> Merge:
    if not isinstance(raw, Mapping) or "method" not in raw:
        raise UserError(f"{where}: must be a mapping with a method")
    known = {f.name for f in dataclasses.fields(Merge)} - {"hyperparameters"}
    own = {k: v for k, v in raw.items() if k in known}
    rest = {k: v for k, v in raw.items() if k not in known}
    merge = Merge(**own, hyperparameters=rest)
    if merge.weights is not None and len(merge.weights) != count:
        raise UserError(f"{where}: {len(merge.weights)} weights for {count} candidates")
    from unlearnjax.merging.api import methods

    check_known([merge.method], methods(), "merge method", where)
    check_known([merge.space], methods()[merge.method].spaces, f"space of {merge.method}", where)
    if not merge.name:
        extras = "-".join(f"{k}{v}" for k, v in sorted(rest.items()))
        merge = dataclasses.replace(merge, name="-".join(x for x in (merge.method, merge.space, extras) if x))
    return merge


def _unique(names: Sequence[str], where: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: the name {name!r} is used twice; give each its own")
        if not name or name in (".", "..") or any(c in name for c in '/\\\0:*?"<>|'):
            raise UserError(f"{where}: {name!r} can't be a folder's name; rename it")


def recipe_from(raw: Any, where: str) -> Recipe:
    """Check plain data (a parsed YAML file) and make a recipe of it.

    Raises:
      UserError: an unknown key (with the nearest valid one), a value out of range, or a name used twice.
    """
    if not isinstance(raw, Mapping):
        raise UserError(f"{where}: a recipe is a mapping with the keys {', '.join(SECTIONS)}")
    check_known(raw, SECTIONS, "key", where)
    defaults = raw.get("defaults") or {}
    if not isinstance(defaults, Mapping):
        raise UserError(f"{where}: defaults must be a mapping of hyperparameters")
    listed = raw.get("candidates") or []
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not all(isinstance(c, Mapping) for c in listed):
        raise UserError(f"{where}: candidates must be a list of mappings")
    grid = raw.get("grid") or {}
    if not isinstance(grid, Mapping) or not all(isinstance(v, list) and v for v in grid.values()):
        raise UserError(f"{where}: grid must map hyperparameters to non-empty lists of values")
    check_known(grid, CANDIDATE_FIELDS, "hyperparameter", f"{where}: grid")
    entries = [dict(c) for c in listed]
    if grid:
        for values in itertools.product(*grid.values()):
            point = dict(zip(grid, values))
            entries.append({**point, "name": "-".join(f"{k}{v}" for k, v in point.items()).replace(" ", "")})
    if not entries:
        raise UserError(f"{where}: no candidates; list them under candidates or grid")
    candidates = []
    for i, entry in enumerate(entries):
        label = f"{where}: candidate {entry.get('name', i + 1)!r}"
        candidates.append(_candidate({"name": f"candidate-{i + 1}", **defaults, **entry}, label))
    adapter = _section(AdapterSpec, raw.get("adapter"), f"{where}: adapter")
    check_known([adapter.type], ["lora"], "adapter type", f"{where}: adapter")
    training = _section(Training, raw.get("training"), f"{where}: training")
    check_known([training.order], ["bucketed", "published"], "order", f"{where}: training")
    evaluation = _section(Evaluation, raw.get("evaluation"), f"{where}: evaluation")
    check_known([evaluation.semantics], ["official"], "semantics", f"{where}: evaluation")
    merges = tuple(_merge(m, len(candidates), f"{where}: merge {i + 1}") for i, m in enumerate(raw.get("merges") or []))
    _unique([c.name for c in candidates] + [m.name for m in merges] + ["base"], where)
    if evaluation.export != "best":
        check_known([evaluation.export], [m.name for m in merges], "merge", f"{where}: evaluation: export")
    return Recipe(str(raw.get("name", "unnamed")), tuple(candidates), merges, adapter, training, evaluation)


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data with every default written out; `recipe_from` reads it back."""
    plain = dataclasses.asdict(recipe)
    plain["candidates"] = [dict(c) for c in plain["candidates"]]
    plain["merges"] = [
        {**{k: v for k, v in m.items() if k != "hyperparameters"}, **m["hyperparameters"]} for m in plain["merges"]
    ]
    return plain
