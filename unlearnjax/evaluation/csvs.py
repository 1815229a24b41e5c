"""Generations and losses as CSV files, with the columns and names of the official SemEval-2025 Task 4 script.

A folder holds `forget_<k>.csv` and `retain_<k>.csv` (one per process) and, for the membership attack,
`mia_results/member_<k>.csv` and `mia_results/nonmember_<k>.csv`.
"""

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unlearnjax.errors import UserError, nearest

GENERATION_COLUMNS = ("id", "task", "input", "expected_output", "model_output", "nll")
SCORED_COLUMNS = ("id", "task", "expected_output", "model_output")  # without these there is nothing to score
LOSS_COLUMNS = ("id", "nll")


class Scored(NamedTuple):
    """One row and what a model made of it. `nll` is the mean over the answer's tokens in nats, NaN when unknown."""

    id: str
    task: str
    input: str
    expected_output: str
    model_output: str
    nll: float = math.nan


class Loss(NamedTuple):
    """A document's mean next-token NLL in nats."""

    id: str
    nll: float


class Folder(NamedTuple):
    """The files of an output folder: each split's files apart, because pandas reads each by itself."""

    forget: list[list[Scored]]
    retain: list[list[Scored]]
    members: list[Loss] | None
    nonmembers: list[Loss] | None


def write_generations(path: str | Path, rows: Sequence[Scored]) -> None:
    """Write one split's generations; the file appears whole or not at all."""
    _write(Path(path), GENERATION_COLUMNS, rows)


def write_losses(path: str | Path, losses: Sequence[Loss]) -> None:
    """Write documents' losses; the file appears whole or not at all."""
    _write(Path(path), LOSS_COLUMNS, losses)


def read_generations(path: str | Path) -> list[Scored]:
    """Read one file of generations. Columns `input` and `nll` may be missing, other columns are passed over.

    Raises:
      UserError: no such file, not UTF-8, not CSV, a missing column, a row of the wrong width, a loss that is no number.
    """
    rows = []
    for place, record in _records(Path(path), SCORED_COLUMNS):
        texts = {name: record.get(name, "") for name in GENERATION_COLUMNS[:-1]}
        rows.append(Scored(**texts, nll=_number(record.get("nll", ""), place)))
    return rows


def read_losses(path: str | Path) -> list[Loss]:
    """Read one file of documents' losses; each must be a number.

    Raises:
      UserError: as `read_generations`, and for a missing loss.
    """
    losses = []
    for place, record in _records(Path(path), LOSS_COLUMNS):
        loss = Loss(record["id"], _number(record["nll"], place))
        if math.isnan(loss.nll):
            raise UserError(f"{place}, column 'nll': no loss; leave the document out or give its NLL")
        losses.append(loss)
    return losses


def read_folder(folder: str | Path) -> Folder:
    """Read an output folder, of the official script or of ours.

    Raises:
      UserError: no such folder, a split without a file, a file without rows, members without non-members or the other
        way round, and whatever the readers of single files raise.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds forget_0.csv and retain_0.csv")
    splits = {}
    for split in ("forget", "retain"):
        files = _files(folder, split)
        if not files:
            raise UserError(f"{folder}: no {split}_0.csv (nor {split}_*.csv); it must hold both splits' generations")
        splits[split] = [read_generations(file) for file in files]
        if not any(splits[split]):
            raise UserError(f"{files[0]}: holds no rows")
    attack: dict[str, list[Loss] | None] = {}
    for side in ("member", "nonmember"):
        files = _files(folder / "mia_results", side)
        attack[side] = [loss for file in files for loss in read_losses(file)] if files else None
    for side, other in (("member", "nonmember"), ("nonmember", "member")):
        if attack[side] is None and attack[other] is not None:
            raise UserError(f"{folder / 'mia_results'}: has {other}_*.csv but no {side}_*.csv; the attack needs both")
    return Folder(splits["forget"], splits["retain"], attack["member"], attack["nonmember"])


def _files(folder: Path, stem: str) -> list[Path]:
    # Numbered files in the order of their numbers; the official script takes whatever order the folder gives.
    return sorted(folder.glob(f"{stem}_*.csv"), key=lambda path: (len(path.name), path.name))


def _write(path: Path, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    text = io.StringIO()
    # All texts are quoted: a bare carriage return would end the row for pandas.
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(["" if isinstance(cell, float) and math.isnan(cell) else cell for cell in row])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(text.getvalue().encode())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _records(path: Path, needed: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield `(place, record)`; the place is `file, row <number from 1, the header not counted>`."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = cells
                for column in needed:
                    if column not in header:
                        raise UserError(f"{path}: no column {column!r}{nearest(column, header)}")
                continue
            number += 1
            if len(cells) != len(header):
                raise UserError(
                    f"{path}, row {number}: {len(cells)} cells for {len(header)} columns; is a quote missing?"
                )
            yield f"{path}, row {number}", dict(zip(header, cells))
    except csv.Error as error:
        raise UserError(f"{path}, row {number + 1} (line {reader.line_num}): not CSV: {error}") from None
    if header is None:
        raise UserError(f"{path}: empty file; its first line must name the columns {', '.join(needed)}")


def _number(text: str, place: str) -> float:
    if text.strip() == "":
        return math.nan
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{place}, column 'nll': {text!r} is not a number") from None
