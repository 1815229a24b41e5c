"""Outputs that appear whole or not at all: written beside their place, flushed to disk, then renamed into it."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unlearnjax.errors import UserError

_LEFT_OVER = re.compile(r"\..+\.\d+\.part")  # the names that `_beside` gives


def require_free(path: str | Path) -> Path:
    """Check that a result folder can be created at `path`: nothing is there, or an empty folder is.

    Returns:
      The path with symbolic links resolved.

    Raises:
      UserError: something is there already, or its place cannot be written to.
    """
    target = Path(path).expanduser().resolve()
    try:
        if target.is_dir():
            if any(target.iterdir()):
                raise UserError(f"{path}: already exists and is not empty; give a new folder or remove it first")
            if target.is_mount():
                raise UserError(f"{path}: is a mount point, which cannot be replaced; give a new folder inside it")
        elif target.exists():
            raise UserError(f"{path}: already exists and is a file; give a new folder or remove it first")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    for parent in target.parents:
        if parent.exists():
            if not parent.is_dir():
                raise UserError(f"{path}: {parent} is a file, so nothing can be written below it")
            if not os.access(parent, os.W_OK | os.X_OK):
                raise UserError(f"{path}: no permission to write in {parent}; give a folder elsewhere")
            break
    return target


def flush_tree(path: Path, deep: bool = True) -> None:
    """Flush a folder to disk, and (deep) all files and folders in it."""
    for folder, _, files in os.walk(path) if deep else [(str(path), [], [])]:
        for name in files:
            flush(Path(folder) / name)
        flush(Path(folder))


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(target: Path) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{target.parent}: cannot be created ({error.strerror})") from None
    return target.with_name(f".{target.name}.{os.getpid()}.part")


def remove_left_overs(folder: Path) -> None:
    """Remove what killed processes left in `folder` and below of what they wrote. Nobody may be writing there now."""
    for path in [p for p in folder.rglob(".*.part") if _LEFT_OVER.fullmatch(p.name)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def explain(error: BaseException, target: Path) -> None:
    """Raise a `UserError` instead where the disk is the cause."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise UserError(
            f"{target}: cannot be written ({error.strerror}); make room or give a place elsewhere"
        ) from error


@contextmanager
def staged_folder(path: str | Path) -> Iterator[Path]:
    """Yield a folder to fill; on leaving, flush everything in it to disk and rename it to `path`.

    After any exception (an interrupt too) the folder is removed and `path` is as it was.

    Raises:
      UserError: `path` is taken (see `require_free`) or its place cannot be written to.
    """
    target = require_free(path)
    beside = _beside(target)
    shutil.rmtree(beside, ignore_errors=True)  # left by a killed process that had this one's number
    try:
        beside.mkdir()
        yield beside
        flush_tree(beside)
        beside.rename(target)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        explain(error, target)
        raise
    flush(target.parent)


@contextmanager
def staged_file(path: str | Path) -> Iterator[Path]:
    """Yield a path to write to; on leaving, flush that file to disk and rename it to `path`, replacing what is there.

    After any exception (an interrupt too) the file is removed and `path` is as it was.

    Raises:
      UserError: `path` is a folder, or its place cannot be written to.
    """
    target = Path(path).expanduser().resolve()
    if target.is_dir():
        raise UserError(f"{path}: is a folder; give a file's name")
    beside = _beside(target)
    try:
        yield beside
        flush(beside)
        beside.replace(target)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        explain(error, target)
        raise
    flush(target.parent)
