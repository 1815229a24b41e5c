"""Finished batches of an evaluation on disk, so that one that was killed goes on where it was.

    <folder>/<kind of work>.jsonl    a line that says what the work is (its fingerprint), and one per finished batch:
                                     the places of its rows, the results of all candidates, and the line's SHA-256

A batch is recorded as soon as it ends and flushed to the disk: kill -9 costs the batch that was under way. Resuming is
by whole batches, made of the full list of rows: other batches would give other low-order bits. (On an accelerator that
has less memory left, or more, those that are not recorded may be other ones all the same.) A line that was torn,
and whatever follows one that was damaged, is done again; so is all of it where the fingerprint differs.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from unlearnjax.distributed.processes import require_same
from unlearnjax.errors import UserError
from unlearnjax.io.atomic import staged_file


def digest(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(_text(value).encode()).hexdigest()


def _text(value: Any) -> str:
    # Floats are written so that they read back as they were; NaN and infinities are allowed.
    return json.dumps(value, separators=(",", ":"))


def _line(content: Mapping[str, Any]) -> bytes:
    return _text({**content, "sha256": digest(content)}).encode() + b"\n"


def _content(line: bytes) -> dict[str, Any] | None:
    """What `_line` made a line of, or None if this is not one."""
    try:
        content = json.loads(line)
        wanted = content.pop("sha256")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return content if digest(content) == wanted else None


@dataclass
class Records:
    """One kind of work's finished batches. Make it with `Journal.records`.

    Attributes:
      path: the file, or None after it could not be written to (the disk is full): the work goes on without it.
      say: told of that, in one line.
      found: results by the places of a batch's rows.
    """

    path: Path | None
    say: Callable[[str], None]
    found: dict[tuple[int, ...], Any] = field(default_factory=dict)

    def add(self, places: Sequence[int], results: Any) -> None:
        """Record a batch; it is on the disk when this returns.

        Args:
          places: of its rows in the list of all rows.
          results: plain data (lists, numbers, texts) that reads back as it was.
        """
        if self.path is None:
            return
        try:
            with self.path.open("ab") as file:
                file.write(_line({"places": list(places), "results": results}))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            self.say(
                f"warning: {self.path}: cannot be written ({error.strerror}); what follows is not kept for --resume"
            )
            self.path = None


class Placed(Protocol):
    """A batch, as far as records ask."""

    @property
    def places(self) -> list[int]:
        """Of its rows in the list of all rows."""


Work = TypeVar("Work", bound=Placed)


def finished(records: Records | None) -> list[tuple[int, ...]]:
    """The places of each batch that is recorded."""
    return [] if records is None else list(records.found)


def recorded(records: Records | None, batch: Work, run: Callable[[Work], Any]) -> Any:
    """What `run` makes of the batch: from the records if it is there, else computed and recorded."""
    if records is None:
        return run(batch)
    found = records.found.get(tuple(batch.places))
    if found is None:
        found = run(batch)
        records.add(batch.places, found)
    return found


@dataclass(frozen=True)
class Journal:
    """A folder of records of one evaluation.

    Attributes:
      folder: it and its files are made when the first record is asked for.
      fingerprint: plain data: what the outputs depend on beside the rows, such as the weights. Each value names itself
        by its key in messages.
      say: receives lines about records that could not be used or written.
    """

    folder: Path
    fingerprint: Mapping[str, Any]
    say: Callable[[str], None]

    def within(self, name: str, **more: Any) -> "Journal":
        """A journal in a folder of this one, with a fuller fingerprint."""
        return Journal(self.folder / name, {**self.fingerprint, **more}, self.say)

    def records(self, what: str, **more: Any) -> Records:
        """The records of one kind of work: those there are, if they are of the same fingerprint, else none.

        Args:
          what: names the work and its file.
          more: the rest of the fingerprint.

        Raises:
          UserError: the job's processes do not have the same fingerprint, or not the same records.
        """
        path = self.folder / f"{re.sub('[^a-z0-9]+', '-', what.lower()).strip('-')}.jsonl"
        fingerprint = json.loads(_text({"format": 1, **self.fingerprint, **more}))  # as it will read back
        require_same(fingerprint)
        try:
            records = self._read(path, fingerprint)
            if records is None:
                with staged_file(path) as beside:
                    beside.write_bytes(_line(fingerprint))
                records = Records(path, self.say)
        except (OSError, UserError) as error:
            reason = str(error) if isinstance(error, UserError) else f"{path}: {error.strerror}"
            self.say(f"warning: {reason}; nothing of the {what} is kept for --resume")
            records = Records(None, self.say)
        require_same({f"what {path.name} has kept": digest(sorted(map(list, records.found)))})
        return records

    def _read(self, path: Path, fingerprint: Mapping[str, Any]) -> Records | None:
        """What is in a file, which is cut behind its last good line; None if there is nothing to go on with."""
        if not path.exists():
            return None
        *lines, torn = path.read_bytes().split(b"\n")
        found = _content(lines[0]) if lines else None
        if found is None:
            self.say(f"warning: {path}: damaged; this part of the evaluation starts from the beginning")
            return None
        if found != fingerprint:
            other = next(key for key in [*fingerprint, *found] if found.get(key, ...) != fingerprint.get(key, ...))
            self.say(f"warning: {path}: is of another evaluation (not the same: {other}); it is discarded")
            return None
        records, end = Records(path, self.say), len(lines[0]) + 1
        for number, line in enumerate(lines[1:], start=1):
            content = _content(line)
            if content is None:
                self.say(f"warning: {path}: damaged; {len(lines) - number} of its batches are computed again")
                break
            records.found[tuple(content["places"])] = content["results"]
            end += len(line) + 1
        else:
            if not torn:
                return records
        os.truncate(path, end)
        return records

    def remove(self) -> None:
        """The evaluation has ended."""
        shutil.rmtree(self.folder, ignore_errors=True)
