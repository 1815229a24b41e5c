"""One process at a time in a folder."""

import os
from pathlib import Path

from unlearnjax.distributed.processes import agreed
from unlearnjax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "lock"


def lock_folder(folder: Path, shown: Path | None = None) -> int:
    """Hold a folder until the descriptor returned is closed, or the process ends in whatever way.

    Args:
      shown: what the message names (default: the folder above it).

    Raises:
      UserError: another process holds it.
    """
    place = folder / LOCK
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(place, os.O_RDWR | os.O_CREAT, 0o644)
        if fcntl is None:
            return descriptor
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            where = folder.parent if shown is None else shown
            raise UserError(f"{where}: another process is working there; wait for it, or stop it first") from None
        except OSError:
            return descriptor  # a file system without locks
        # The one who held it may have moved the folder away since the file was opened.
        if place.exists() and os.path.samestat(os.fstat(descriptor), place.stat()):
            return descriptor
        os.close(descriptor)


def lock_for_all(folder: Path) -> int:
    """`lock_folder` by the first process of a job, which returns its descriptor; the others get -1.

    Raises:
      UserError: in all of them: another job holds it.
    """
    found: list[int] = []
    agreed(lambda: found.append(lock_folder(folder)))
    return found[0] if found else -1
