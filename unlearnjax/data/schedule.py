"""Which rows each candidate sees at each step: one global schedule of length buckets, planned on the host.

All candidates run in lockstep through one compiled program per width, so a step's width is shared. Rows are cut into
buckets of like length; each candidate's seed permutes the rows inside a bucket, and the order of the steps is drawn
once for all. Micro-batch size and accumulation are per candidate: a step holds one or more whole micro-batches of each
candidate, told apart by micro-batch ids, and each candidate updates when its own accumulation is full.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unlearnjax.data.buckets import choose_widths, fit, round_up
from unlearnjax.data.tokens import Tokens
from unlearnjax.errors import UserError


class Pace(NamedTuple):
    """One candidate's rhythm: rows per micro-batch, micro-batches per update, epochs, and the seed of its order."""

    micro_batch: int
    accumulation: int
    epochs: int
    seed: int


class Step(NamedTuple):
    """One compiled step for all N candidates. Rows are indices, -1 where a slot is empty."""

    width: int  # tokens per row
    answers: int  # answer tokens per row
    rows: dict[str, np.ndarray]  # side -> int32 [N, R]
    micro: np.ndarray  # int32 [N, R]
    micro_weight: np.ndarray  # float32 [N, R]: what each micro-batch's loss counts in its update; they sum to 1
    update: np.ndarray  # bool [N]: the candidate's accumulation is full after this step
    epoch: int
    share: np.ndarray | None = None  # float32 [N], of the learning rate in its update; None: all of it
    restart: np.ndarray | None = None  # bool [N]: after its update the optimizer is as new; None: never
    epochs: np.ndarray | None = None  # int32 [N], where candidates are not all in the same epoch


class Schedule(NamedTuple):
    """The whole run. `updates` is per candidate; `padding_share` counts padding over tokens of slots that hold a row,
    `idle_share` the slots that hold none (candidates whose micro-batches don't share a common step, or that ended)."""

    steps: list[Step]
    updates: np.ndarray
    padding_share: float
    idle_share: float


def rows_per_step(paces: Sequence[Pace], most: int = 8) -> list[int]:
    """Rows of each candidate in a step: whole micro-batches that divide an update, the same for all if possible."""
    per_update = [p.micro_batch * p.accumulation for p in paces]
    common = math.gcd(*per_update)
    fits = [d for d in range(1, common + 1) if common % d == 0 and all(d % p.micro_batch == 0 for p in paces)]
    if fits:
        small = [d for d in fits if d <= most]
        return [max(small) if small else min(fits)] * len(paces)
    target = max(p.micro_batch for p in paces)
    return [
        p.micro_batch
        * max(d for d in range(1, p.accumulation + 1) if p.accumulation % d == 0 and d * p.micro_batch <= target)
        for p in paces
    ]


def _epoch_slots(
    primary: np.ndarray, other: np.ndarray | None = None, *, epoch: int, seed: int, bucketed: bool
) -> list[np.ndarray]:
    """This epoch's rows by slot, the primary side first: sorted by length when bucketed (ties in a drawn order).

    The other side gives as many rows as the primary has; a longer one is walked through, epoch after epoch, so that
    every row is seen.
    """
    rng = np.random.default_rng([seed, epoch, 1])
    n = len(primary)
    chosen = [np.arange(n)]
    if other is not None:
        order = np.random.default_rng([seed, 2]).permutation(len(other)) if bucketed else np.arange(len(other))
        first = epoch * n if bucketed else 0
        chosen.append(order[(first + np.arange(n)) % len(other)])
    if not bucketed:
        return chosen
    out = []
    for rows, lengths in zip(chosen, [primary, other]):
        assert lengths is not None
        rows = rng.permutation(rows)
        out.append(rows[np.argsort(lengths[rows], kind="stable")])
    return out


def _longest(lengths: dict[str, np.ndarray], chunk: int, epoch: int, seed: int) -> tuple[list[np.ndarray], list[int]]:
    """An epoch's bucketed slots, and the longest row of each chunk of them."""
    slots = _epoch_slots(*lengths.values(), epoch=epoch, seed=seed, bucketed=True)
    begins = range(0, len(slots[0]), chunk)
    return slots, [max(int(n[s[b : b + chunk]].max()) for s, n in zip(slots, lengths.values())) for b in begins]


def plan(
    sides: dict[str, Tokens], paces: Sequence[Pace], *, buckets: int = 8, order: str = "bucketed", seed: int = 0
) -> Schedule:
    """Plan a run.

    Args:
      sides: token rows by side; the first side is the primary one, whose rows make an epoch. Beside `forget` a side
        `idk` holds other answers to the same prompts, and each step has the same rows of both.
      paces: one per candidate.
      buckets: how many widths (programs) at most.
      order: `bucketed`, or `published`: each candidate's own permutation of (forget[i], retain[i mod rows]) pairs,
        whose lengths are left to chance, so its padding is large; and training ends, as in the published code, after
        epochs x rows / (micro_batch x accumulation) updates, rounded down.
      seed: of what is shared by all candidates (bucket order, which rows of the other side).
    """
    if order not in ("bucketed", "published"):
        raise UserError(f"training: unknown order {order!r}; valid: bucketed, published")
    if {"forget", "idk"} <= sides.keys():
        return _plan_pairs(sides, paces, buckets, order, seed)
    lengths = {name: tokens.length for name, tokens in sides.items()}
    per_step = rows_per_step(paces)
    chunk = math.lcm(*per_step)
    together = np.concatenate(list(lengths.values()))
    widest = together
    if order == "bucketed":
        longest = [_longest(lengths, chunk, epoch, seed)[1] for epoch in range(max(p.epochs for p in paces))]
        widest = np.concatenate([*longest, together.max()[None]])
    widths = choose_widths(widest, buckets)
    answered = np.concatenate([tokens.answer_length for tokens in sides.values()])
    # A width's answers have room for those of every row that can come under it, so that a width is one program.
    answers = {width: min(round_up(int(answered[together <= width].max()), 8), width) for width in widths}
    steps: list[Step] = []
    for epoch in range(max(p.epochs for p in paces)):
        steps += _plan_epoch(lengths, paces, per_step, chunk, answers, order == "bucketed", seed, epoch)
    if order == "published":
        steps = _end_early(steps, paces, len(next(iter(lengths.values()))))
    steps, updates = _mark_updates(steps, paces, per_step)
    return Schedule(steps, updates, *waste(sides, steps))


def _plan_pairs(sides: dict[str, Tokens], paces: Sequence[Pace], buckets: int, order: str, seed: int) -> Schedule:
    """Plan for rows as long as the longer of the two answers makes them, and take each for both sides."""
    forget = sides["forget"]
    longer = forget._replace(length=np.maximum(forget.length, sides["idk"].length))
    alone = {name: longer if name == "forget" else tokens for name, tokens in sides.items() if name != "idk"}
    planned = plan(alone, paces, buckets=buckets, order=order, seed=seed)
    steps = [s._replace(rows={name: s.rows["forget" if name == "idk" else name] for name in sides})
             for s in planned.steps]  # fmt: skip
    return Schedule(steps, planned.updates, *waste(sides, steps))


def _plan_epoch(
    lengths: dict[str, np.ndarray],
    paces: Sequence[Pace],
    per_step: list[int],
    chunk: int,
    answers: dict[int, int],
    bucketed: bool,
    seed: int,
    epoch: int,
) -> list[Step]:
    widths = sorted(answers)
    if bucketed:
        slots, longest = _longest(lengths, chunk, epoch, seed)
        groups = [fit(x, widths) for x in longest]
    else:
        slots = _epoch_slots(*lengths.values(), epoch=epoch, seed=seed, bucketed=False)
        groups = [widths[-1]] * -(-len(slots[0]) // chunk)
    n = len(slots[0])
    begins = np.arange(0, n, chunk)
    # own[i][side]: candidate i's rows by slot, permuted inside each stretch of chunks of equal width.
    own = []
    for pace in paces:
        rng = np.random.default_rng([pace.seed, epoch, 3])
        mine = [s.copy() for s in slots]
        for width in sorted(set(groups)):
            inside = [k for k, g in enumerate(groups) if g == width]
            low, high = int(begins[inside[0]]), min(int(begins[inside[-1]]) + chunk, n)
            together = rng.permutation(high - low)
            for j, side in enumerate(mine):
                # The published order keeps pairs together; bucketed sides are permuted apart.
                side[low:high] = side[low:high][together if j == 0 or not bucketed else rng.permutation(high - low)]
        own.append(mine)
    order = np.random.default_rng([seed, epoch, 4]).permutation(len(begins)) if bucketed else np.arange(len(begins))
    if n % chunk:
        # The one chunk that is not full ends the epoch: in its middle it would leave accumulations out of step.
        order = np.append(order[order != len(begins) - 1], len(begins) - 1)
    steps = []
    most = max(per_step)
    for k in order:
        for part in range(max(chunk // r for r in per_step)):
            rows = {name: np.full((len(paces), most), -1, np.int32) for name in lengths}
            micro = np.zeros((len(paces), most), np.int32)
            for i, (pace, r) in enumerate(zip(paces, per_step)):
                low = int(begins[k]) + part * r
                high = min(low + r, int(begins[k]) + chunk, n)
                if part >= chunk // r or high <= low or epoch >= pace.epochs:
                    continue
                for j, name in enumerate(lengths):
                    rows[name][i, : high - low] = own[i][j][low:high]
                micro[i, : high - low] = np.arange(high - low) // pace.micro_batch
            if all((x < 0).all() for x in rows.values()):
                continue
            width = groups[k]
            if not bucketed:
                width = fit(max(int(n[rows[m][rows[m] >= 0]].max()) for m, n in lengths.items()), widths)
            empty = np.zeros(0, np.float32)
            steps.append(Step(width, answers[width], rows, micro, empty, empty, epoch))
    return steps


def _end_early(steps: list[Step], paces: Sequence[Pace], rows: int) -> list[Step]:
    """Leave out what comes after the published code's last update."""
    for i, pace in enumerate(paces):
        left = max(1, pace.epochs * rows // (pace.micro_batch * pace.accumulation))
        micro, epoch = 0, 0
        for step in steps:
            held = next(iter(step.rows.values()))[i] >= 0
            if not held.any():
                continue
            if step.epoch != epoch and micro:
                left, micro = left - 1, 0  # an epoch's end is an update too
            epoch = step.epoch
            if left == 0:
                for row in step.rows.values():
                    row[i] = -1
                continue
            micro += int(step.micro[i][held].max()) + 1
            if micro >= pace.accumulation:
                left, micro = left - 1, 0
    return [s for s in steps if any((row >= 0).any() for row in s.rows.values())]


def _mark_updates(steps: list[Step], paces: Sequence[Pace], per_step: list[int]) -> tuple[list[Step], np.ndarray]:
    """Fill in `update` and `micro_weight`: an update ends when its accumulation is full, or with its epoch."""
    n = len(paces)
    most = max(per_step)
    present = np.stack([next(iter(s.rows.values())) >= 0 for s in steps])  # [S, N, R]
    micro = np.stack([s.micro for s in steps])
    count = np.where(present, micro + 1, 0).max(axis=2)  # micro-batches of each candidate in each step
    update = np.zeros((len(steps), n), bool)
    weight = np.zeros((len(steps), n, most), np.float32)
    epochs = np.asarray([s.epoch for s in steps])
    for i, pace in enumerate(paces):
        active = np.flatnonzero(count[:, i])
        pending: list[int] = []
        for position, s in enumerate(active):
            pending.append(int(s))
            last = position + 1 == len(active) or epochs[active[position + 1]] != epochs[s]
            total = int(count[pending, i].sum())
            if total >= pace.accumulation or last:
                update[s, i] = True
                for p in pending:
                    weight[p, i, : count[p, i]] = 1.0 / total
                pending = []
    done = [s._replace(update=update[k], micro_weight=weight[k]) for k, s in enumerate(steps)]
    return done, update.sum(axis=0)


def waste(sides: dict[str, Tokens], steps: Sequence[Step]) -> tuple[float, float]:
    """A schedule's `padding_share` and `idle_share`."""
    room = used = slots = held = 0
    for step in steps:
        for name, rows in step.rows.items():
            there = rows[rows >= 0]
            used += int(sides[name].length[there].sum())
            room += there.size * step.width
            held += there.size
            slots += rows.size
    return 1 - used / max(room, 1), 1 - held / max(slots, 1)


def programs(schedule: Schedule) -> list[tuple[int, int]]:
    """The distinct programs of a schedule: (width, answers)."""
    return sorted({(s.width, s.answers) for s in schedule.steps})
