"""Checkpoints: exact, whole or absent, and never believed when a bit is wrong."""

import errno
import io
import json
import shutil
import threading
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest

from unlearnjax.errors import UserError
from unlearnjax.io.fingerprint import difference
from unlearnjax.io.safetensors import TensorFile
from unlearnjax.training import checkpoint, keeper
from unlearnjax.training.checkpoint import MANIFEST, Damaged, read_checkpoint, unseal, write_checkpoint
from unlearnjax.training.keeper import open_keeper
from unlearnjax.training.loop import Clock, Curve, Snapshot

RUN = {"recipe": {"candidates": [{"name": "one", "rank": 2}]}, "device": {"platform": "cpu"}}


class Tree(NamedTuple):
    a: dict
    updates: np.ndarray
    alive: np.ndarray
    half: np.ndarray


def snapshot(step=7, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((2, 3, 50)).astype(np.float32)
    values[0, 0, :4] = [np.nan, np.inf, -0.0, 1e-45]
    states = Tree(
        {"layers": {"q": {"a": values, "b": rng.standard_normal((2, 5)).astype(np.float32)}}},
        np.asarray([3, 2], np.int32),
        np.asarray([True, False]),
        rng.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
    )
    curves = [Curve([1, 2], [0.1, float(np.float32(1 / 3))], {"npo": [1e-30, float("nan")]}, [float("inf"), 2.0])] * 2
    return Snapshot(step, states, curves, [{"loss": 0.1 + 0.2}, {}], [None, 2], Clock(1.5, 0.5, 12))


def like(snap):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), snap.states)


def same(a, b):
    leaves, others = jax.tree.leaves(a.states), jax.tree.leaves(b.states)
    equal = [x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(leaves, others)]
    return len(leaves) == len(others) and all(equal) and repr(a[2:]) == repr(b[2:]) and a.step == b.step


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "step-00000007"
    write_checkpoint(folder, snapshot(), RUN)
    return folder


def read(folder):
    return read_checkpoint(folder, unseal(folder / MANIFEST), like(snapshot()))


def test_every_bit_comes_back(written):
    assert same(read(written), snapshot())
    assert not same(read(written), snapshot(seed=1))
    manifest = json.loads((written / MANIFEST).read_text("utf-8"))
    assert {"a.layers.q.a", "updates", "alive"} < set(manifest["leaves"])
    assert not [p for p in written.rglob("*") if p.suffix in (".pkl", ".pickle")]


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def damage_of(folder):
    with pytest.raises(Damaged) as error:
        read(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_flipped_bit_is_found_in_any_file(written, tmp_path):
    draw = np.random.default_rng(0)
    files = sorted(p.relative_to(written) for p in written.rglob("*") if p.is_file())
    assert len(files) == 3
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    for name in files:
        for bit in draw.integers(0, 8 * (written / name).stat().st_size, 24):
            flip(copy / name, int(bit))
            assert name.name in damage_of(copy)
            flip(copy / name, int(bit))
    assert same(read(copy), snapshot())


@pytest.mark.parametrize("leaf", ["a.layers.q.a", "updates", "alive", "half"])
def test_one_bit_of_one_leaf(written, monkeypatch, leaf):
    """Whatever the file system did to it: the smallest change of each leaf is found."""

    def wrong(file, out, name):
        whole(file, out, name)
        if name == leaf:
            out.view(np.uint8)[-1] ^= 1

    whole = TensorFile.read_into
    monkeypatch.setattr(TensorFile, "read_into", wrong)
    assert f"checksum of leaf {leaf}" in damage_of(written)


def test_cut_and_missing_files(written, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    for path in sorted(p for p in copy.rglob("*") if p.is_file()):
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert path.name in damage_of(copy)
        path.unlink()
        assert path.name in damage_of(copy)
        path.write_bytes(content)


def test_leaves_of_another_shape_are_refused(written):
    other = like(snapshot())._replace(updates=jax.ShapeDtypeStruct((3,), np.int32))
    with pytest.raises(Damaged, match="updates"):
        read_checkpoint(written, unseal(written / MANIFEST), other)
    with pytest.raises(Damaged, match="half is not one of this run"):
        read_checkpoint(written, unseal(written / MANIFEST), other._replace(half=None))


class Box:
    """A keeper's folder and what it said."""

    def __init__(self, folder):
        self.folder, self.said = folder / "checkpoints", []

    def open(self, run=RUN, *, every=0.0, resume=True):
        return open_keeper(self.folder, run, every=every, say=self.said.append, resume=resume)

    def steps(self):
        return sorted(p.name for p in self.folder.iterdir() if p.is_dir())

    def fill(self, *steps):
        keep = self.open(resume=False)
        for step in steps:
            keep.save(snapshot(step, seed=step), wait=True)
        keep.close()

    def restored(self):
        keep = self.open()
        try:
            return keep.restore(like(snapshot()))
        finally:
            keep.close()


@pytest.fixture
def box(tmp_path):
    return Box(tmp_path)


def test_the_newest_two_are_kept(box):
    box.fill(1, 2, 10)
    assert box.steps() == ["step-00000002", "step-00000010"]
    assert same(box.restored(), snapshot(10, seed=10)) and box.said == []


def test_a_damaged_one_is_named_and_the_one_before_is_used(box):
    box.fill(1, 2)
    (box.folder / "step-00000002" / "part-00000.safetensors").unlink()
    assert same(box.restored(), snapshot(1, seed=1))
    (line,) = box.said
    assert str(box.folder / "step-00000002") in line and "damaged" in line and "cannot be read" in line
    # It no longer counts among the newest two, so going on from step 1 does not remove step 1 for it.
    box.fill(2)
    assert box.steps() == ["damaged-step-00000002", "step-00000001", "step-00000002"]
    assert same(box.restored(), snapshot(2, seed=2))


@pytest.mark.parametrize("name", [MANIFEST, "part-00000.json", "part-00000.safetensors", "fingerprint.json"])
def test_what_cannot_be_read_now_is_left_where_it_is(box, monkeypatch, name):
    # A mount that has gone for a while, on one host.
    box.fill(1, 2)
    whole = io.open

    def stale(file, *rest, **more):
        if str(file).endswith(f"step-00000002/{name}") or str(file) == str(box.folder / name):
            raise OSError(errno.ESTALE, "Stale file handle")
        return whole(file, *rest, **more)

    with monkeypatch.context() as patched:
        patched.setattr(io, "open", stale)
        patched.setattr("builtins.open", stale)
        with pytest.raises(UserError, match=r"Stale file handle.*it stays as it is: try again"):
            box.restored()
    assert box.steps() == ["step-00000001", "step-00000002"]
    assert same(box.restored(), snapshot(2, seed=2)) and box.said == []


def test_none_whole_means_the_beginning(box):
    box.fill(1, 2)
    for name in box.steps():
        flip(box.folder / name / MANIFEST, 400)
    assert box.restored() is None
    assert len(box.said) == 3 and "from the beginning" in box.said[-1] and MANIFEST in box.said[0]


def test_half_written_ones_are_cleared_away(box):
    box.fill(1)
    half = box.folder / ".step-00000002.99999.part"
    half.mkdir(parents=True)
    (half / "part-00000.safetensors").write_bytes(b"half")
    assert same(box.restored(), snapshot(1, seed=1))
    assert not half.exists() and box.said == []


def test_a_full_disk_costs_one_checkpoint_and_nothing_else(box, monkeypatch):
    whole = checkpoint.write_arrays

    def full(path, arrays):
        if full.now:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(path, arrays)

    monkeypatch.setattr(checkpoint, "write_arrays", full)
    keep = box.open(resume=False)
    full.now = True
    keep.save(snapshot(1, seed=1), wait=True)
    full.now = False
    keep.save(snapshot(2, seed=2), wait=True)
    full.now = True
    keep.save(snapshot(3, seed=3), wait=True)
    assert keep.saved == 2
    keep.close()
    assert box.steps() == ["step-00000002"]
    first, second = box.said
    assert "step 1 was not written" in first and "No space left on device" in first and "none before" in first
    assert "step 3 was not written" in second and "the one of step 2 stays" in second
    assert same(box.restored(), snapshot(2, seed=2))


def test_never_two_at_once(box, monkeypatch):
    begun, go = threading.Event(), threading.Event()

    def slow(folder, snap, fingerprint, meet):
        begun.set()
        assert go.wait(60)
        folder.mkdir()

    monkeypatch.setattr(keeper, "write_checkpoint", slow)
    keep = box.open()
    assert keep.due()
    keep.save(snapshot(1), wait=False)
    assert begun.wait(60) and not keep.due() and keep.saved is None
    go.set()
    keep.close()
    assert keep.saved == 1
    later = box.open(every=1e6)
    assert not later.due()
    later.close()


def test_another_process_or_another_run(box):
    keep = box.open()
    with pytest.raises(UserError, match="another process is working there"):
        box.open()
    keep.close()
    other = {**RUN, "recipe": {"candidates": [{"name": "one", "rank": 4}]}}
    with pytest.raises(UserError, match=r"recipe.candidates\[0\].rank was '2', is '4'"):
        box.open(other)
    box.open().close()
    # Without the fingerprint's own file, the checkpoints still know whose they are.
    box.fill(1)
    (box.folder / keeper.FINGERPRINT).write_text("{", "utf-8")
    keep = box.open(other)
    with pytest.raises(UserError, match="rank"):
        keep.restore(like(snapshot()))
    keep.close()
    assert "damaged" in box.said[0]


def test_difference():
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a[1].b was '2', is '3'"
    assert difference({"a": 1}, {}) == "a was '1', is 'None'"
    assert difference({"a": [1]}, {"a": [1, 2]}) == "a was '[1]', is '[1, 2]'"
