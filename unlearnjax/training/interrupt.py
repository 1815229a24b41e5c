"""Stopping in order: the first SIGTERM or Ctrl-C lets training save itself, the second ends the process at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from unlearnjax.distributed.processes import largest

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Work ended because a signal asked for it. `signum` is the signal; `note` says what was saved, if anything."""

    def __init__(self, signum: int, note: str = "") -> None:
        super().__init__(note)
        self.signum = signum
        self.note = note


@dataclass
class Stop:
    """Whether the process was asked to stop.

    Attributes:
      signum: the first signal that came, or 0.
      polled: somebody looks at `signum` between two steps, so that a signal need not break into one.
    """

    signum: int = 0
    polled: bool = False

    @contextlib.contextmanager
    def polling(self) -> Iterator[None]:
        """While inside, a signal only sets `signum`. One that nobody looked at raises `Interrupted` on leaving.

        In all processes of a job, whichever of them it came to: all must come to the end of it, or fail.
        """
        self.polled = True
        try:
            yield
        finally:
            self.polled = False
        (signum,) = largest(self.signum)
        if signum:
            raise Interrupted(signum)


@contextlib.contextmanager
def catch_signals(stop: Stop, say: Callable[[str], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM go to `stop`, or raise `Interrupted` where nobody polls it; the second one exits.

    The process then ends at once with status 128 + signal, without any cleaning up: as after SIGKILL. A signal that the
    parent process had ignored stays ignored. Does nothing outside the main thread, where no handlers can be set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: object) -> None:
        stop.signum = stop.signum or signum
        if not stop.polled:
            raise Interrupted(signum)

    def watch() -> None:
        # Python runs handlers between two of the main thread's instructions, and that thread can be inside XLA for
        # long. The wake-up file is written at once, and this thread is free to act on it.
        seen = 0
        while (number := os.read(reader, 1)[0]) != 0:
            if number not in SIGNALS:
                continue
            seen += 1
            if seen > 1:
                os._exit(128 + number)
            if stop.polled:
                name = signal.Signals(number).name
                say(f"{name}: finishing and saving this step; once more to exit at once, with what was saved before")

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = {s: signal.getsignal(s) for s in SIGNALS}
    watcher = threading.Thread(target=watch, name="signals", daemon=True)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    try:
        for s, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(s, handle)
        yield
    finally:
        for s, handler in before.items():
            signal.signal(s, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(wakeup)
        os.write(writer, b"\0")
        watcher.join()
        os.close(reader)
        os.close(writer)
