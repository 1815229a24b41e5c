"""Fine-tuning many candidates of one image model, in groups that come out as they are finished."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree

from unlearnjax.data.labelled import Labelled
from unlearnjax.errors import UserError
from unlearnjax.models.vision.net import Subject
from unlearnjax.training.hyperparameters import index
from unlearnjax.training.images.settings import BATCH_NORM, MAPPINGS, OPTIMIZERS, ImageCandidate, check, stack
from unlearnjax.training.images.step import State, Task, Work, init_state, run_steps
from unlearnjax.training.interrupt import Interrupted, Stop

AHEAD = 8  # programs that may wait for the device

Order = Callable[[int, int], Int[np.ndarray, " rows"]]
"""A candidate's seed and the epoch, from 0 -> the rows of that epoch: as many in every one."""


class Tuned(NamedTuple):
    """One candidate after its last update, or where it diverged (`diverged_at` updates were taken until then)."""

    candidate: ImageCandidate
    trained: PyTree[np.ndarray]
    fixed: PyTree[np.ndarray]
    losses: list[float]
    diverged_at: int | None

    def delta(self, start: PyTree[Array]) -> PyTree[np.ndarray]:
        """Its task vector: what was added to the weights it started from, in float32."""
        return jax.tree.map(lambda after, before: after - np.asarray(before), self.trained, start)


class Mapping(NamedTuple):
    """How candidates and steps are compiled: `size` candidates a group, mapped by "vmap" or "unroll", `steps` updates a
    program."""

    size: int
    kind: str
    steps: int


def default_mapping(count: int) -> Mapping:
    """On accelerators all candidates at once and several updates a program; on a CPU candidates one after another and
    single updates, since convolutions are slow there under vmap and in loops (see benchmarks/image_training.py)."""
    if jax.default_backend() == "cpu":
        return Mapping(1, "unroll", 1)
    return Mapping(count, "vmap", 8)


def updates_of(candidate: ImageCandidate, rows: int, batch_size: int) -> int:
    """How many updates a candidate takes over so many rows."""
    return candidate.epochs * -(-rows // batch_size)


def shuffled(rows: int) -> Order:
    """All rows, every epoch in an order of its own."""
    return lambda seed, epoch: np.random.default_rng([seed, epoch]).permutation(rows)


def batches(candidate: ImageCandidate, order: Order, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows [batch], weights [batch]) of each update. The last batch of an epoch is filled with rows that count 0."""
    for epoch in range(candidate.epochs):
        found = order(candidate.seed, epoch)
        for start in range(0, found.size, batch_size):
            own = found[start : start + batch_size]
            filled = np.resize(found, batch_size - own.size) if own.size < batch_size else own[:0]
            weight = np.concatenate([np.ones(own.size), np.zeros(filled.size)])
            yield np.concatenate([own, filled]).astype(np.int32), weight.astype(np.float32)


def fine_tune(
    subject: Subject,
    data: Labelled,
    candidates: Sequence[ImageCandidate],
    *,
    optimizer: str = "sgd",
    batch_size: int = 256,
    batch_norm: str = "frozen",
    mapping: Mapping | None = None,
    masks: Sequence[PyTree[Array]] | None = None,
    order: Order | None = None,
    progress: bool = False,
    label: str = "fine-tuning",
    stop: Stop | None = None,
) -> Iterator[Tuned]:
    """Fine-tune every candidate from the subject's weights on all rows of `data`.

    Candidates come out group by group, so that what takes them one at a time (`merge_stream`) needs the memory of a
    group. A candidate is the same, up to rounding, alone and in any group.

    Args:
      optimizer: "sgd" (with momentum; torch's) or "adamw".
      batch_size: rows of an update; fewer where there are not as many.
      batch_norm: "frozen": BatchNorm uses the running statistics, which stay; "batch": each batch's own, and they move
        (by the last batch's filling too, where torch would take a smaller batch).
      mapping: see `default_mapping`.
      masks: one per candidate, like the trained weights, of zeros and ones: what is 0 there stays as it is.
      order: which rows make an epoch, and in which order; default: all, shuffled. `data` may so hold rows for every
        epoch apart, such as labels that are drawn anew.
      stop: looked at between two programs.

    Raises:
      UserError: when the first candidate is asked for: a setting out of range; no candidates or rows; labels that the
        model has no class for; not one mask for each candidate.
      Interrupted: `stop` asked for it.
    """
    _check(subject, data, candidates, optimizer, batch_size, batch_norm, mapping, masks)
    order = order or shuffled(int(data.labels.shape[0]))
    rows = order(candidates[0].seed, 0).size
    size = min(batch_size, rows)
    updates = [updates_of(c, rows, size) for c in candidates]
    chosen = mapping or default_mapping(len(candidates))
    settings = stack(candidates, updates)
    task = Task(
        subject.net, optimizer, batch_norm == "batch",
        any(c.flip or c.crop_padding or c.operations for c in candidates), any(c.crop_padding for c in candidates),
        max(c.operations for c in candidates), masks is not None, any(c.l1 for c in candidates), chosen.kind,
    )  # fmt: skip
    fresh = init_state(optimizer, subject.trained, subject.fixed.get("statistics", {}))
    bar = _bar(sum(updates), label, progress)
    with contextlib.closing(bar), stop.polling() if stop is not None else contextlib.nullcontext():
        for begin in range(0, len(candidates), chosen.size):
            places = list(range(begin, min(begin + chosen.size, len(candidates))))
            own = jax.tree.map(lambda x: x[np.asarray(places)], settings)  # noqa: B023
            mask = None
            if masks is not None:
                mask = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(masks[i] for i in places))
            # Copies, since the program writes over them.
            states = jax.tree.map(lambda x: jnp.stack([x] * len(places)), fresh)  # noqa: B023
            losses: list[Any] = []
            for work in _programs([candidates[i] for i in places], order, rows, size, chosen.steps):
                states, got = run_steps(task, data, subject.fixed, states, work, own, mask)
                losses.append(got)
                if len(losses) > AHEAD:
                    jax.block_until_ready(losses[-AHEAD])
                bar.update(int((np.asarray(work.weight).sum(axis=-1) > 0).sum()))
                if stop is not None and stop.signum:
                    raise Interrupted(stop.signum, f"after {begin} of {len(candidates)} candidates")
            taken = [candidates[i] for i in places], [updates[i] for i in places]
            yield from _finished(subject, *taken, states, losses)


def _programs(candidates: Sequence[ImageCandidate], order: Order, rows: int, size: int, steps: int) -> Iterator[Work]:
    """What each program of a group takes: [steps, N, batch]; nothing for those that have ended."""
    streams = [batches(c, order, size) for c in candidates]
    total = max(updates_of(c, rows, size) for c in candidates)
    idle = np.zeros(size, np.int32), np.zeros(size, np.float32)
    for begin in range(0, total, steps):
        filled = steps if total > steps else total
        found = [[next(stream, idle) for stream in streams] for _ in range(begin, begin + filled)]
        yield Work(*(jnp.asarray(np.array([[one[k] for one in row] for row in found])) for k in range(2)))


def _finished(
    subject: Subject, candidates: Sequence[ImageCandidate], updates: Sequence[int], states: State, losses: list[Any]
) -> Iterator[Tuned]:
    states = jax.device_get(states)
    history = np.concatenate(jax.device_get(losses))
    for i, candidate in enumerate(candidates):
        state: State = index(states, i)
        own = history[: updates[i], i]
        diverged = None if state.alive else int(state.updates)
        fixed = {name: state.statistics if name == "statistics" else x for name, x in subject.fixed.items()}
        yield Tuned(candidate, state.trained, fixed, own[: None if state.alive else diverged].tolist(), diverged)


def _check(
    subject: Subject, data: Labelled, candidates: Sequence[ImageCandidate], optimizer: str, batch_size: int,
    batch_norm: str, mapping: Mapping | None, masks: Sequence[PyTree[Array]] | None,
) -> None:  # fmt: skip
    if not candidates:
        raise UserError("fine_tune: there are no candidates")
    for candidate in candidates:
        check(candidate, "fine_tune")
    for name, value, known in (("optimizer", optimizer, OPTIMIZERS), ("batch_norm", batch_norm, BATCH_NORM),
                               ("mapping", mapping.kind if mapping else "vmap", MAPPINGS)):  # fmt: skip
        if value not in known:
            raise UserError(f"fine_tune: {name} is {value!r}; valid: {', '.join(known)}")
    if batch_size < 1 or (mapping is not None and (mapping.size < 1 or mapping.steps < 1)):
        raise UserError("fine_tune: batch_size, and a mapping's size and steps, must be 1 or more")
    if masks is not None and len(masks) != len(candidates):
        raise UserError(f"fine_tune: {len(masks)} masks for {len(candidates)} candidates; give one for each")
    if not data.labels.shape[0]:
        raise UserError("fine_tune: there are no rows to train on")
    for label in (int(data.labels.min()), int(data.labels.max())):
        if not 0 <= label < len(subject.labels):
            raise UserError(f"fine_tune: a label is {label}, and the model has {len(subject.labels)} classes")


def _bar(total: int, label: str, show: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=label, unit="candidate-step", disable=not show, dynamic_ncols=True)
