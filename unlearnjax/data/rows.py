"""Rows and documents as the LUME benchmark publishes them, read from files or the Hugging Face hub.

A row is one prompt and the answer that follows it; a document is one whole text for the membership attack.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unlearnjax.data.hub import HUB, load_hub
from unlearnjax.errors import UserError

SUFFIXES = (".jsonl", ".json", ".parquet")
DEFAULT_TASK = "Task"


class Row(NamedTuple):
    """One prompt and its answer. LUME's ids end in `sc1` (sentence completion) or `qa0`..`qa4` (question)."""

    id: str
    input: str
    output: str
    task: str


class Document(NamedTuple):
    """One whole text, a member or a non-member of the data a model was trained on."""

    id: str
    document: str


def load_rows(source: str) -> list[Row]:
    """Rows of a `.jsonl`, `.json` (a list of objects) or `.parquet` file, or of a hub data set.

    A `.jsonl` or `.json` file may instead hold one object of columns, {column: {row: value}}, as pandas writes them.

    Args:
      source: a path, or `org/name`, `org/name:split` or `org/name:config:split` on the hub. Columns `input` and
        `output` are required; a row without `id` gets `row-<number from 1>`, one without `task` gets `Task`.

    Raises:
      UserError: no such file or data set, unreadable or broken content, a missing column, a value that is not a
        string, or no rows at all; the message names the file and the line or row.
    """
    rows = []
    for number, (place, record) in enumerate(load_records(source), start=1):
        rows.append(
            Row(
                id=_identifier(record, number, place),
                input=text_of(record, "input", place),
                output=text_of(record, "output", place),
                task=DEFAULT_TASK if record.get("task") is None else text_of(record, "task", place),
            )
        )
    if not rows:
        raise UserError(f"{source}: holds no rows; give at least one with columns input and output")
    return rows


def load_documents(source: str) -> list[Document]:
    """Documents (column `document`, optional `id`) from the same kinds of source as `load_rows`.

    Raises:
      UserError: as `load_rows`.
    """
    documents = []
    for number, (place, record) in enumerate(load_records(source), start=1):
        documents.append(Document(_identifier(record, number, place), text_of(record, "document", place)))
    if not documents:
        raise UserError(f"{source}: holds no documents; give at least one with a column document")
    return documents


def fingerprint(source_or_rows: str | Sequence[Row] | Sequence[Document]) -> str:
    """SHA-256 (hex) that identifies a data set in reports.

    For a file it is the digest of its bytes, what `sha256sum` prints. For rows or documents (and for a hub id, whose
    rows are loaded) it is the digest of the file that `write_rows` or `write_documents` would write.
    """
    if isinstance(source_or_rows, str):
        path = Path(source_or_rows).expanduser()
        if not path.exists() and HUB.match(source_or_rows) and path.suffix not in SUFFIXES:
            return fingerprint(load_rows(source_or_rows))
        with _open(source_or_rows, path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    return hashlib.sha256(_as_jsonl(source_or_rows)).hexdigest()


def write_rows(path: str | Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON Lines (UTF-8, keys id, input, output, task); the file appears whole or not at all."""
    _write(Path(path), _as_jsonl(rows))


def write_documents(path: str | Path, documents: Sequence[Document]) -> None:
    """Write documents as JSON Lines (UTF-8, keys id, document); the file appears whole or not at all."""
    _write(Path(path), _as_jsonl(documents))


def _as_jsonl(items: Sequence[Row] | Sequence[Document]) -> bytes:
    return "".join(json.dumps(item._asdict(), ensure_ascii=False) + "\n" for item in items).encode()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(place, record)`: place is what an error message calls it, such as `forget.jsonl, line 3`."""
    path = Path(source).expanduser()
    if not path.exists():
        hub = HUB.match(source)
        if hub is None or path.suffix in SUFFIXES:
            raise UserError(f"{source}: no such file")
        yield from _from_hub(source, hub)
    elif path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if entry.suffix in SUFFIXES)
        advice = f"one of its files, such as {inside[0]}" if inside else f"a {', '.join(SUFFIXES)} file"
        raise UserError(f"{source}: is a folder; give {advice}")
    elif path.suffix == ".jsonl":
        yield from _from_jsonl(source, path)
    elif path.suffix == ".json":
        yield from _from_json(source, path)
    elif path.suffix == ".parquet":
        yield from _from_parquet(source, path)
    else:
        raise UserError(f"{source}: unknown kind of file {path.suffix!r}; give {', '.join(SUFFIXES)} or a hub data set")


def _open(source: str, path: Path) -> Any:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise UserError(f"{source}: no such file") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from None


def _from_jsonl(source: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Split on newline bytes only: str.splitlines would also cut at U+2028, which JSON strings may hold.
    with _open(source, path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{source}, line {number}"
            text = _decode(line, place)
            if not text.strip():
                continue
            record = _object(_parse(text, place), place)
            if _is_columns(record):
                if number > 1 or file.read().strip():
                    raise UserError(f"{place}: holds whole columns; a file of columns is one JSON object and no more")
                yield from _from_columns(source, record)
                return
            yield place, record


def _from_json(source: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with _open(source, path) as file:
        content = _parse(_decode(file.read(), source), source)
    if _is_columns(content):
        yield from _from_columns(source, content)
        return
    if not isinstance(content, list):
        raise UserError(f"{source}: must hold a list of objects, holds {_kind(content)}")
    for number, record in enumerate(content, start=1):
        place = f"{source}, row {number}"
        yield place, _object(record, place)


def _is_columns(content: Any) -> bool:
    """No row is like this: its columns are text and numbers."""
    return isinstance(content, dict) and content != {} and all(isinstance(v, dict) for v in content.values())


def _from_columns(source: str, content: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    first = next(iter(content))
    for column, values in content.items():
        odd = sorted(values.keys() ^ content[first].keys())
        if odd:
            raise UserError(
                f"{source}: columns {first!r} and {column!r} must have the same rows; "
                f"only one of them has row {odd[0]!r}"
            )
    for row in content[first]:
        yield f"{source}, row {row!r}", {column: values[row] for column, values in content.items()}


def _from_parquet(source: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _open(source, path) as file:
            for number, record in enumerate(_parquet_rows(pq.ParquetFile(file)), start=1):
                yield f"{source}, row {number}", record
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source}: not a readable parquet file ({_first_line(error)})") from None


def _parquet_rows(file: Any) -> Iterator[dict[str, Any]]:
    for batch in file.iter_batches():
        yield from batch.to_pylist()


def _from_hub(source: str, hub: re.Match[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    found = load_hub(source, hub)
    for number, record in enumerate(found, start=1):
        yield f"{source}, row {number}", record


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # A JSON Lines place already names the line.
        where = f"column {error.colno}" if ", line " in place else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{place}: broken JSON at {where}: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: broken JSON: {_first_line(error)}") from None


def _object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: must be an object with named columns, is {_kind(value)}")
    return value


def text_of(record: dict[str, Any], column: str, place: str) -> str:
    """A column that must hold text; `place` is what an error message calls the row."""
    if column not in record:
        there = ", ".join(map(str, record)) or "none"
        raise UserError(f"{place}: no column {column!r}; columns there are: {there}")
    value = record[column]
    if not isinstance(value, str):
        raise UserError(f"{place}: column {column!r} must be a string, is {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: column {column!r} holds half of a surrogate pair, which is not text") from None
    return value


def _identifier(record: dict[str, Any], number: int, place: str) -> str:
    value = record.get("id")
    if value is None:
        return f"row-{number}"
    # Numbered rows are common, and an id is only ever a name.
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else text_of(record, "id", place)


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a string",
             list: "a list", dict: "an object"}  # fmt: skip
    return names.get(type(value), f"a {type(value).__name__}")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
