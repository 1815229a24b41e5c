"""Rounds that the host does at once, where it may: outside of any program, on arrays in a CPU's memory."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from unlearnjax.merging.protocol import Leaves, Rule, Settings, State


def settle(rule: Rule, leaves: Sequence[Float[Array, "N ..."]], starts: list[State], settings: Settings) -> list[State]:
    """The states after the first rounds, as many as the host can do at once; the same states where it can do none.

    Args:
        starts: `rule.start` for each leaf (scope "leaf") or once for all of them (scope "tree").
    """
    if not rule.rounds or rule.rounds[0].at_once is None or not all(map(_here, jax.tree.leaves((leaves, starts)))):
        return starts
    arrays = [np.asarray(leaf) for leaf in leaves]
    groups = [arrays] if rule.scope == "tree" else [[array] for array in arrays]
    return [at_once(rule, group, state, settings) for group, state in zip(groups, starts, strict=True)]


def at_once(rule: Rule, leaves: Leaves, state: State, settings: Settings) -> State:
    """The state after the first rounds of one unit of the rule's scope."""
    for round_ in rule.rounds:
        if round_.at_once is None:
            break
        state = round_.at_once(leaves, state, settings)
        if not round_.settled(state):
            break
    return state


def _here(x: Any) -> bool:
    if isinstance(x, jax.core.Tracer):
        return False
    if not isinstance(x, jax.Array):
        return True
    devices = list(x.devices())
    return len(devices) == 1 and devices[0].platform == "cpu"
