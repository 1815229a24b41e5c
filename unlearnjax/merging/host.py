"""What the host does at once, where it may: outside of any program, on arrays in a CPU's memory."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float
from unlearnjax_kernels.threshold.host import workers

from unlearnjax.merging.protocol import Leaves, Rule, Settings, State


def settle(rule: Rule, leaves: Sequence[Float[Array, "N ..."]], starts: list[State], settings: Settings) -> list[State]:
    """The states after the first rounds, as many as the host can do at once; the same states where it can do none.

    Args:
        starts: `rule.start` for each leaf (scope "leaf") or once for all of them (scope "tree").
    """
    if not settles(rule, leaves, starts):
        return starts
    arrays = [np.asarray(leaf) for leaf in leaves]
    groups = [arrays] if rule.scope == "tree" else [[array] for array in arrays]
    return [at_once(rule, group, state, settings) for group, state in zip(groups, starts, strict=True)]


def settles(rule: Rule, leaves: Sequence[Any], starts: list[State]) -> bool:
    """Whether the host can do the first of the rule's rounds at once."""
    return (
        bool(rule.rounds) and rule.rounds[0].at_once is not None and all(map(_here, jax.tree.leaves((leaves, starts))))
    )


def at_once(rule: Rule, leaves: Leaves, state: State, settings: Settings) -> State:
    """The state after the first rounds of one unit of the rule's scope."""
    for round_ in rule.rounds:
        if round_.at_once is None:
            break
        state = round_.at_once(leaves, state, settings)
        if not round_.settled(state):
            break
    return state


# By dtype: the patterns' type, what leaves out the sign, and infinity's pattern; those of NaN are above it.
_PATTERNS: dict[str, tuple[Any, int, int]] = {
    "float32": (np.uint32, 0x7FFFFFFF, 0x7F800000),
    "bfloat16": (np.uint16, 0x7FFF, 0x7F80),
    "float16": (np.uint16, 0x7FFF, 0x7C00),
}
_CHUNK = 1 << 16  # entries that stay in a core's cache


def all_finite(leaves: Sequence[Float[Array, "N ..."]]) -> list[np.ndarray] | None:
    """Which candidates hold neither NaN nor infinity, bool [N] for each leaf; None where the arrays are not here.

    XLA's reduction of `isfinite` is not vectorised on a CPU, and takes longer than most merges.
    """
    if not all(map(_here, leaves)):
        return None
    arrays = [np.asarray(leaf) for leaf in leaves]
    rows = [row for array in arrays for row in array.reshape(len(array), -1)]
    found = np.array(list(workers().map(_finite, rows)), bool)
    ends = np.cumsum([len(array) for array in arrays])
    return np.split(found, ends[:-1])


def _finite(row: np.ndarray) -> bool:
    if str(row.dtype) not in _PATTERNS:
        return bool(np.isfinite(row).all())
    kind, magnitude, infinity = _PATTERNS[str(row.dtype)]
    bits = np.empty(min(_CHUNK, row.size), kind)
    for start in range(0, row.size, _CHUNK):
        part = row[start : start + _CHUNK].view(kind)
        if np.bitwise_and(part, kind(magnitude), out=bits[: part.size]).max() >= infinity:
            return False
    return True


def _here(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    if not isinstance(x, jax.Array):
        return True
    devices = list(x.devices())
    return len(devices) == 1 and devices[0].platform == "cpu"
