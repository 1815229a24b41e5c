"""Merging tensors of any size in pieces of one size, so that a handful of programs serve a whole model.

A rule whose entries meet only in sums over a tensor (`Properties.elementwise`) may have its tensors cut. Every tensor
is read as flat pieces, the last one filled up with zeros: they add nothing to any statistic, and what becomes of them
is cut off. Compiling for each shape instead would take longer than merging.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32
from unlearnjax_kernels.dare.api import Part

from unlearnjax.io.safetensors import Checkpoint
from unlearnjax.merging import engine
from unlearnjax.merging.protocol import Draws, Round, Rule, State

PIECE = 1 << 18  # entries: a piece of several models in float32 stays in a CPU's cache
AHEAD = 4  # pieces that are read while another is merged
Static = tuple[tuple[str, Any], ...]


class Job(NamedTuple):
    """What all pieces of a tensor are merged with."""

    rule: Rule
    static: Static
    """Flags and choices; numbers are traced."""
    numbers: dict[str, Array]
    weights: Float32[Array, "N"]
    key: Array | None
    factor: Float32[Array, ""]
    dtype: str
    """Of the result."""


class Piece(NamedTuple):
    """Some entries of one tensor, flat and filled up: [piece] each; or all of it in its shape."""

    start: int | None
    """The place of the first entry; None: it is the whole tensor."""
    size: int
    """Entries that are not filling."""
    base: np.ndarray | Array
    models: list[np.ndarray]


def piece_size(largest: int) -> int:
    """The size for tensors of at most this many entries."""
    return min(PIECE, 1 << max(largest - 1, 0).bit_length())


def cut(size: int, piece: int) -> Iterator[tuple[int, int]]:
    """Where the pieces of a tensor begin and end."""
    return ((start, min(start + piece, size)) for start in range(0, size, piece))


def filled(source: Checkpoint, name: str, start: int, stop: int, piece: int) -> np.ndarray:
    """Some of a tensor's entries, read from its file, with zeros after them."""
    out = np.empty(piece, source.dtype(name))
    source.read_into(out[: stop - start], name, start)
    out[stop - start :] = 0
    return out


def ahead(worker: ThreadPoolExecutor, tasks: Iterable[Callable[[], Any]], depth: int = 1) -> Iterator[Any]:
    """The tasks' results in order; the next `depth` are under way while the caller is busy with one."""
    pending: list[Future[Any]] = []
    for task in tasks:
        pending.append(worker.submit(task))
        if len(pending) > depth:
            yield pending.pop(0).result()
    while pending:
        yield pending.pop(0).result()


def deltas_of(piece: Piece) -> tuple[Float32[Array, "N ..."], Bool[Array, "N+1"]]:
    """The piece's deltas, and which of base and models are finite in it."""
    return _deltas(piece.base, piece.models)


def partials(job: Job, place: int, before: bool, deltas: Array, piece: Piece, state: State, total: Any) -> Any:
    """The statistics of round `place`, or of the one before its passes, added to `total` (None: nothing yet)."""
    program = _statistics(job.rule, place, before, job.static)
    return program(total, deltas, job.weights, state, job.key, _start(piece), piece.base, job.numbers)


def update(job: Job, place: int, before: bool, state: State, found: Any) -> tuple[State, Bool[Array, ""] | None]:
    """The state after a pass whose statistics have been added up, and whether the round then needs no more (None: it
    is a single pass)."""
    return _update(job.rule, place, before, job.static)(state, found, job.numbers)


def finished(job: Job, place: int, state: State) -> bool:
    """Whether round `place` needs no more passes."""
    return bool(_until(job.rule, place)(state))


def combined(job: Job, deltas: Array, piece: Piece, state: State) -> Array:
    """The merged entries, filling included, in the result's dtype."""
    program = _combine(job.rule, job.static, job.dtype)
    return program(deltas, job.weights, state, job.key, _start(piece), piece.base, job.numbers, job.factor)


def merged(job: Job, piece: Piece, state: State) -> tuple[Array, Array]:
    """`combined` from the piece itself, in one program; and which of base and models are finite in it."""
    program = _whole(job.rule, job.static, job.dtype)
    return program(piece.models, job.weights, state, job.key, _start(piece), piece.base, job.numbers, job.factor)


def _formed(base: Array, models: Sequence[Array]) -> tuple[Float32[Array, "N ..."], Array]:
    wide = [engine.widened(x) for x in (base, *models)]
    finite = jnp.stack([jnp.isfinite(x).all() for x in wide])
    return jnp.stack([x - wide[0] for x in wide[1:]]), finite


@jax.jit
def _deltas(base: Array, models: list[Array]) -> tuple[Float32[Array, "N ..."], Array]:
    return _formed(base, models)


def _start(piece: Piece) -> np.uint32 | None:
    return None if piece.start is None else np.uint32(piece.start % 2**32)  # places count modulo 2**32


def _draws(key: Array | None, start: Array | None) -> Draws:
    return Draws.of(key, None if start is None else Part((2**32,), (start,)))


def _round(rule: Rule, place: int, before: bool) -> Round:
    found = rule.rounds[place].before if before else rule.rounds[place]
    assert found is not None
    return found


@functools.lru_cache(maxsize=64)
def _statistics(rule: Rule, place: int, before: bool, static: Static) -> Any:
    def program(
        total: Any, deltas: Array, weights: Array, state: State, key: Array | None, start: Array | None, base: Array,
        numbers: dict,
    ) -> Any:  # fmt: skip
        settings = {**numbers, **dict(static)}
        found = _round(rule, place, before).statistics(deltas, weights, state, _draws(key, start), base, settings)
        return found if total is None else jax.tree.map(jnp.add, total, found)

    return jax.jit(program)


@functools.lru_cache(maxsize=64)
def _update(rule: Rule, place: int, before: bool, static: Static) -> Any:
    own = _round(rule, place, before)

    def program(state: State, found: Any, numbers: dict) -> tuple[State, Bool[Array, ""] | None]:
        state = own.update(state, found, {**numbers, **dict(static)})
        return state, None if own.until is None else own.until(state)

    return jax.jit(program)


@functools.lru_cache(maxsize=64)
def _until(rule: Rule, place: int) -> Any:
    until = rule.rounds[place].until
    assert until is not None
    return jax.jit(until)


@functools.lru_cache(maxsize=64)
def _combine(rule: Rule, static: Static, dtype: str) -> Any:
    def program(
        deltas: Array, weights: Array, state: State, key: Array | None, start: Array | None, base: Array, numbers: dict,
        factor: Array,
    ) -> Array:  # fmt: skip
        return _result(rule, static, dtype, deltas, weights, state, key, start, base, numbers, factor)

    return jax.jit(program)


@functools.lru_cache(maxsize=64)
def _whole(rule: Rule, static: Static, dtype: str) -> Any:
    def program(
        models: list[Array], weights: Array, state: State, key: Array | None, start: Array | None, base: Array,
        numbers: dict, factor: Array,
    ) -> tuple[Array, Array]:  # fmt: skip
        deltas, finite = _formed(base, models)
        return _result(rule, static, dtype, deltas, weights, state, key, start, base, numbers, factor), finite

    return jax.jit(program)


def _result(
    rule: Rule, static: Static, dtype: str, deltas: Float32[Array, "N ..."], weights: Array, state: State,
    key: Array | None, start: Array | None, base: Float[Array, "..."], numbers: dict, factor: Array,
) -> Array:  # fmt: skip
    settings = {**numbers, **dict(static)}
    delta = rule.combine(deltas, weights, state, _draws(key, start), base, settings)
    return (base.astype(jnp.float32) + factor * delta).astype(dtype)
