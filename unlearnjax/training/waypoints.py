"""Adapters kept on the way through training, so that what they did can be looked at afterwards."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Int, PyTree

from unlearnjax.distributed.processes import fetch, firsts, follows
from unlearnjax.io.atomic import staged_file
from unlearnjax.io.safetensors import Entry, open_file, write_file
from unlearnjax.training.checkpoint import leaf_names
from unlearnjax.training.state import State


class Waypoint(NamedTuple):
    """All candidates after some step: what is trainable, stacked over N, and each one's number of updates."""

    trainable: PyTree[np.ndarray]
    updates: Int[np.ndarray, " N"]


def waypoint_steps(steps: int, count: int) -> list[int]:
    """At most `count` numbers of steps, evenly spaced, the last one `steps`."""
    return sorted({round(steps * i / count) for i in range(1, count + 1)} - {0})


def recorder(folder: Path, steps: Sequence[int]) -> Callable[[int, State], None]:
    """What `train` calls after each step: writes the waypoints of `steps` into `folder`, each whole or not at all; of
    a job's processes the first does.

    A run that goes on from a checkpoint passes some of its steps again and writes the same bytes again; those it does
    not pass again are there already.
    """
    wanted = frozenset(steps)

    def after_step(done: int, states: State) -> None:
        if done not in wanted:
            return
        leaves = {**leaf_names(states.trainable), "updates": states.updates}
        host = fetch(leaves)
        if follows():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with staged_file(_path(folder, done)) as beside:
            write_file(beside, [Entry(name, leaf.shape, leaf.dtype, leaf) for name, leaf in host.items()])

    return after_step


def read_waypoint(folder: Path, step: int, like: PyTree) -> Waypoint:
    """A waypoint, which the first of a job's processes has written; `like` is a pytree of the trainable's structure.

    Raises:
      UserError: no such file, or not one that `recorder` wrote for this structure.
    """
    file = open_file(_path(firsts(folder), step))
    leaves = [file.read(name) for name in leaf_names(like)]
    return Waypoint(jax.tree.unflatten(jax.tree.structure(like), leaves), file.read("updates"))


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:07d}.safetensors"
