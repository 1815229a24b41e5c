"""What a merge on disk is told: models, method, and settings that may differ by model, by tensor and by depth."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unlearnjax.errors import UserError

Setting = Any
"""A number, flag or word; a list of numbers, which is interpolated over the depth; or a list of {filter, value}, of
which the first holds whose filter is part of the tensor's name (none, or `*`: every name)."""

_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|block|layer)\.(\d+)\.")


@dataclass(frozen=True)
class Input:
    """One model, and the settings that are its own."""

    model: str
    settings: Mapping[str, Setting] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One merge of model folders.

    Attributes:
      base: what the deltas are from; None for methods on whole models.
      settings: for all models; an input's own come first.
      defaults: for what neither says.
      dtype: of the result; None keeps each tensor's.
      factor: what the merged delta is multiplied by before it is added (negative: subtracted).
    """

    method: str
    inputs: tuple[Input, ...]
    base: str | None = None
    semantics: str | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)
    defaults: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    factor: float = 1.0
    seed: int = 0


def depths(names: Iterable[str]) -> dict[str, float]:
    """Each tensor's depth: its layer's number over the last one's; 0 for what lies in no layer (as in mergekit)."""
    layers = {name: int(found[1]) for name in names if (found := _LAYER.search(name))}
    last = max(layers.values(), default=0)
    return {name: layers.get(name, 0) / last if last else 0.0 for name in names}


def value_at(setting: Setting, tensor: str, depth: float) -> Any:
    """A setting's value for one tensor, None where no condition holds.

    Raises:
      UserError: a setting of another form.
    """
    if isinstance(setting, (bool, int, float, str)):
        return setting
    if isinstance(setting, Mapping):
        setting = [setting]
    if isinstance(setting, Sequence) and setting:
        if all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in setting):
            at = depth * (len(setting) - 1)
            low = int(at)
            high = min(low + 1, len(setting) - 1)
            return (1 - (at - low)) * setting[low] + (at - low) * setting[high]
        if all(isinstance(x, Mapping) and "value" in x and set(x) <= {"filter", "value"} for x in setting):
            for condition in setting:
                wanted = condition.get("filter")
                if wanted is None or wanted == "*" or str(wanted) in tensor:
                    return value_at(condition["value"], tensor, depth)
            return None
    raise UserError(f"{setting!r} is no number, flag or word, no list of numbers and no list of filter and value")


def settings_at(job: Job, names: Sequence[str], tensor: str, depth: float) -> dict[str, list[Any]]:
    """For one tensor, the value of each named setting for each input; those that nothing says are left out."""
    found = {}
    for name in names:
        values = []
        for source in job.inputs:
            value = None
            for level in (source.settings, job.settings, job.defaults):
                if value is None and name in level:
                    value = value_at(level[name], tensor, depth)
            values.append(value)
        if any(value is not None for value in values):
            found[name] = values
    return found
