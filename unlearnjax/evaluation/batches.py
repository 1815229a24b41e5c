"""Rows of token ids as padded batches of few shapes: each shape is compiled once, and short rows pay for short ones."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from unlearnjax.errors import UserError


class Batch(NamedTuple):
    """Rows that run together: row i is the caller's row `places[i]`; rows past len(places) are filler."""

    places: list[int]
    tokens: np.ndarray  # int32 [rows, length]
    segments: np.ndarray  # int32 [rows, length]: 1 on tokens, 0 on padding
    lengths: np.ndarray  # int32 [rows]; 1 on filler rows


def bucket(length: int, per_octave: int) -> int:
    """The padded width of a row: a power of two from 16, or one of the `per_octave` even steps between two of them."""
    if length <= 16:
        return 16
    below = 1 << ((length - 1).bit_length() - 1)
    step = max(below // per_octave, 16)
    return -(-length // step) * step


def power_of_two(count: int) -> int:
    """The least power of two that is at least `count` (and at least 1)."""
    return 1 << max(count - 1, 0).bit_length()


def name_of(names: Sequence[str] | None, row: int) -> str:
    """What an error message calls a row: its name (such as `forget.jsonl, row 'a1qa0'`), or its number from 1."""
    return f"row {row + 1}" if names is None else names[row]


def check_rows(
    rows: Sequence[Sequence[int]], vocab_size: int, max_positions: int, extra: int, names: Sequence[str] | None
) -> None:
    """Refuse rows that the model would take without complaint and answer with nonsense.

    Args:
      extra: new tokens that must fit behind each row.

    Raises:
      UserError: an empty row, a row longer than the context, or a token id outside the vocabulary; it names the row.
    """
    for i, row in enumerate(rows):
        if not row:
            raise UserError(f"{name_of(names, i)}: no tokens; give a text that is not empty")
        if len(row) + extra > max_positions:
            new = f" and {extra} new ones" if extra else ""
            raise UserError(
                f"{name_of(names, i)}: row longer than the context: {len(row)} tokens{new}, the model takes "
                f"{max_positions}; shorten the row" + (" or lower max_new_tokens" if extra else "")
            )
        if min(row) < 0 or max(row) >= vocab_size:
            wrong = next(t for t in row if not 0 <= t < vocab_size)
            raise UserError(
                f"{name_of(names, i)}: token id {wrong} is outside the model's vocabulary of {vocab_size}; "
                "give the tokenizer that belongs to the model"
            )


def batches(
    rows: Sequence[Sequence[int]],
    batch_size: int,
    pad_token_id: int,
    *,
    left: bool,
    widest: int,
    per_octave: int,
    fitted: Callable[[int, int], int] | None = None,
    finished: Iterable[Sequence[int]] = (),
) -> Iterator[Batch]:
    """Yield the rows in batches of similar length, longest first (so that memory of so many rows runs out at once or
    never).

    Args:
      left: pad on the left (generation) or on the right.
      widest: no batch is padded beyond this width.
      per_octave: padded widths between a power of two and the next; more is less padding and more to compile.
      fitted: how many rows run together (those without a place are filler) where so many of such a width are wanted.
      finished: the places of batches that came of these rows before: they come again, whatever would fit now.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    begun = {places[0]: list(places) for places in finished}
    start = 0
    while start < len(order):
        width = min(bucket(len(rows[order[start]]), per_octave), widest)
        count = min(batch_size, power_of_two(len(order) - start))
        again = begun.get(order[start], [])
        if again and order[start : start + len(again)] == again:
            count = len(again)
        elif fitted is not None:
            count = fitted(count, width)
        places = order[start : start + count]
        start += count
        tokens = np.full((count, width), pad_token_id, np.int32)
        segments = np.zeros((count, width), np.int32)
        lengths = np.ones(count, np.int32)
        for at in range(count):
            # Filler rows hold one padding token, so that no row is without a token to attend to.
            row = rows[places[at]] if at < len(places) else [pad_token_id]
            where = slice(width - len(row), width) if left else slice(0, len(row))
            tokens[at, where], segments[at, where], lengths[at] = row, 1, len(row)
        yield Batch(places, tokens, segments, lengths)
