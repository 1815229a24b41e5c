"""One process at a time in a folder."""

import fcntl
import os
from pathlib import Path

from unlearnjax.errors import UserError

LOCK = "lock"


def lock_folder(folder: Path, shown: Path | None = None) -> int:
    """Hold a folder until the descriptor returned is closed, or the process ends in whatever way.

    Args:
      shown: what the message names (default: the folder above it).

    Raises:
      UserError: another process holds it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        place = folder.parent if shown is None else shown
        raise UserError(f"{place}: another process is working there; wait for it, or stop it first") from None
    except OSError:
        pass  # a file system without locks
    return descriptor
