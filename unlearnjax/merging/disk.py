"""Merging model folders tensor by tensor: no model is ever in memory, whatever its size.

Tensors are views of mapped files, read as they are needed; one is merged while the one before is written. Methods whose
thresholds are the whole model's (scope "tree") go through all tensors once for each round before that.
"""

import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from unlearnjax.errors import UserError, check_known
from unlearnjax.io.huggingface import check_dtype, read_json, resolve
from unlearnjax.io.safetensors import Checkpoint, Entry, open_folder, write_sharded
from unlearnjax.merging import engine
from unlearnjax.merging.api import check_count, check_each, check_hyperparameters, find_rule
from unlearnjax.merging.job import Job, depths, settings_at
from unlearnjax.merging.protocol import MergeMethod, Rule, Settings, State

FLOATS = ("float64", "float32", "float16", "bfloat16")


class Tensor(NamedTuple):
    """One tensor of the result: merged under `settings` with `weights`, or (None) the base's as it is."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    settings: dict[str, Any] | None
    weights: tuple[float, ...] = ()

    @property
    def size(self) -> int:
        return math.prod(self.shape)


SEARCH_PASSES = 5  # that the search for a threshold takes as a rule; see unlearnjax_kernels.threshold.xla


class Plan(NamedTuple):
    """A merge whose inputs have been checked and of whose tensors nothing has been read."""

    job: Job
    method: MergeMethod
    rule: Rule
    base: Checkpoint
    models: tuple[Checkpoint, ...]
    tensors: tuple[Tensor, ...]

    @property
    def passes(self) -> int:
        """About how often every merged tensor is read: a search for thresholds takes as many passes as it needs."""
        rounds = self.rule.rounds if self.rule.scope == "tree" else ()
        return 1 + sum(1 if round_.until is None else SEARCH_PASSES for round_ in rounds)

    @property
    def bytes_read(self) -> int:
        """In one pass."""
        sources = [self.base, *self.models]
        return sum(
            math.prod(t.shape)
            * sum(s.dtype(t.name).itemsize for s in (sources if t.settings is not None else sources[:1]))
            for t in self.tensors
        )

    @property
    def bytes_written(self) -> int:
        return sum(t.size * t.dtype.itemsize for t in self.tensors)

    @property
    def memory(self) -> int:
        """A bound on the memory for tensors: of the largest one, all inputs, the result, one that is being written, and
        two float32 copies of each candidate that a threshold may be searched in."""
        largest = max((t.size for t in self.tensors), default=0)
        return largest * 4 * (3 * len(self.models) + 4)


def plan(job: Job) -> Plan:
    """Open everything and check it, before any tensor is read.

    Raises:
      UserError: a folder without safetensors, or a broken file; models of another architecture; a tensor that one model
        lacks, or has in another shape or no floating dtype; no base where the method needs one; an unknown method,
        setting or dtype; settings or weights that do not suit the method; a number of models it does not merge.
    """
    method, rule = find_rule(job.method, job.semantics)
    check_count(method, rule, len(job.inputs))
    known = [*(p.name for p in rule.hyperparameters), "weight"]
    for given in (job.settings, *(source.settings for source in job.inputs)):
        check_known(given, known, "parameter", f"merge: {method.name} ({rule.semantics} semantics)")
    if job.base is None and not _on_models(job, rule):
        raise UserError(f"merge: {method.name} merges deltas; give the base model that they are from")
    folders = [resolve(source.model) for source in job.inputs]
    # Methods on whole models need no base: any one will do to count from, the first model itself too.
    base_folder = resolve(job.base) if job.base is not None else folders[0]
    base, *models = (open_folder(folder) for folder in (base_folder, *folders))
    _check_architecture([base_folder, *folders])
    names = list(base.files)
    for model in models:
        _check_names(base, model)
    wanted = None if job.dtype is None else check_dtype(job.dtype)
    at = depths(names)
    tensors = []
    for name in names:
        kinds = {str(source.dtype(name)) for source in (base, *models)}
        floating = kinds <= set(FLOATS)
        if not floating and any(kind in FLOATS or kind.startswith("float8") for kind in kinds):
            raise UserError(f"merge: tensor {name!r} is {', '.join(sorted(kinds))} in these models; convert them first")
        dtype = wanted if wanted is not None and floating else base.dtype(name)
        own: Tensor = Tensor(name, base.shape(name), dtype, None)
        if floating:  # integer buffers are never merged
            settings, weights = _settings(job, method, rule, name, at[name])
            own = own._replace(settings=settings, weights=weights)
        tensors.append(own)
    if rule.scope == "tree":
        distinct = {(tuple(sorted(t.settings.items())), t.weights) for t in tensors if t.settings is not None}
        if len(distinct) > 1:
            raise UserError(f"merge: the thresholds of {method.name} ({rule.semantics}) are the whole model's; give no "
                            "settings that differ by tensor")  # fmt: skip
    return Plan(job, method, rule, base, tuple(models), tuple(tensors))


def merge_to(
    folder: Path, found: Plan, *, max_shard_bytes: int = 5_000_000_000, progress: Callable[[int], object] | None = None
) -> None:
    """Merge into safetensors files in `folder` (stage it: it is not whole until this returns).

    Args:
      progress: called with the number of bytes read for each tensor.

    Raises:
      UserError: NaN or Inf in a tensor of a model, which is named.
    """
    merge = Merger(found, progress)
    with ThreadPoolExecutor(1) as worker:
        values = _ahead(worker, [functools.partial(merge.value, tensor) for tensor in found.tensors])
        entries = [Entry(t.name, t.shape, t.dtype, lambda: next(values)) for t in found.tensors]
        write_sharded(folder, entries, max_shard_bytes)


def _ahead(worker: ThreadPoolExecutor, tasks: Sequence[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """The tasks' results in order; the next one is under way while the caller is busy with this one."""
    pending: Future[np.ndarray] | None = None
    for task in [*tasks, None]:
        following = None if task is None else worker.submit(task)
        if pending is not None:
            yield pending.result()
        pending = following


class Merger:
    """Merges a plan's tensors one by one; for a rule of scope "tree" it first goes through all of them."""

    def __init__(self, found: Plan, progress: Callable[[int], object] | None = None) -> None:
        self.plan, self.progress = found, progress
        self._state: State | None = None
        if found.rule.scope == "tree":
            self._state = self._search()

    def value(self, tensor: Tensor) -> np.ndarray:
        """The merged tensor, in its dtype."""
        base, models = self._read(tensor)
        if tensor.settings is None:
            return base
        rule, factor = self.plan.rule, np.float32(self.plan.job.factor)
        static, numbers = _split(rule, tensor.settings)
        start = self._state if rule.scope == "tree" else rule.start(tensor.size, len(models), tensor.settings)
        program = _merge_program(rule, static, str(tensor.dtype))
        result, finite = program(
            models, base, np.asarray(tensor.weights, np.float32), start, self._key(tensor), numbers, factor
        )
        self._check(tensor, finite)
        return np.asarray(result)

    def _search(self) -> State:
        """The whole model's statistics, round by round."""
        rule = self.plan.rule
        merged = [t for t in self.plan.tensors if t.settings is not None]
        if not merged:
            return ()
        static, numbers = _split(rule, merged[0].settings or {})
        state = rule.start(sum(t.size for t in merged), len(self.plan.models), merged[0].settings or {})
        weights = np.asarray(merged[0].weights, np.float32)
        for place, round_ in enumerate(rule.rounds):
            program = _round_program(rule, place, static)
            until = round_.until
            while until is None or not until(state):
                total = None
                for tensor in merged:
                    base, models = self._read(tensor)
                    part, finite = program(models, base, weights, state, self._key(tensor), numbers)
                    self._check(tensor, finite)
                    total = part if total is None else jax.tree.map(jnp.add, total, part)
                state = round_.update(state, total, {**numbers, **dict(static)})
                if until is None:
                    break
        return state

    def _read(self, tensor: Tensor) -> tuple[np.ndarray, list[np.ndarray]]:
        base = self.plan.base.read(tensor.name)
        models = [] if tensor.settings is None else [model.read(tensor.name) for model in self.plan.models]
        if self.progress is not None:
            self.progress(base.nbytes + sum(x.nbytes for x in models))
        return base, models

    def _key(self, tensor: Tensor) -> Array | None:
        if not self.plan.rule.needs_key:
            return None
        return jax.random.fold_in(jax.random.key(self.plan.job.seed), zlib.crc32(tensor.name.encode()))

    def _check(self, tensor: Tensor, finite: Array) -> None:
        for model, good in zip(("the base", *(x.model for x in self.plan.job.inputs)), np.asarray(finite), strict=True):
            if not good:
                raise UserError(f"merge: tensor {tensor.name!r} of {model} holds NaN or Inf; leave that model out")


class _Rows:
    """Candidates as separate arrays where rules expect one [N, ...]: they only ever take one row at a time, and
    stacking would copy all of them."""

    def __init__(self, rows: Sequence[Float32[Array, "..."]]) -> None:
        self.rows = rows
        self.shape = (len(rows), *rows[0].shape)
        self.ndim = rows[0].ndim + 1
        self.size = math.prod(self.shape)
        self.dtype = rows[0].dtype

    def __getitem__(self, i: int) -> Float32[Array, "..."]:
        return self.rows[i]


def _rows(models: Sequence[Float[Array, "..."]], base: Float[Array, "..."]) -> tuple[Any, Array]:
    """The deltas in float32, and which of base and models are finite."""
    whole = base.astype(jnp.float32)
    finite = jnp.stack([jnp.isfinite(x).all() for x in (base, *models)])
    return _Rows([x.astype(jnp.float32) - whole for x in models]), finite


@functools.lru_cache(maxsize=64)
def _merge_program(rule: Rule, static: tuple[tuple[str, Any], ...], dtype: str) -> Any:
    def program(
        models: list, base: Array, weights: Array, start: State, key: Array | None, numbers: dict, factor: Array
    ) -> tuple[Array, Array]:
        deltas, finite = _rows(models, base)
        settings = {**numbers, **dict(static)}
        if rule.scope == "tree":
            draws = engine.draws_of(key, None)
            delta = rule.combine(deltas, weights, start, draws, base, settings)
        else:
            (delta,) = engine.run(rule, [deltas], weights, [start], [key], [base], settings)
        return (base.astype(jnp.float32) + factor * delta).astype(dtype), finite

    return jax.jit(program)


@functools.lru_cache(maxsize=64)
def _round_program(rule: Rule, place: int, static: tuple[tuple[str, Any], ...]) -> Any:
    def program(
        models: list, base: Array, weights: Array, state: State, key: Array | None, numbers: dict
    ) -> tuple[Any, Array]:
        deltas, finite = _rows(models, base)
        settings: Settings = {**numbers, **dict(static)}
        draws = engine.draws_of(key, None)
        return rule.rounds[place].statistics(deltas, weights, state, draws, base, settings), finite

    return jax.jit(program)


def _split(rule: Rule, settings: dict[str, Any]) -> tuple[tuple[tuple[str, Any], ...], dict[str, Any]]:
    """Flags and choices, and numbers as float32."""
    static = tuple((p.name, settings[p.name]) for p in rule.hyperparameters if p.static)
    return static, {p.name: np.asarray(settings[p.name], np.float32) for p in rule.hyperparameters if not p.static}


def _settings(
    job: Job, method: MergeMethod, rule: Rule, name: str, depth: float
) -> tuple[dict[str, Any], tuple[float, ...]]:
    """The rule's hyperparameters and the candidates' weights for one tensor."""
    known = {p.name: p for p in rule.hyperparameters}
    given = settings_at(job, [*known, "weight"], name, depth)
    weights = given.pop("weight", None)
    values = {}
    for key, each in given.items():
        if any(value is None for value in each):
            lacking = job.inputs[each.index(None)].model
            raise UserError(f"merge: tensor {name!r}: nothing gives {key} for {lacking}")
        if all(value == each[0] for value in each):
            values[key] = each[0]
        elif known[key].per_candidate:
            values[key] = tuple(each)
        else:
            raise UserError(f"merge: {key} of {method.name} must be the same for all models, not {each}")
        if known[key].static and not known[key].choices and values[key] in (0, 1):
            values[key] = bool(values[key])  # YAML's 0 and 1
    try:
        settings = check_hyperparameters(method, rule, values)
        check_each(method, rule, settings, len(job.inputs))
    except UserError as error:
        raise UserError(f"{error} (tensor {name!r})") from None
    count = len(job.inputs)
    if weights is None:
        return settings, (1.0 / count if rule.default_weight == "mean" else 1.0,) * count
    if any(isinstance(w, (bool, str)) or w is None or not math.isfinite(w) for w in weights):
        raise UserError(f"merge: tensor {name!r}: weights {weights} must be one finite number per model")
    problem = rule.check_weights(np.asarray(weights, np.float32), settings)
    if problem:
        raise UserError(f"merge: tensor {name!r}: weights {weights} do not suit {method.name}: {problem}")
    return settings, tuple(float(w) for w in weights)


def _on_models(job: Job, rule: Rule) -> bool:
    """Whether the method is one on whole models, under these settings."""
    origin = job.settings.get("origin", job.defaults.get("origin"))
    default = next((p.default for p in rule.hyperparameters if p.name == "origin"), None)
    return rule.needs_base is True or (origin or default) == "zero"


def _check_names(base: Checkpoint, model: Checkpoint) -> None:
    for name in sorted(set(base.files) ^ set(model.files)):
        here, there = (base, model) if name in base.files else (model, base)
        raise UserError(f"merge: tensor {name!r} is in {here.folder} and not in {there.folder}; merge like models")
    for name in base.files:
        if base.shape(name) != model.shape(name):
            raise UserError(f"merge: tensor {name!r} is {list(base.shape(name))} in {base.folder} and "
                            f"{list(model.shape(name))} in {model.folder}")  # fmt: skip


def _check_architecture(folders: Sequence[Path]) -> None:
    kinds = [read_json(folder / "config.json").get("model_type") for folder in folders]
    for folder, kind in zip(folders, kinds, strict=True):
        if kind != kinds[0]:
            raise UserError(f"merge: {folder} is a {kind} and {folders[0]} a {kinds[0]}; merge like models")
