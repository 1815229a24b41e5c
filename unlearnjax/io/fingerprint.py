"""Telling whether something was begun with the same settings and inputs."""

from collections.abc import Mapping
from typing import Any


def difference(found: Any, ours: Any, path: str = "") -> str | None:
    """The first place where two fingerprints differ, as `recipe.training.seed was 0, is 1`; None if they are equal."""
    if isinstance(found, Mapping) and isinstance(ours, Mapping):
        for key in [*ours, *(k for k in found if k not in ours)]:
            inner = difference(found.get(key), ours.get(key), f"{path}.{key}" if path else str(key))
            if inner is not None:
                return inner
        return None
    if isinstance(found, list) and isinstance(ours, list) and len(found) == len(ours):
        inners = (difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(found, ours)))
        return next((inner for inner in inners if inner is not None), None)
    if found == ours:
        return None
    return f"{path} was {str(found)[:60]!r}, is {str(ours)[:60]!r}"
