"""The files of one folder, written by all processes of a job, each its share."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from unlearnjax.distributed.processes import agreed, largest
from unlearnjax.errors import UserError

T = TypeVar("T")


def write_together(
    folder: Path, files: Mapping[str, Sequence[T]], made: Callable[[T], T], write: Callable[[Path, Sequence[T]], None]
) -> None:
    """Write files in turn by the processes of a job; where some of them do not see the folder, by the first alone.

    All must call it at the same place. What goes into a file is made by all of them in the same order, as the processes
    exchange values, and kept by the one that writes it, which does so while the next file is made: two files' values
    are held at most.

    Args:
      folder: of the first process, which the files of all go to.
      files: what goes into each, by name.
      made: one of these with its value.

    Raises:
      UserError: some process could not write; in all of them.
    """
    import jax

    place = Path(agreed(lambda: str(folder.resolve())))
    writers = 1 if largest(not os.path.isdir(place))[0] else jax.process_count()
    under_way: list[Future[None]] = []
    error: Exception | None = None

    def wait() -> None:
        nonlocal error
        while under_way:
            try:
                under_way.pop().result()
            except Exception as failed:  # the others go on making values with this process
                error = error or failed

    with ThreadPoolExecutor(1, "files") as pool:
        for number, (name, parts) in enumerate(files.items()):
            if number % writers == jax.process_index():
                own = [made(part) for part in parts]
                wait()
                under_way.append(pool.submit(write, place / name, own))
                del own
            else:
                for part in parts:
                    made(part)
        wait()
    if largest(error is not None)[0]:
        raise error or UserError(f"{folder}: another process could not write its files; see what it says")
