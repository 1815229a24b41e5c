"""Checks of plain data: functions `(value, path) -> None` that raise `UserError` naming the path, and ways to compose
them. A schema made of them reads like the file itself.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from unlearnjax.errors import UserError, check_known, nearest

Check = Callable[[Any, str], None]


def fail(path: str, expected: str, value: Any) -> UserError:
    shown = "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}".replace("\n", " ")
    return UserError(f"{path}: must be {expected}, is {shown}")


def number(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise fail(path, "a finite number", value)


def integer(value: Any, path: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise fail(path, "a whole number", value)


def flag(value: Any, path: str) -> None:
    if not isinstance(value, bool):
        raise fail(path, "true or false", value)


def string(value: Any, path: str) -> None:
    if not isinstance(value, str):
        raise fail(path, "a string", value)


def anything(value: Any, path: str) -> None:
    """Recipes and hyperparameters are plain data whose keys are checked where they are read."""


def finite(value: Any, path: str) -> None:
    """Plain data without NaN or infinities; the metrics' own files say what is in it."""
    if isinstance(value, dict):
        mapping_of(finite)(value, path)
    elif isinstance(value, list | tuple):
        list_of(finite)(list(value), path)
    elif isinstance(value, float):
        number(value, path)


def one_of(*names: str) -> Check:
    def check(value: Any, path: str) -> None:
        string(value, path)
        if value not in names:
            raise UserError(f"{path}: unknown value {value!r}{nearest(value, names)}")

    return check


def or_null(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        if value is not None:
            inner(value, path)

    return check


def list_of(inner: Check, length: int | None = None) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, list):
            raise fail(path, "a list", value)
        if length is not None and len(value) != length:
            raise UserError(f"{path}: must hold {length} values, holds {len(value)}")
        for index, item in enumerate(value):
            inner(item, f"{path}[{index}]")

    return check


def mapping_of(inner: Check) -> Check:
    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise fail(path, "an object", value)
        for key, item in value.items():
            string(key, f"{path} key")
            inner(item, f"{path}.{key}")

    return check


def record(fields: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    known = dict(fields) | dict(optional or {})

    def check(value: Any, path: str) -> None:
        if not isinstance(value, dict):
            raise fail(path, "an object", value)
        check_known(value, known, "key", path)
        for name in fields:
            if name not in value:
                raise UserError(f"{path}: the key {name!r} is missing")
        for name, item in value.items():
            known[name](item, f"{path}.{name}")

    return check


def curves(value: Any, path: str) -> None:
    """`update` and lists of its length: `loss`, each term and `gradient_norm`; null where a value was not finite."""
    mapping_of(list_of(or_null(number)))(value, path)
    if "update" not in value:
        raise UserError(f"{path}: the key 'update' is missing")
    list_of(integer)(value["update"], f"{path}.update")
    for name, items in value.items():
        if len(items) != len(value["update"]):
            raise UserError(f"{path}.{name}: has {len(items)} values for {len(value['update'])} updates")
