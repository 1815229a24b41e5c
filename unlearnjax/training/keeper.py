"""The checkpoints of one run: written in the background, the newest two kept, a damaged one passed over.

The processes of one job have one folder of checkpoints, on a file system that all of them see. Each writes what its
devices hold, and the first one does the rest.
"""

import functools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from unlearnjax.distributed.processes import agreed, firsts, follows, largest, meetings, require_same
from unlearnjax.errors import UserError
from unlearnjax.io.atomic import remove_left_overs, staged_file
from unlearnjax.io.fingerprint import difference
from unlearnjax.io.locks import lock_for_all
from unlearnjax.training.checkpoint import (
    FORMAT,
    MANIFEST,
    Damaged,
    Unreadable,
    canonical,
    read_checkpoint,
    seal,
    unseal,
    write_checkpoint,
)
from unlearnjax.training.loop import Snapshot

KEEP = 2
FINGERPRINT = "fingerprint.json"
PLACE = "device"  # of the fingerprint, what may differ: a run may go on elsewhere, though not bit for bit
_NAME = re.compile(r"step-(\d{8,})")


@dataclass
class Keeper:
    """The folder `OUT/checkpoints` while its run is going on. Make one with `open_keeper`; `close` it in any case.

    Attributes:
      folder: holds step-<number> (see `unlearnjax.training.checkpoint`) and the fingerprint of the run.
      every: seconds between two checkpoints; 0 means whenever the one before has been written (of several processes:
        after every other step, as they agree on it a step later).
      say: told of what went wrong, one line each.
    """

    folder: Path
    fingerprint: Mapping[str, Any]
    every: float
    say: Callable[[str], None]
    resume: bool
    lock: int  # -1 where another process holds it for all
    meet: Callable[[str], None]  # waits for the job's other processes
    saved: int | None = None  # the step of the newest checkpoint that is known to be whole
    _saves: int = 0  # the same in every process
    _last: float = field(default_factory=time.monotonic)
    _writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    _writing: tuple[int, Future[None]] | None = None

    def due(self) -> bool:
        """Whether it is time for a checkpoint; never while one is being written."""
        if self._writing is not None and not self._writing[1].done():
            return False
        self._collect()
        return time.monotonic() - self._last >= self.every

    def save(self, snapshot: Snapshot, wait: bool) -> None:
        """Write a checkpoint in the background, after the one that is being written. A failure is only a warning.

        Args:
          snapshot: nobody changes it from now on.
          wait: until it is on disk; then `saved` tells whether it is.
        """
        self._collect()
        self._last = time.monotonic()
        self._saves += 1
        self._writing = snapshot.step, self._writer.submit(self._write, snapshot, self._saves)
        if wait:
            self._collect()

    def _write(self, snapshot: Snapshot, number: int) -> None:
        target = self.folder / f"step-{snapshot.step:08d}"
        if not follows():
            shutil.rmtree(target, ignore_errors=True)
        write_checkpoint(target, snapshot, self.fingerprint, lambda place: self.meet(f"{number} {place}"))
        if not follows():
            for old in self._found()[KEEP:]:
                shutil.rmtree(old, ignore_errors=True)

    def _collect(self) -> None:
        """Wait for the checkpoint that is being written, if any, and tell how it went."""
        if self._writing is None:
            return
        step, future = self._writing
        self._writing = None
        try:
            future.result()
        except Exception as error:  # a full disk, most likely: what training has done must not be lost for it
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            left = f"the one of step {self.saved} stays" if self.saved is not None else "there is none before it"
            self.say(f"warning: {self.folder}: the checkpoint of step {step} was not written; {left} ({reason})")
        else:
            self.saved = step

    def _found(self) -> list[Path]:
        """The checkpoints there are, the newest first.

        Raises:
          UserError: the folder cannot be read.
        """
        try:
            steps = [p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)]
        except OSError as error:
            raise _later(self.folder, error.strerror) from None
        return sorted(steps, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)

    def restore(self, like: PyTree) -> Snapshot | None:
        """The newest checkpoint that is whole, or None; damaged ones are named in a warning and moved aside.

        Args:
          like: a pytree of the states' structure, shapes and dtypes.

        Raises:
          UserError: a checkpoint of another run, or one that cannot be read now, which is left where it is.
        """
        for name in agreed(lambda: [found.name for found in self._found()]):
            place, snapshot = self.folder / name, None
            damage: Any = agreed(functools.partial(self._whose, place))
            try:
                if damage is None:
                    manifest = unseal(place / MANIFEST)
                    snapshot = read_checkpoint(place, manifest, like)
            except Damaged as found:
                # The first process has read the manifest: where it is not there, the folder is not.
                absent = damage is None and not os.path.exists(place / MANIFEST)
                damage = Unreadable("is not there for every process") if absent else found
            damaged, unreadable = largest(damage is not None, isinstance(damage, Unreadable))
            if unreadable:
                raise _later(place, damage if isinstance(damage, Unreadable) else "another process cannot read it")
            if snapshot is not None and not damaged:
                self.saved = snapshot.step
                other = difference(manifest["fingerprint"].get(PLACE), self.fingerprint.get(PLACE), PLACE)
                if other is not None:
                    self.say(f"warning: {place}: {other}; the run goes on, but not bit for bit as it would have there")
                return snapshot
            reason = damage or "in a part that another process reads"
            self.say(f"warning: {place}: damaged, {reason}; the checkpoint before is used")
            if not follows():
                aside = place.with_name(f"damaged-{place.name}")
                shutil.rmtree(aside, ignore_errors=True)
                place.rename(aside)
        if self.resume:
            self.say(f"{self.folder}: there is no whole checkpoint; training starts from the beginning")
        return None

    def _whose(self, place: Path) -> str | None:
        """What is wrong with a checkpoint's manifest, if anything. Raises `UserError`: it is another run's."""
        try:
            _same_run(unseal(place / MANIFEST)["fingerprint"], self.fingerprint, place)
        except Unreadable as trouble:
            raise _later(place, trouble) from None
        except Damaged as damage:
            return str(damage)
        return None

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and let other processes at the folder."""
        self._writer.shutdown(wait=True)
        self._collect()
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1

    def remove(self) -> None:
        """The run has finished: close, and remove the folder."""
        self.close()
        if not follows():
            shutil.rmtree(self.folder, ignore_errors=True)


def open_keeper(
    folder: Path, fingerprint: Mapping[str, Any], *, every: float, say: Callable[[str], None], resume: bool
) -> Keeper:
    """Take hold of a run's folder of checkpoints, making it if need be.

    Raises:
      UserError: another process works there, the folder belongs to another run (the message names what differs), or the
        job's processes do not have the same fingerprint.
    """
    fingerprint = json.loads(canonical(fingerprint))  # as it will read back
    require_same(fingerprint)
    folder = firsts(folder)
    keeper = Keeper(folder, fingerprint, every, say, resume, lock_for_all(folder), meetings(f"checkpoints {folder}"))
    try:
        agreed(lambda: _mark(folder, fingerprint, say))
    except BaseException:
        keeper.close()
        raise
    if largest(not os.path.isdir(folder))[0]:
        keeper.close()
        raise UserError(f"{folder}: is not there for every process of the job; give a folder that all see")
    return keeper


def _mark(folder: Path, fingerprint: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Make sure that a folder is this run's, and say so in it."""
    place = folder / FINGERPRINT
    remove_left_overs(folder)
    if _is_there(place):
        try:
            _same_run(unseal(place)["fingerprint"], fingerprint, folder.parent)
        except Unreadable as trouble:
            raise _later(place, trouble) from None
        except Damaged as damage:
            say(f"warning: {folder}: damaged, {damage}; it is written anew")
    with staged_file(place) as path:
        path.write_text(seal({"format": FORMAT, "fingerprint": fingerprint}), encoding="utf-8")


def _later(place: Path, trouble: object) -> UserError:
    return UserError(
        f"{place}: {trouble}; it stays as it is: try again when it can be read, or remove it to go on without it"
    )


def _is_there(place: Path) -> bool:
    try:
        place.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _later(place, error.strerror) from None
    return True


def _same_run(found: Any, ours: Any, place: Path) -> None:
    found, ours = ({k: v for k, v in x.items() if k != PLACE} if isinstance(x, Mapping) else x for x in (found, ours))
    other = difference(found, ours)
    if other is not None:
        raise UserError(
            f"{place}: is of another run, and cannot be resumed by this one: {other}; "
            "give what that run was started with, or a new folder"
        )
