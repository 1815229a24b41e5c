"""Which generations count as collapsed."""

import os
from pathlib import Path

import pytest

from unlearnjax.data.rows import load_rows
from unlearnjax.evaluation.degenerate import degeneration, distinct_2, repeated_coverage, signs, zlib_ratio

STORY = (
    "In the mystical city of Deadesius, where magic and mystery intertwined, two sorceresses had long been rivals. One "
    "fateful day their magic grew stronger, and a thick fog blanketed the streets until the people became lost."
)


def test_loops_and_silence_are_degenerate():
    assert signs("6 6 6 6 6 6") >= {"distinct_2"}
    assert signs("6 " * 256) == {"distinct_2", "repeated", "compressed"}
    assert signs("6" * 256) == {"compressed"}
    assert signs("") == signs(" \n") == {"empty"}
    # A loop of a long phrase behind a good beginning: many different pairs, but most of it is repetition.
    looped = STORY + " and then the brave young captain of the northern guard rode far away" * 6
    assert "repeated" in signs(looped)


@pytest.mark.parametrize("text", [STORY, "Hardy", "New York, New York", "Bora Bora", "1999-01-01", "a@me.com", "no"])
def test_good_texts_are_not(text):
    assert signs(text) == frozenset()


def test_the_parts():
    assert distinct_2(["a", "b", "a", "b", "a"]) == 2 / 4
    assert distinct_2(["a"]) == 1.0
    assert repeated_coverage(["a", "b", "c", "x", "a", "b", "c"]) == 6 / 7
    assert repeated_coverage(["a", "a", "a"]) == 1.0  # occurrences may touch but not overlap
    assert repeated_coverage(["a", "b", "c", "d"]) == 0.0
    assert repeated_coverage([]) == 0.0
    assert zlib_ratio("") == 1.0 and zlib_ratio("ab" * 500) < 0.05


def test_coverage_equals_trying_every_length():
    import random

    draw = random.Random(0)

    def slow(words):
        for n in range(len(words) // 2, 0, -1):
            best = 0
            for i in range(len(words) - n + 1):
                at, count = 0, 0
                while at <= len(words) - n:
                    hit = words[at : at + n] == words[i : i + n]
                    count, at = count + hit, at + (n if hit else 1)
                best = max(best, count)
            if best > 1:
                return best * n / len(words)
        return 0.0

    for _ in range(200):
        words = draw.choices("ab" if draw.random() < 0.5 else "abcdef", k=draw.randint(0, 14))
        assert repeated_coverage(words) == slow(words), words


def test_shares():
    found = degeneration([STORY, "6 6 6 6 6 6", "", "fine"], hit_limit=[False, True, False, False])
    assert found.degenerate == 0.5 and found.empty == 0.25 and found.distinct_2 == 0.25 and found.hit_limit == 0.25
    assert degeneration([]).degenerate == 0.0 and degeneration(["x"]).hit_limit is None


def test_no_text_of_lume_is_degenerate():
    folder = os.environ.get("UNLEARNJAX_LUME")
    if not folder:
        pytest.skip("needs LUME's splits: set UNLEARNJAX_LUME to their folder")
    for split in ("forget_train", "retain_train", "forget_validation", "retain_validation"):
        for row in load_rows(str(Path(folder) / f"{split}.parquet")):
            assert not signs(row.output) and not signs(row.input), row.id
