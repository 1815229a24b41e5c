"""A merge of folders that was killed, stopped or ran out of disk goes on from the weight files it had finished."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from unlearnjax.errors import UserError
from unlearnjax.merging import disk
from unlearnjax.merging.disk import plan
from unlearnjax.merging.folders import merge_folders
from unlearnjax.merging.job import Input, Job

SHARD = 5000  # bytes: two tensors
NAMES = [f"layers.{i}.w" for i in range(8)]


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("base", "one", "two"):
        folder = tmp_path / "models" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
        tensors = {n: rng.normal(size=(20, 30)).astype(np.float32) for n in NAMES}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "models"


def job(folders, method="linear", **settings):
    inputs = tuple(Input(str(folders / name)) for name in ("one", "two"))
    return Job(method, inputs, base=str(folders / "base"), settings=settings)


def run(folders, out, progress=None, method="linear", **settings):
    said = []
    found = plan(job(folders, method, **settings))
    try:
        merge_folders(found, out, max_shard_bytes=SHARD, progress=progress, say=said.append)
    finally:
        run.said = " ".join(said)


def after(count, act):
    """A progress callback that acts when it is called the count-th time."""
    calls = []

    def progress(size):
        calls.append(size)
        if len(calls) == count:
            act()

    return progress


def stop():
    raise KeyboardInterrupt


def interrupted(folders, out):
    """A linear merge that has finished some of its files."""
    with pytest.raises(KeyboardInterrupt):
        run(folders, out, after(20, stop))


def searched(folders, out, monkeypatch):
    """A merge by ties that has its thresholds and no file."""
    with monkeypatch.context() as patch:
        patch.setattr(disk, "write_sharded", lambda *args, **kwargs: stop())
        with pytest.raises(KeyboardInterrupt):
            run(folders, out, method="ties", density=0.4)


def unfinished(out: Path) -> Path:
    return out.with_name(f".{out.name}.unfinished")


def same(one: Path, other: Path) -> None:
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir())
    for name in names:
        if name != "README.md":  # its title is the folder's name
            assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_killed_process(folders, tmp_path):
    out = tmp_path / "out"
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.merging.test_unfinished import after, run\n"
        "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)\n"
        "run(Path(sys.argv[1]), Path(sys.argv[2]), after(20, kill))\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", code, str(folders), str(out)]
    assert subprocess.run(command, env=environment, timeout=120).returncode == -signal.SIGKILL
    assert not out.exists()
    finished = {p.name: p.stat().st_mtime_ns for p in unfinished(out).glob("model-*.safetensors")}
    assert 0 < len(finished) < 4

    run(folders, out)
    assert all(name in run.said for name in finished)
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    assert not unfinished(out).exists() and len(list(out.glob("*.safetensors"))) == 4
    run(folders, tmp_path / "at once")
    same(out, tmp_path / "at once")


def test_a_half_written_file_is_written_again(folders, tmp_path):
    out = tmp_path / "out"
    interrupted(folders, out)
    first = unfinished(out) / "model-00001-of-00004.safetensors"
    first.write_bytes(first.read_bytes()[:-7])
    run(folders, out)
    run(folders, tmp_path / "at once")
    same(out, tmp_path / "at once")


def test_statistics_of_the_whole_model_are_not_searched_again(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    found = plan(job(folders, "ties", density=0.4))
    searched(folders, out, monkeypatch)
    assert [p.name for p in unfinished(out).glob("*.npz")] == [disk.STATISTICS]
    monkeypatch.setattr(disk.Merger, "_search", lambda self: pytest.fail("searched again"))
    counts = []
    merge_folders(found, out, max_shard_bytes=SHARD, progress=counts.append)
    assert sum(counts) == found.bytes_read * found.passes
    monkeypatch.undo()
    run(folders, tmp_path / "at once", method="ties", density=0.4)
    same(out, tmp_path / "at once")


def test_damaged_statistics_are_searched_again(folders, tmp_path, monkeypatch):
    out = tmp_path / "out"
    searched(folders, out, monkeypatch)
    saved = unfinished(out) / disk.STATISTICS
    saved.write_bytes(saved.read_bytes()[:-30])
    run(folders, out, method="ties", density=0.4)
    run(folders, tmp_path / "at once", method="ties", density=0.4)
    same(out, tmp_path / "at once")


def test_a_result_that_could_not_be_renamed_still_says_whose_it_is(folders, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(OSError, match="not empty"):
        run(folders, out, after(20, (out / "note").touch))
    (out / "note").unlink()
    with pytest.raises(UserError, match="another run began"):
        run(folders, out, method="consensus")
    run(folders, out)
    run(folders, tmp_path / "at once")
    same(out, tmp_path / "at once")


def test_files_that_nobody_claims_are_not_kept(folders, tmp_path):
    out = tmp_path / "out"
    interrupted(folders, out)
    (unfinished(out) / "fingerprint.json").unlink()
    run(folders, out, method="consensus")
    run(folders, tmp_path / "at once", method="consensus")
    same(out, tmp_path / "at once")


def test_another_merge_does_not_go_on_with_it(folders, tmp_path):
    out = tmp_path / "out"
    interrupted(folders, out)
    with pytest.raises(UserError, match=r"another run began .*job was .*remove that folder"):
        run(folders, out, method="consensus")
    os.utime(folders / "one" / "model.safetensors", (1, 1))
    with pytest.raises(UserError, match=r"files.*model.safetensors"):
        run(folders, out)
    assert list(unfinished(out).glob("model-*.safetensors"))


def test_what_finished_no_file_leaves_nothing(folders, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(folders, tmp_path / "out", after(2, stop))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models"]


def test_one_process_at_a_time(folders, tmp_path):
    def again():
        with pytest.raises(UserError, match="another process is working there"):
            run(folders, tmp_path / "out")

    run(folders, tmp_path / "out", after(10, again))
    assert len(load_file(tmp_path / "out" / "model-00004-of-00004.safetensors")) == 2


def test_a_full_disk(folders, tmp_path):
    """A real one: a file system of 16 KiB, then of more."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o"]
    if (
        shutil.which("mount") is None
        or subprocess.run([*mount, "size=16k", "tmpfs", str(place)], capture_output=True).returncode
    ):
        pytest.skip("only root can mount a small file system")
    try:
        with pytest.raises(UserError, match=r"No space left on device.*make room"):
            run(folders, place / "out")
        assert [p.name for p in place.iterdir()] == [".out.unfinished"] and "kept: model-00001-of-00004" in run.said
        subprocess.run([*mount, "remount,size=1m", str(place)], check=True)
        run(folders, place / "out")
        run(folders, tmp_path / "at once")
        same(place / "out", tmp_path / "at once")
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw[:-10], r"one/model.safetensors: truncated"),
        (lambda raw: raw[:3], r"one/model.safetensors: truncated"),
        (lambda raw: raw[:9] + b"?" + raw[10:], r"one/model.safetensors: not a safetensors file"),
        (lambda raw: raw.replace(b"[20,30]", b"[30,30]", 1), r"one/model.safetensors: tensor .* takes"),
    ],
)
def test_a_truncated_or_tampered_model(folders, tmp_path, change, words):
    path = folders / "one" / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=words):
        run(folders, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["models"]


def test_a_missing_shard(folders, tmp_path):
    folder = folders / "one"
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    weights = {name: f"model-0000{1 + (i == 7)}-of-00002.safetensors" for i, name in enumerate(NAMES)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors: missing"):
        run(folders, tmp_path / "out")
