"""report.json: its versioned schema, checked on the way out and on the way in.

A check is a function `(value, path) -> None` that raises `UserError` naming the path, such as
`report.json: models[2].scores.forget`. The schema below is such functions composed; it reads like the file itself.
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unlearnjax.errors import UserError, check_known, nearest

SCHEMA = "unlearnjax.report"
VERSION = 1
FILE = "report.json"

Check = Callable[[Any, str], None]


def _fail(path: str, expected: str, value: Any) -> UserError:
    shown = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}".replace("\n", " ")
    return UserError(f"{path}: must be {expected}, is {shown}")


def _number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _fail(path, "a finite number", value)


def _integer(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise _fail(path, "a whole number", value)


def _flag(value: Any, path: str) -> None:
    if not isinstance(value, bool):
        raise _fail(path, "true or false", value)


def _string(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise _fail(path, "a string", value)


def _anything(value: Any, path: str) -> None:
    """Recipes and hyperparameters are plain data whose keys are checked where they are read."""


def _finite(value: Any, path: str) -> None:
    """Plain data without NaN or infinities; the metrics' own files say what is in it."""
    if isinstance(value, dict):
        _mapping_of(_finite)(value, path)
    elif isinstance(value, list | tuple):
        _list_of(_finite)(list(value), path)
    elif isinstance(value, float):
        _number(value, path)


def _one_of(*names: str) -> Check:
    def check(value: Any, path: str) -> None:
        _string(value, path)
        if value not in names:
            raise UserError(f"{path}: unknown value {value!r}{nearest(value, names)}")

    return check


def _or_null(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        if value is not None:
            inner(value, path)

    return check


def _list_of(inner: Check, length: int | None = None) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, list):
            raise _fail(path, "a list", value)
        if length is not None and len(value) != length:
            raise UserError(f"{path}: must hold {length} values, holds {len(value)}")
        for index, item in enumerate(value):
            inner(item, f"{path}[{index}]")

    return check


def _mapping_of(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise _fail(path, "an object", value)
        for key, item in value.items():
            _string(key, f"{path} key")
            inner(item, f"{path}.{key}")

    return check


def _record(fields: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    known = dict(fields) | dict(optional or {})

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise _fail(path, "an object", value)
        check_known(value, known, "key", path)
        for name in fields:
            if name not in value:
                raise UserError(f"{path}: the key {name!r} is missing")
        for name, item in value.items():
            known[name](item, f"{path}.{name}")

    return check


def _curves(value: Any, path: str) -> None:
    """`update` and lists of its length: `loss`, each term and `gradient_norm`; null where a value was not finite."""
    _mapping_of(_list_of(_or_null(_number)))(value, path)
    if "update" not in value:
        raise UserError(f"{path}: the key 'update' is missing")
    _list_of(_integer)(value["update"], f"{path}.update")
    for name, items in value.items():
        if len(items) != len(value["update"]):
            raise UserError(f"{path}.{name}: has {len(items)} values for {len(value['update'])} updates")


_OBJECT = _mapping_of(_anything)
_SHARE = _or_null(_number)
_TASKS = _mapping_of(_record({"regurgitation": _or_null(_number), "knowledge": _or_null(_number)}))
_PER_SPLIT = _record({"forget": _SHARE, "retain": _SHARE})
_SOURCE = _record({"source": _string, "rows": _integer, "sha256": _string})
_INTERVAL = _list_of(_number, length=2)

_SCORES = _record(
    {
        "semantics": _string,
        "forget": _TASKS,
        "retain": _TASKS,
        "aggregated_terms": _list_of(_or_null(_number)),
        "task_aggregate": _or_null(_number),
        "membership_auc": _or_null(_number),
        "membership_auc_interval": _or_null(_INTERVAL),
        "membership_score": _or_null(_number),
        "mmlu": _or_null(_number),
        "aggregate": _or_null(_number),
        "aggregate_without_mmlu": _or_null(_number),
        "degenerate": _or_null(_PER_SPLIT),
        "nll": _or_null(_PER_SPLIT),
        "probe": _or_null(
            _record({"accuracy": _or_null(_number), "interval": _or_null(_INTERVAL), "questions": _integer})
        ),
    }
)

_NUMBERS = _list_of(_or_null(_number))
_BY_TERM = _mapping_of(_mapping_of(_NUMBERS))
_ANGLES = _record({name: _or_null(_number) for name in ("d1_d2", "d1_d3", "d2_d3")})
_TRAJECTORY = _record(
    {
        "updates": _list_of(_integer),
        "forget": _BY_TERM,
        "retain": _BY_TERM,
        "nll": _record({"forget": _NUMBERS, "retain": _NUMBERS}),
        "length": _NUMBERS,
        "turning_point": _or_null(_integer),
        "angles": _or_null(_record({"whole": _ANGLES, "by_module": _mapping_of(_ANGLES)})),
    }
)

_MERGE = _record(
    {
        "name": _string,
        "method": _string,
        "space": _string,
        "semantics": _or_null(_string),
        "hyperparameters": _OBJECT,
        "candidates": _list_of(_string),
        "exported_rank": _or_null(_integer),
        "truncation_error": _or_null(_number),
    },
    optional={
        "length": _or_null(_number),
        "negated": _flag,
        "scale": _number,
        "search": _record(
            {
                "floor": _number,
                "trials": _list_of(
                    _record({"scale": _number, "forget": _number, "retain": _number}, optional={"candidate": _string})
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


_REPORT = _record(
    {
        "schema": _string,
        "version": _integer,
        "title": _string,
        "created": _string,
        "unlearnjax": _string,
        "command": _list_of(_string),
        "hardware": _record(
            {"platform": _string, "device": _string, "device_count": _integer, "cpu_count": _integer, "jax": _string}
        ),
        "recipe": _OBJECT,
        "data": _record(
            {"forget": _SOURCE, "retain": _SOURCE},
            optional={
                "members": _or_null(_SOURCE),
                "nonmembers": _or_null(_SOURCE),
                "probe": _or_null(_SOURCE),
                "mmlu": _or_null(_record({"source": _string, "questions": _integer, "shots": _integer})),
                "padding_share": _or_null(_number),
            },
        ),
        "training": _record(
            {"seconds": _number, "candidate_steps": _integer, "candidate_steps_per_second": _or_null(_number)}
        ),
        "candidates": _list_of(
            _record(
                {
                    "name": _string,
                    "hyperparameters": _OBJECT,
                    "status": _one_of("finished", "diverged"),
                    "diverged_at": _or_null(_integer),
                    "updates": _integer,
                    "curves": _curves,
                },
                optional={"trajectory": _TRAJECTORY},
            )
        ),
        "merges": _list_of(_merge),
        "models": _list_of(
            _record(
                {"name": _string, "kind": _one_of("base", "gold", "candidate", "merge"), "scores": _SCORES},
                optional={"full": _mapping_of(_finite)},
            )
        ),
        "warnings": _list_of(_string),
    },
    optional={"exported": _string},
)


def validate(report: dict[str, Any], where: str = FILE) -> None:
    """Check a report against the schema.

    Raises:
      UserError: another schema, a newer version, or the path of the first wrong, missing or unknown key.
    """
    if not isinstance(report, dict):
        raise _fail(where, "an object", report)
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
    plain = _plain(report)
    path = Path(folder) / FILE
    validate(plain)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{FILE}.{os.getpid()}.part")
    try:
        beside.write_text(json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return path


def read_report(path: str | Path) -> dict[str, Any]:
    """Read and validate `report.json`, given as the file or as the folder that holds it.

    Raises:
      UserError: no such file, broken JSON, or not a report this version reads.
    """
    path = Path(path)
    if path.is_dir():
        path = path / FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a run writes {FILE} into its output folder") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: broken JSON ({error})") from None
    validate(report, str(path))
    return dict(report)


def _plain(value: Any) -> Any:
    """The same data in JSON's own types."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # numpy and JAX scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(value)
    return value
