"""report.json: its versioned schema, checked on the way out and on the way in.

An error names the path, such as `report.json: models[2].scores.forget`.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from unlearnjax.errors import UserError
from unlearnjax.report.checks import (
    anything,
    curves,
    fail,
    finite,
    flag,
    integer,
    list_of,
    mapping_of,
    number,
    one_of,
    or_null,
    record,
    string,
)

SCHEMA = "unlearnjax.report"
VERSION = 1
FILE = "report.json"

OBJECT = mapping_of(anything)
HARDWARE = record(
    {"platform": string, "device": string, "device_count": integer, "cpu_count": integer, "jax": string},
    optional={"mesh": string},
)
_SHARE = or_null(number)
_TASKS = mapping_of(record({"regurgitation": or_null(number), "knowledge": or_null(number)}))
_PER_SPLIT = record({"forget": _SHARE, "retain": _SHARE})
_SOURCE = record({"source": string, "rows": integer, "sha256": string})
_INTERVAL = list_of(number, length=2)

_SCORES = record(
    {
        "semantics": string,
        "forget": _TASKS,
        "retain": _TASKS,
        "aggregated_terms": list_of(or_null(number)),
        "task_aggregate": or_null(number),
        "membership_auc": or_null(number),
        "membership_auc_interval": or_null(_INTERVAL),
        "membership_score": or_null(number),
        "mmlu": or_null(number),
        "aggregate": or_null(number),
        "aggregate_without_mmlu": or_null(number),
        "degenerate": or_null(_PER_SPLIT),
        "nll": or_null(_PER_SPLIT),
        "probe": or_null(record({"accuracy": or_null(number), "interval": or_null(_INTERVAL), "questions": integer})),
    }
)

_NUMBERS = list_of(or_null(number))
_BY_TERM = mapping_of(mapping_of(_NUMBERS))
_ANGLES = record({name: or_null(number) for name in ("d1_d2", "d1_d3", "d2_d3")})
_TRAJECTORY = record(
    {
        "updates": list_of(integer),
        "forget": _BY_TERM,
        "retain": _BY_TERM,
        "nll": record({"forget": _NUMBERS, "retain": _NUMBERS}),
        "length": _NUMBERS,
        "turning_point": or_null(integer),
        "angles": or_null(record({"whole": _ANGLES, "by_module": mapping_of(_ANGLES)})),
    }
)

_MERGE = record(
    {
        "name": string,
        "method": string,
        "space": string,
        "semantics": or_null(string),
        "hyperparameters": OBJECT,
        "candidates": list_of(string),
        "exported_rank": or_null(integer),
        "truncation_error": or_null(number),
    },
    optional={
        "length": or_null(number),
        "negated": flag,
        "scale": number,
        "search": record(
            {
                "floor": number,
                "trials": list_of(
                    record({"scale": number, "forget": number, "retain": number}, optional={"candidate": string})
                ),
            }
        ),
    },
)


def _merge(value: Any, path: str) -> None:
    """A merge whose scale was searched is one of the trials."""
    _MERGE(value, path)
    if "search" in value:
        own = [t for t in value["search"]["trials"] if t.get("candidate") in (None, *value["candidates"])]
        if value.get("scale") not in [t["scale"] for t in own]:
            raise UserError(f"{path}.scale: is not among the search's trials")


_REPORT = record(
    {
        "schema": string,
        "version": integer,
        "title": string,
        "created": string,
        "unlearnjax": string,
        "command": list_of(string),
        "hardware": HARDWARE,
        "recipe": OBJECT,
        "data": record(
            {"forget": _SOURCE, "retain": _SOURCE},
            optional={
                "members": or_null(_SOURCE),
                "nonmembers": or_null(_SOURCE),
                "probe": or_null(_SOURCE),
                "mmlu": or_null(record({"source": string, "questions": integer, "shots": integer})),
                "padding_share": or_null(number),
            },
        ),
        "training": record(
            {"seconds": number, "candidate_steps": integer, "candidate_steps_per_second": or_null(number)},
            optional={
                "ways": list_of(record({"remat": string, "tokens_at_once": or_null(integer), "attention": string}))
            },
        ),
        "candidates": list_of(
            record(
                {
                    "name": string,
                    "hyperparameters": OBJECT,
                    "status": one_of("finished", "diverged"),
                    "diverged_at": or_null(integer),
                    "updates": integer,
                    "curves": curves,
                },
                optional={"trajectory": _TRAJECTORY, "kept_after": integer},
            )
        ),
        "merges": list_of(_merge),
        "models": list_of(
            record(
                {"name": string, "kind": one_of("base", "gold", "candidate", "merge"), "scores": _SCORES},
                optional={"full": mapping_of(finite)},
            )
        ),
        "warnings": list_of(string),
    },
    optional={"exported": string},
)


def validate(report: dict[str, Any], where: str = FILE) -> None:
    """Check a report against the schema.

    Raises:
      UserError: another schema, a newer version, or the path of the first wrong, missing or unknown key.
    """
    if not isinstance(report, dict):
        raise fail(where, "an object", report)
    if report.get("schema") != SCHEMA:
        raise UserError(f"{where}: not a report of unlearnjax (its schema is {report.get('schema')!r}, not {SCHEMA!r})")
    version = report.get("version")
    if isinstance(version, int) and version > VERSION:
        raise UserError(
            f"{where}: version {version} is newer than this unlearnjax reads ({VERSION}); upgrade unlearnjax to read it"
        )
    if version is not None and version != VERSION:
        raise UserError(f"{where}: version {version!r} does not exist; this unlearnjax reads {VERSION}")
    _REPORT(report, where)


def write_report(folder: str | Path, report: dict[str, Any]) -> Path:
    """Validate a report and write it as `report.json`, whole or not at all; returns the file's path.

    Tuples and arrays become lists, numpy and JAX scalars numbers; NaN and infinities become null.
    """
    plain_report = plain(report)
    path = Path(folder) / FILE
    validate(plain_report)
    write_json(path, plain_report)
    return path


def write_json(path: Path, found: Any) -> None:
    """Plain data as a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def located(path: str | Path, file: str = FILE) -> Path:
    """A report's file, given as the file or as the folder that holds it."""
    path = Path(path)
    return path / file if path.is_dir() else path


def read_json(path: Path) -> Any:
    """A report's plain data.

    Raises:
      UserError: no such file, one that cannot be read, or broken JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run writes {path.name} into its output folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error})") from None


def read_report(path: str | Path) -> dict[str, Any]:
    """Read and validate `report.json`, given as the file or as the folder that holds it.

    Raises:
      UserError: no such file, broken JSON, or not a report this version reads.
    """
    path = located(path)
    report = read_json(path)
    validate(report, str(path))
    return dict(report)


def plain(value: Any) -> Any:
    """The same data in JSON's own types."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and JAX scalars and arrays
        return plain(value.tolist())
    if isinstance(value, float):
        return float(value)
    return value
