"""A result folder that is filled over several tries: what one wrote before it was killed, the next one finds."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unlearnjax.errors import UserError
from unlearnjax.io.atomic import explain, flush_tree, remove_left_overs, require_free, staged_file
from unlearnjax.io.fingerprint import difference
from unlearnjax.io.locks import LOCK, lock_folder

FINGERPRINT = "fingerprint.json"


@contextmanager
def resumable_folder(
    path: str | Path, fingerprint: Mapping[str, Any], worth_keeping: Callable[[Path], bool]
) -> Iterator[Path]:
    """Yield a folder to fill, `.NAME.unfinished` beside `path`; on leaving, flush it to disk and rename it to `path`.

    It may already hold files from an earlier try with the same fingerprint. Write each with `staged_file`, so that one
    that is there is whole. After any exception (an interrupt too) `path` is as it was, and the folder stays where
    `worth_keeping` says so of it.

    Args:
      fingerprint: all that the files depend on; JSON.

    Raises:
      UserError: `path` is taken or its place cannot be written to; an earlier try had another fingerprint (the message
        names what differs) or is still going on.
    """
    target = require_free(path)
    folder = target.with_name(f".{target.name}.unfinished")
    ours = json.loads(json.dumps(fingerprint))
    try:
        lock = lock_folder(folder, target)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); give a place elsewhere") from None
    try:
        try:
            require_free(path)  # another process may have finished meanwhile
            _check_fingerprint(folder, target, ours)
        except UserError:
            if [p.name for p in folder.iterdir()] == [LOCK]:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        remove_left_overs(folder)
        try:
            with staged_file(folder / FINGERPRINT) as place:
                place.write_text(json.dumps(ours, indent=1), "utf-8")
            yield folder
            flush_tree(folder)
            folder.rename(target)
            for name in (FINGERPRINT, LOCK):  # after it: a folder that was not renamed must still say whose it is
                (target / name).unlink()
        except BaseException as error:
            if not worth_keeping(folder):
                shutil.rmtree(folder, ignore_errors=True)
            explain(error, target)
            raise
        flush_tree(target, deep=False)
        flush_tree(target.parent, deep=False)
    finally:
        os.close(lock)


def _check_fingerprint(folder: Path, target: Path, ours: Any) -> None:
    try:
        found = json.loads((folder / FINGERPRINT).read_text("utf-8"))
    except FileNotFoundError:  # what is there belongs to no one
        for path in folder.iterdir():
            if path.name != LOCK:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        return
    except ValueError:
        found = None
    other = difference(found, ours)
    if other is not None:
        raise UserError(
            f"{target}: {folder} holds what another run began to write there, which this one cannot finish: {other}; "
            "give what it was started with, remove that folder, or give another place"
        )
