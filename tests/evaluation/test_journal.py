"""The journal of finished batches: what was added reads back as it was, and nothing else does."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from unlearnjax.evaluation import journal as module
from unlearnjax.evaluation.batches import batches
from unlearnjax.evaluation.journal import Journal, recorded

ROOT = Path(__file__).parents[2]
ODD = [[0.1, math.inf, -0.0, float(np.float32(1) / 3)], [1e-45, math.nan, 3.0e38, -math.inf]]


@pytest.fixture
def said():
    return []


@pytest.fixture
def make(tmp_path, said):
    """A journal in the same folder, of weights `weights`."""
    return lambda weights="one": Journal(tmp_path / "journal", {"base weights": weights}, said.append)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "journal" / "answers-likelihoods.jsonl"


def fill(journal, count=3):
    records = journal.records("answers' likelihoods", batch_size=2)
    for i in range(count):
        records.add([2 * i, 2 * i + 1], [[i, i + 0.5]])
    return records


def again(journal):
    return journal.records("answers' likelihoods", batch_size=2).found


def test_numbers_read_back_as_they_were(make, said, file):
    records = make().records("answers' likelihoods", batch_size=2)
    assert records.found == {} and records.path == file
    records.add([4, 0], ODD)
    records.add([1], [[[7, 8], []]])
    found = again(make())
    assert list(found) == [(4, 0), (1,)] and found[1,] == [[[7, 8], []]] and said == []
    back = np.asarray(found[4, 0], np.float32)
    np.testing.assert_array_equal(back, np.asarray(ODD, np.float32))
    assert np.signbit(back[0, 2])
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert lines[0]["base weights"] == "one" and lines[2]["places"] == [1]


def test_only_what_is_not_there_is_computed(make):
    runs = []

    def run(batch):
        runs.append(batch.places)
        return [batch.places]

    rows = [[1] * n for n in (3, 1, 5, 2, 4)]
    made = list(batches(rows, 2, 0, left=True, widest=8, per_octave=2))
    for batch in made[:2]:
        recorded(make().records("x"), batch, run)
    assert runs == [[2, 4], [0, 3]]
    assert [recorded(make().records("x"), batch, run) for batch in made] == [[[2, 4]], [[0, 3]], [[1]]]
    assert runs == [[2, 4], [0, 3], [1]]
    assert recorded(None, made[0], run) == [[2, 4]] and len(runs) == 4


def test_a_torn_line_is_ignored_and_written_over(make, said, file):
    fill(make())
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    records = make().records("answers' likelihoods", batch_size=2)
    assert list(records.found) == [(0, 1), (2, 3)] and said == []
    records.add([4, 5], [[2, 2.5]])
    assert file.read_bytes() == whole
    file.write_bytes(whole[:20])  # in the first line
    assert again(make()) == {} and "damaged" in said[0] and len(said) == 1


def test_what_follows_damage_is_done_again(make, said, file):
    fill(make(), 4)
    content = bytearray(file.read_bytes())
    lines = content.split(b"\n")
    place = len(lines[0]) + len(lines[1]) + 2 + lines[2].index(b"1.5")
    content[place] ^= 2  # '1' becomes '3': a number still
    file.write_bytes(content)
    assert list(again(make())) == [(0, 1)]
    assert len(said) == 1 and str(file) in said[0] and "3 of its batches are computed again" in said[0]
    assert list(again(make())) == [(0, 1)] and len(said) == 1


@pytest.mark.parametrize(("weights", "size", "named"), [("two", 2, "base weights"), ("one", 4, "batch_size")])
def test_another_models_is_discarded(make, said, weights, size, named):
    fill(make())
    records = make(weights).records("answers' likelihoods", batch_size=size)
    assert records.found == {}
    assert len(said) == 1 and f"is of another evaluation (not the same: {named}); it is discarded" in said[0]
    assert again(make()) == {}  # it is gone
    inner = make().within("merge", adapters="a")
    fill(inner)
    assert len(again(make().within("merge", adapters="a"))) == 3
    assert again(make().within("merge", adapters="b")) == {} and "adapters" in said[-1]


def test_a_full_disk_is_a_warning(make, said, file, monkeypatch):
    records = fill(make(), 1)
    calls = itertools.count()

    def full(descriptor):
        next(calls)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    records.add([2], [[1]])
    records.add([3], [[1]])
    assert next(calls) == 1 and len(said) == 1 and f"{file}: cannot be written (No space left on device)" in said[0]
    other = make().records("another kind")
    other.add([0], [[1]])
    assert other.path is None and len(said) == 2 and "nothing of the another kind is kept" in said[1]
    assert not [p for p in file.parent.iterdir() if ".part" in p.name]


KILLED = """
import os, signal, sys
from pathlib import Path
from unlearnjax.evaluation.journal import Journal
records = Journal(Path(sys.argv[1]), {"base weights": "one"}, print).records("answers' likelihoods", batch_size=2)
for i in range(5):
    if i == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    records.add([2 * i, 2 * i + 1], [[i, i + 0.5]])
"""


def test_finished_batches_survive_kill_9(make, said, file):
    path = f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"
    argv = [sys.executable, "-c", KILLED, str(file.parent)]
    assert subprocess.run(argv, env=os.environ | {"PYTHONPATH": path}).returncode == -signal.SIGKILL
    assert again(make()) == {(0, 1): [[0, 0.5]], (2, 3): [[1, 1.5]], (4, 5): [[2, 2.5]]} and said == []
    make().remove()
    assert not file.parent.exists()
