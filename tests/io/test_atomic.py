"""Outputs appear whole or not at all."""

import errno
import os

import pytest

from unlearnjax.errors import UserError
from unlearnjax.io.atomic import require_free, staged_file, staged_folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_appears_only_when_finished(tmp_path):
    out = tmp_path / "deep" / "out"
    with staged_folder(out) as staged:
        (staged / "inner").mkdir()
        (staged / "inner" / "a.txt").write_text("whole")
        assert not out.exists()
    assert (out / "inner" / "a.txt").read_text() == "whole"
    assert names(out.parent) == ["out"]


def test_an_empty_folder_is_taken_over(tmp_path):
    (tmp_path / "out").mkdir()
    with staged_folder(tmp_path / "out") as staged:
        (staged / "a").write_text("x")
    assert names(tmp_path / "out") == ["a"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, UserError])
def test_nothing_stays_after_an_exception(tmp_path, error):
    with pytest.raises(error, match="stop"), staged_folder(tmp_path / "out") as staged:
        (staged / "half").write_text("x")
        raise error("stop")
    with pytest.raises(error, match="stop"), staged_file(tmp_path / "file") as beside:
        beside.write_text("half")
        raise error("stop")
    assert names(tmp_path) == []


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(ValueError), staged_file(path) as beside:
        beside.write_text("new, half")
        raise ValueError
    assert path.read_text() == "old"
    with staged_file(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["report.json"]


def test_a_taken_place_is_refused_before_anything_is_written(tmp_path):
    full = tmp_path / "full"
    full.mkdir()
    (full / "precious").write_text("mine")
    with pytest.raises(UserError, match=r"full: already exists and is not empty; give a new folder"):
        require_free(full)
    with pytest.raises(UserError, match="not empty"), staged_folder(full):
        raise AssertionError("entered")
    with pytest.raises(UserError, match="is a file; give a new folder"):
        require_free(full / "precious")
    with pytest.raises(UserError, match="precious is a file, so nothing can be written below it"):
        require_free(full / "precious" / "out")
    with pytest.raises(UserError, match="is a folder; give a file's name"), staged_file(full):
        raise AssertionError("entered")
    assert names(tmp_path) == ["full"] and names(full) == ["precious"]


def test_a_mount_point_is_refused():
    with pytest.raises(UserError, match=r"not empty|mount point"):
        require_free("/proc")


def test_a_full_disk_is_one_line(tmp_path):
    says = pytest.raises(UserError, match=r"cannot be written \(No space left on device\); make room")
    with says, staged_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert names(tmp_path) == []


def test_free_places_pass(tmp_path):
    (tmp_path / "empty").mkdir()
    assert require_free(tmp_path / "empty") == (tmp_path / "empty").resolve()
    assert require_free(tmp_path / "not" / "yet") == (tmp_path / "not" / "yet").resolve()
