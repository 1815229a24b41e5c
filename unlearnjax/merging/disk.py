"""Merging model folders tensor by tensor: no model is ever in memory, whatever its size.

Tensors are read, merged and written in pieces (`pieces`), all three at the same time: a method without thresholds holds
a few pieces of each model, one with thresholds of its own for each tensor the deltas of that tensor. Methods whose
thresholds are the whole model's (scope "tree") go through all tensors once for each round before that. Where a method
needs a tensor whole (ranks along a row, angles of rows), its only piece is the tensor.
"""

import functools
import itertools
import math
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from unlearnjax_kernels.threshold import passes
from unlearnjax_kernels.threshold.host import KEPT, threads

from unlearnjax.errors import UserError, check_known
from unlearnjax.io.atomic import staged_file
from unlearnjax.io.huggingface import check_dtype, read_json, resolve
from unlearnjax.io.safetensors import Checkpoint, Entry, is_whole, open_folder, shards, write_sharded
from unlearnjax.merging import host, pieces
from unlearnjax.merging.api import check_count, check_each, check_hyperparameters, find_rule
from unlearnjax.merging.job import Job, depths, settings_at
from unlearnjax.merging.pieces import Piece, piece_size
from unlearnjax.merging.protocol import MergeMethod, Rule, State

STATISTICS = "statistics.npz"  # beside the files being written: what a long search has found
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
        quick = jax.default_backend() == "cpu"  # and a part of a pass, for a sample
        each = [
            1 if r.until is None or (quick and r.at_once) else SEARCH_PASSES * (1 if r.before is None else 2)
            for r in rounds
        ]
        return 1 + sum(each)

    @property
    def bytes_read(self) -> int:
        """In one pass."""
        return self.bytes_of(self.tensors)

    def bytes_of(self, tensors: Iterable[Tensor]) -> int:
        """What is read of these tensors in one pass."""
        sources = [self.base, *self.models]
        return sum(
            math.prod(t.shape)
            * sum(s.dtype(t.name).itemsize for s in (sources if t.settings is not None else sources[:1]))
            for t in tensors
        )

    @property
    def bytes_written(self) -> int:
        return sum(t.size * t.dtype.itemsize for t in self.tensors)

    @property
    def memory(self) -> int:
        """About the memory for tensors, counted in float32: the pieces that are read ahead and merged; the deltas and
        the base of the largest tensor, where its thresholds are its own, and what the search for them takes; and all
        inputs, their deltas, the result and what is being written, where the method needs whole tensors."""
        largest = max((t.size for t in self.tensors), default=0)
        count = len(self.models) + 1
        kept = max((t.size for t in self.tensors if t.settings is None), default=0)
        if not self.rule.properties.elementwise:
            return largest * 4 * (3 * count + 1)
        moving = piece_size(largest) * 4 * count * (pieces.AHEAD + 5)
        held = kept * 4 * (pieces.AHEAD + 1)
        if not self.rule.rounds:
            return moving + held
        searched = largest if self.rule.scope == "leaf" else sum(t.size for t in self.tensors)
        small = searched <= KEPT and self.rule.scope == "leaf"
        search = 4 * searched * min(count - 1, threads()) if small else passes.memory(searched, count - 1)
        own = largest * 4 * count if self.rule.scope == "leaf" else 0
        return moving + max(own, held) + (search if self.rule.rounds[0].at_once is not None else 0)


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
            each = ", ".join(f"{source.dtype(name)} in {source.folder}" for source in (base, *models))
            raise UserError(f"merge: tensor {name!r} is {each}; convert them to one of {', '.join(FLOATS)} first")
        dtype = wanted if wanted is not None and floating else base.dtype(name)
        own: Tensor = Tensor(name, base.shape(name), dtype, None)
        if floating:  # integer buffers are never merged
            settings, weights = _settings(job, method, rule, name, at[name])
            own = own._replace(settings=settings, weights=weights)
            if settings.get("exact_k", False) and own.size >= 2**32:
                raise UserError(f"merge: tensor {name!r} has 2**32 entries or more, too many for exact_k; leave it out")
        tensors.append(own)
    if rule.scope == "tree":
        distinct = {(tuple(sorted(t.settings.items())), t.weights) for t in tensors if t.settings is not None}
        if len(distinct) > 1:
            raise UserError(f"merge: the thresholds of {method.name} ({rule.semantics}) are the whole model's; give no "
                            "settings that differ by tensor")  # fmt: skip
    return Plan(job, method, rule, base, tuple(models), tuple(tensors))


def written_files(folder: Path, found: Plan, max_shard_bytes: int) -> list[str]:
    """The names of the result's files that `folder` holds already, whole."""
    files = shards([Entry(t.name, t.shape, t.dtype, None) for t in found.tensors], max_shard_bytes)
    return [name for name, entries in files.items() if is_whole(folder / name, entries)]


def merge_to(
    folder: Path, found: Plan, *, max_shard_bytes: int = 5_000_000_000, progress: Callable[[int], object] | None = None
) -> None:
    """Merge into safetensors files in `folder` (stage it: it is not whole until this returns). Files and statistics
    that an earlier call with this plan left there are kept.

    Args:
      progress: called with the number of bytes read, piece by piece; for what is kept, with what it would have read.
        `folder` keeps the statistics, as STATISTICS: remove them when everything else is there.

    Raises:
      UserError: NaN or Inf in a tensor of a model, which is named.
    """
    files = shards([Entry(t.name, t.shape, t.dtype, None) for t in found.tensors], max_shard_bytes)
    written = written_files(folder, found, max_shard_bytes)
    kept = {entry.name for name in written for entry in files[name]}
    with ThreadPoolExecutor(1) as reader:
        merger = Merger(found, reader, progress)
        if any(t.settings is not None and t.name not in kept for t in found.tensors):
            merger.settle(folder / STATISTICS)
        if progress is not None and kept:
            progress(found.bytes_of(t for t in found.tensors if t.name in kept))
        values = merger.values([t for t in found.tensors if t.name not in kept])
        entries = [Entry(t.name, t.shape, t.dtype, lambda: next(values)) for t in found.tensors]
        write_sharded(folder, entries, max_shard_bytes, written=written)


class Merger:
    """Merges a plan's tensors in their order; for a rule of scope "tree", `settle` first goes through all of them."""

    def __init__(
        self, found: Plan, reader: ThreadPoolExecutor, progress: Callable[[int], object] | None = None
    ) -> None:
        self.plan, self.reader, self.progress = found, reader, progress
        self.count = len(found.models)
        self.piece = piece_size(max((t.size for t in found.tensors), default=0))
        self.in_pieces = found.rule.properties.elementwise
        self._state: State | None = None

    def settle(self, path: Path) -> None:
        """Find the whole model's statistics, where the rule has such. They are kept in the file `path`, and read from
        it if it is there."""
        if self.plan.rule.scope != "tree":
            return
        self._state = self._read_state(path)
        if self._state is not None:
            if self.progress is not None:
                self.progress(self.plan.bytes_read * (self.plan.passes - 1))
            return
        self._state = self._search()
        with staged_file(path) as place, place.open("wb") as file:
            np.savez(file, *map(np.asarray, jax.tree.leaves(self._state)))

    def values(self, tensors: Sequence[Tensor]) -> Iterator[np.ndarray | Iterator[np.ndarray]]:
        """These tensors in their dtypes: merged ones as flat pieces, the base's own whole."""
        reads = self._reads(tensors)
        for tensor in tensors:
            if tensor.settings is None:
                yield next(reads)
            else:
                yield self._pieces(tensor, itertools.islice(reads, self._number(tensor)))

    def _pieces(self, tensor: Tensor, reads: Iterator[Piece]) -> Iterator[np.ndarray]:
        """The next piece is being computed while the caller writes one."""
        pending: tuple[Array, Array | None, int] | None = None
        for following in itertools.chain(self._results(tensor, reads), [None]):
            if pending is not None:
                result, finite, size = pending
                if finite is not None:
                    self._check(tensor, finite)
                yield np.asarray(result).reshape(-1)[:size]
            pending = following

    def _results(self, tensor: Tensor, reads: Iterator[Piece]) -> Iterator[tuple[Array, Array | None, int]]:
        """(entries, which models are finite if that is still to be checked, how many entries are no filling)"""
        rule, job = self.plan.rule, self._job(tensor)
        if not rule.rounds or rule.scope == "tree":
            state = self._state if rule.scope == "tree" else rule.start(tensor.size, self.count, tensor.settings or {})
            for piece in reads:
                yield *pieces.merged(job, piece, state), piece.size
            return
        held, finites = [], []
        for piece in reads:
            deltas, finite = pieces.deltas_of(piece)
            held.append((deltas, piece._replace(base=jnp.asarray(piece.base), models=[])))
            finites.append(finite)
        for finite in finites:
            self._check(tensor, finite)
        start = rule.start(tensor.size, self.count, tensor.settings or {})
        if jax.default_backend() == "cpu" and rule.rounds[0].at_once is not None and held:
            leaves = [np.asarray(deltas).reshape(self.count, -1)[:, : piece.size] for deltas, piece in held]
            start = host.at_once(rule, leaves, start, tensor.settings or {})
        state = self._rounds(job, start, lambda: ((job, *pair) for pair in held))
        for deltas, piece in held:
            yield pieces.combined(job, deltas, piece, state), None, piece.size

    def _rounds(
        self, job: pieces.Job, state: State, data: Callable[[], Iterable[tuple[pieces.Job, Array, Piece]]]
    ) -> State:
        def through(state: State, place: int, before: bool) -> tuple[State, Bool[Array, ""] | None]:
            total = None
            for own, deltas, piece in data():
                total = pieces.partials(own, place, before, deltas, piece, state, total)
            return pieces.update(job, place, before, state, total)

        for place, round_ in enumerate(self.plan.rule.rounds):
            if round_.settled(state):
                continue
            finished = round_.until is not None and pieces.finished(job, place, state)
            while not finished:
                if round_.before is not None:
                    state, _ = through(state, place, True)
                state, done = through(state, place, False)
                finished = done is None or bool(done)
        return state

    def _start(self) -> tuple[list[Tensor], State]:
        """The tensors that the whole model's statistics are of, and those before the first round."""
        tensors = [t for t in self.plan.tensors if t.settings is not None and t.size]
        if not tensors:
            return [], ()
        return tensors, self.plan.rule.start(sum(t.size for t in tensors), self.count, tensors[0].settings or {})

    def _read_state(self, path: Path) -> State | None:
        """None where there is none, or the file is damaged."""
        try:
            with path.open("rb") as file, np.load(file) as found:
                leaves = [found[name] for name in found.files]
            return jax.tree.unflatten(jax.tree.structure(self._start()[1]), leaves)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
            return None

    def _search(self) -> State:
        """The whole model's statistics, round by round."""
        tensors, start = self._start()
        if not tensors:
            return ()
        jobs = [self._job(t) for t in tensors]
        checked = False

        def data() -> Iterator[tuple[pieces.Job, Array, Piece]]:
            nonlocal checked
            reads = self._reads(tensors)
            for tensor, job in zip(tensors, jobs, strict=True):
                finites = []
                for piece in itertools.islice(reads, self._number(tensor)):
                    deltas, finite = pieces.deltas_of(piece)
                    finites.append(finite)
                    yield job, deltas, piece
                for finite in [] if checked else finites:
                    self._check(tensor, finite)
            checked = True

        def arrays(one_in: int) -> Iterator[np.ndarray]:
            reads = self._reads(tensors, one_in)
            for tensor in tensors:
                for part in itertools.islice(reads, self._number(tensor)):
                    deltas, finite = pieces.deltas_of(part)
                    if one_in == 1:
                        self._check(tensor, finite)
                    yield np.asarray(deltas)[:, : part.size]

        if jax.default_backend() == "cpu":
            start = host.at_once(self.plan.rule, arrays, start, tensors[0].settings or {})
        return self._rounds(jobs[0], start, data)

    def _job(self, tensor: Tensor) -> pieces.Job:
        rule = self.plan.rule
        static, numbers = _split(rule, tensor.settings or {})
        key = self._key(tensor) if rule.needs_key else None
        # On the device once, not for each of many calls.
        weights, factor, numbers = jax.device_put(
            (np.asarray(tensor.weights, np.float32), np.float32(self.plan.job.factor), numbers)
        )
        return pieces.Job(rule, static, numbers, weights, key, factor, str(tensor.dtype))

    def _reads(self, tensors: Sequence[Tensor], one_in: int = 1) -> Iterator[Any]:
        """For each tensor its pieces, or of each the beginning, one in so many of its entries; or its base, where it is
        not merged. Read ahead."""
        room = max(self.piece // one_in, 1)

        def tasks() -> Iterator[Callable[[], Any]]:
            for tensor in tensors:
                if tensor.settings is None:
                    yield functools.partial(self._base, tensor)
                elif not self.in_pieces:
                    yield functools.partial(self._whole, tensor)
                else:
                    for start, stop in pieces.cut(tensor.size, self.piece):
                        yield functools.partial(self._piece, tensor, start, min(stop, start + room), room, one_in == 1)

        return pieces.ahead(self.reader, tasks(), pieces.AHEAD if self.in_pieces else 1)

    def _base(self, tensor: Tensor) -> np.ndarray:
        return self._all_of(self.plan.base, tensor)

    def _whole(self, tensor: Tensor) -> Piece:
        models = [self._all_of(model, tensor) for model in self.plan.models]
        return Piece(None, tensor.size, self._base(tensor), models)

    def _all_of(self, source: Checkpoint, tensor: Tensor) -> np.ndarray:
        out = np.empty(tensor.size, source.dtype(tensor.name))
        source.read_into(out, tensor.name)
        return self._count(out.reshape(tensor.shape))

    def _number(self, tensor: Tensor) -> int:
        """How many pieces it has."""
        return -(-tensor.size // self.piece) if self.in_pieces else 1

    def _piece(self, tensor: Tensor, start: int, stop: int, room: int, whole: bool) -> Piece:
        counted = stop - start if whole else 0  # a sample is not part of the total
        base, *models = (
            self._count(pieces.filled(source, tensor.name, start, stop, room), counted)
            for source in (self.plan.base, *self.plan.models)
        )
        return Piece(start, stop - start, base, models)

    def _count(self, x: np.ndarray, entries: int | None = None) -> np.ndarray:
        if self.progress is not None:
            self.progress(x.itemsize * (x.size if entries is None else entries))
        return x

    def _key(self, tensor: Tensor) -> Array:
        return jax.random.fold_in(jax.random.key(self.plan.job.seed), zlib.crc32(tensor.name.encode()))

    def _check(self, tensor: Tensor, finite: Array) -> None:
        for model, good in zip(("the base", *(x.model for x in self.plan.job.inputs)), np.asarray(finite), strict=True):
            if not good:
                raise UserError(f"merge: tensor {tensor.name!r} of {model} holds NaN or Inf; leave that model out")


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
