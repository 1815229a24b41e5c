"""Progress bars for work that reports (what, done, in all)."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from unlearnjax.distributed.processes import largest
from unlearnjax.training.interrupt import Interrupted, Stop


@contextlib.contextmanager
def bars(show: bool, label: str, stop: Stop | None = None) -> Iterator[Callable[[str, int, int], None] | None]:
    """A callback that draws one bar per kind of work, or None when there is nothing to show and nobody to ask.

    Args:
      stop: looked at each time that work reports; when it asks to stop, the callback raises `Interrupted`.
    """
    open_bars: dict[str, Any] = {}

    def draw(what: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if what not in open_bars:
            open_bars[what] = tqdm(total=total, desc=f"{label}: {what}", unit="row", dynamic_ncols=True)
        bar = open_bars[what]
        bar.update(done - bar.n)
        if done >= total:
            bar.close()

    def report(what: str, done: int, total: int) -> None:
        if show:
            draw(what, done, total)
        signum = 0 if stop is None else largest(stop.signum)[0]
        if signum:
            raise Interrupted(signum, f"in the evaluation, after {done} of {total} rows ({what})")

    try:
        with stop.polling() if stop is not None else contextlib.nullcontext():
            yield report if show or stop is not None else None
    finally:
        for bar in open_bars.values():
            bar.close()


def say_by_warning(message: str) -> None:
    """Where nobody listens to what work has to say: a Python warning."""
    warnings.warn(message, stacklevel=3)
