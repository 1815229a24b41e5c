"""Published orders of rows that are no permutations of pairs: mixed batches, and chunk after chunk.

Rows are those of a pool (`data.tokens.pooled`): forget rows first. Each candidate has a sequence of micro-batches of
its own, and step k of the schedule holds the k-th of every candidate; lengths are left to chance, as in the published
code.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from unlearnjax.data.buckets import choose_widths, fit, round_up
from unlearnjax.data.schedule import Schedule, Step, waste
from unlearnjax.data.tokens import Tokens
from unlearnjax.errors import UserError


class Micro(NamedTuple):
    """One micro-batch of one candidate.

    rows: of the pool. weight: what it counts in its update. update: it ends an update, whose learning rate is
    multiplied by `share`. restart: after that the optimizer is as new.
    """

    rows: np.ndarray
    weight: float = 1.0
    update: bool = True
    epoch: int = 0
    share: float = 1.0
    restart: bool = False


LIKE = 16  # tokens: rows whose lengths differ by less are of like length


def mixed(
    forget: int,
    retain: int,
    *,
    batch: int,
    accumulation: int,
    epochs: int,
    seed: int,
    lengths: np.ndarray | None = None,
) -> list[Micro]:
    """Selective Amnesia's order: in each epoch all rows of both sets in one random order, cut into micro-batches, of
    which `accumulation` are an update; an epoch's last update may have fewer.

    Args:
      lengths: of the rows, in tokens, for micro-batches of rows of like length, so that little is padded. Which length
        comes when is the same for every seed: candidates of one batch size go in step.
    """
    found = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(forget + retain)
        if lengths is not None:
            order = order[np.argsort(-(-lengths[order] // LIKE), kind="stable")]
        cuts = [order[i : i + batch] for i in range(0, len(order), batch)]
        if lengths is not None:
            cuts = [cuts[i] for i in np.random.default_rng([epoch, 1]).permutation(len(cuts))]
        for i in range(0, len(cuts), accumulation):
            own = cuts[i : i + accumulation]
            found += [Micro(rows, 1 / len(own), k == len(own) - 1, epoch) for k, rows in enumerate(own)]
    return found


def chunked(forget: int, retain: int, *, chunk: int, ratio: int, epochs: int) -> list[Micro]:
    """SUGD's order (AILS-NTUA): the forget rows in their order, in chunks; for each chunk `ratio` times as many retain
    rows, from where the chunk before it stopped, round and round; then for each epoch, row after row of the chunk, one
    update of exactly 1 forget and `ratio` retain rows. Each chunk has its own optimizer, whose learning rate falls
    linearly to 0.

    The published code gets such updates only from one row per device on 1 + ratio devices; here they are the same on
    any number.
    """
    found, next_retain = [], 0
    for begin in range(0, forget, chunk):
        own = np.arange(begin, min(begin + chunk, forget))
        drawn = (next_retain + np.arange(ratio * len(own))) % retain
        next_retain = int(next_retain + ratio * len(own)) % retain
        steps = epochs * len(own)
        for epoch in range(epochs):
            for k, row in enumerate(own):
                rows = np.concatenate([[row], forget + drawn[k * ratio : (k + 1) * ratio]])
                done = epoch * len(own) + k
                found.append(Micro(rows, 1.0, True, epoch, 1 - done / steps, done == steps - 1))
    return found


def chunks_between(interleaving: float) -> int:
    """How many chunks of AGAD's ascent come before each fine-tuning: 1/interleaving, rounded."""
    return max(1, round(1 / interleaving))


def annealed(
    forget: int, retain: int, *, chunk: int, batch: int, ascent_epochs: int, anneal_epochs: int, interleaving: float,
    fraction: float, finally_all: bool, anneal_rate: float, seed: int,
) -> list[Micro]:  # fmt: skip
    """AGAD's order (AILS-NTUA): chunk after chunk of gradient ascent alone; after every 1/interleaving chunks ordinary
    fine-tuning on a random `fraction` of the retain rows; at the end, if `finally_all`, on all of them. Each phase has
    an optimizer of its own, whose learning rate falls linearly to 0.

    Args:
      anneal_rate: the learning rate of the fine-tuning, in those of the ascent.
    """
    rng = np.random.default_rng(seed)
    found: list[Micro] = []

    def phase(rows: np.ndarray, epochs: int, rate: float) -> None:
        cuts = [order[i : i + batch] for _ in range(epochs)
                for order in [rng.permutation(rows)] for i in range(0, len(rows), batch)]  # fmt: skip
        for k, own in enumerate(cuts):
            found.append(Micro(own, 1.0, True, 0, rate * (1 - k / len(cuts)), k == len(cuts) - 1))

    every = chunks_between(interleaving)
    begins = range(0, forget, chunk)
    for number, begin in enumerate(begins, start=1):
        phase(np.arange(begin, min(begin + chunk, forget)), ascent_epochs, 1.0)
        if number % every == 0:
            some = rng.permutation(retain)[: max(1, round(fraction * retain))]
            phase(forget + some, anneal_epochs, anneal_rate)
    if finally_all:
        phase(forget + np.arange(retain), anneal_epochs, anneal_rate)
    return found


def lockstep(pool: Tokens, sequences: Sequence[Sequence[Micro]], buckets: int = 8) -> Schedule:
    """The schedule that holds one micro-batch of each candidate in every step; a shorter sequence idles at its end.

    Raises:
      UserError: a candidate without a micro-batch.
    """
    if not sequences or not all(sequences):
        raise UserError("training: a candidate has no rows to train on")
    count, most = max(map(len, sequences)), max(len(m.rows) for own in sequences for m in own)
    held = [[own[k] for own in sequences if k < len(own)] for k in range(count)]
    longest = np.asarray([max(int(pool.length[m.rows].max()) for m in own) for own in held])
    widths = choose_widths(longest, buckets)
    answers = {w: min(round_up(int(pool.answer_length[pool.length <= w].max()), 8), w) for w in widths}
    n, steps = len(sequences), []
    for k in range(count):
        rows = np.full((n, most), -1, np.int32)
        weight, update = np.zeros((n, most), np.float32), np.zeros(n, bool)
        share, restart, epochs = np.ones(n, np.float32), np.zeros(n, bool), np.zeros(n, np.int32)
        for i, own in enumerate(sequences):
            if k < len(own):
                micro = own[k]
                rows[i, : len(micro.rows)] = micro.rows
                weight[i, 0], update[i], share[i], restart[i] = micro.weight, micro.update, micro.share, micro.restart
                epochs[i] = micro.epoch
        width = fit(int(longest[k]), widths)
        alone = np.zeros((n, most), np.int32)  # one micro-batch each
        shape = (width, answers[width])
        steps.append(Step(*shape, {"pool": rows}, alone, weight, update, int(epochs.max()), share, restart, epochs))
    updates = np.asarray([sum(m.update for m in own) for own in sequences])
    return Schedule(steps, updates, *waste({"pool": pool}, steps))
