"""Trained candidates on disk, one folder each, so that a run goes on where it stopped and merges can stream them."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jaxtyping import Array, PyTree

from unlearnjax.errors import UserError
from unlearnjax.io.atomic import staged_folder
from unlearnjax.io.safetensors import Entry, open_file, write_file

WEIGHTS, FACTS = "delta.safetensors", "candidate.json"


class Trained(Protocol):
    """What fine-tuning and the baselines give."""

    @property
    def trained(self) -> PyTree[np.ndarray]: ...
    @property
    def fixed(self) -> PyTree[np.ndarray]: ...
    @property
    def losses(self) -> list[float]: ...
    @property
    def diverged_at(self) -> int | None: ...


class Facts(NamedTuple):
    """What is known of a candidate beside its weights."""

    name: str
    losses: list[float]
    diverged_at: int | None


class Store:
    """Task vectors (and BatchNorm statistics) of candidates in `folder`, float32.

    A candidate is there whole or not at all, and only counts if it was made from the same `origin` (its settings, the
    data and the start, as plain data).
    """

    def __init__(self, folder: Path, start: PyTree[Array], fixed: PyTree[Array]) -> None:
        self.folder = folder
        self._start = start
        self._like = {"delta": start, "statistics": fixed.get("statistics", {})}

    def has(self, name: str, origin: Mapping[str, Any]) -> bool:
        """Whether this candidate is there, made from this."""
        place = self.folder / name / FACTS
        return place.is_file() and json.loads(place.read_text("utf-8"))["origin"] == json.loads(json.dumps(origin))

    def save(self, name: str, tuned: Trained, origin: Mapping[str, Any]) -> None:
        """Keep a candidate."""
        delta = jax.tree.map(lambda after, before: after - np.asarray(before), tuned.trained, self._start)
        tree = {"delta": delta, "statistics": tuned.fixed.get("statistics", {})}
        entries = [Entry(key, x.shape, np.float32, np.asarray(x, np.float32)) for key, x in _named(tree)]
        facts = {"origin": origin, "losses": tuned.losses, "diverged_at": tuned.diverged_at}
        with staged_folder(self.folder / name) as staged:
            write_file(staged / WEIGHTS, entries)
            (staged / FACTS).write_text(json.dumps(facts), "utf-8")

    def facts(self, name: str) -> Facts:
        """Without reading the weights."""
        found = json.loads((self.folder / name / FACTS).read_text("utf-8"))
        return Facts(name, found["losses"], found["diverged_at"])

    def delta(self, name: str) -> PyTree[np.ndarray]:
        """A candidate's task vector.

        Raises:
          UserError: its file is damaged.
        """
        return self._read(name, "delta")

    def statistics(self, name: str) -> PyTree[np.ndarray]:
        """A candidate's BatchNorm statistics."""
        return self._read(name, "statistics")

    def _read(self, name: str, part: str) -> PyTree[np.ndarray]:
        path = self.folder / name / WEIGHTS
        file = open_file(path)
        found = []
        for key, like in _named({part: self._like[part]}):
            if key not in file.slots or file.slots[key].shape != like.shape:
                raise UserError(f"{path}: is not what was written there; remove {path.parent} and run again")
            found.append(file.read(key))
        return jax.tree.unflatten(jax.tree.structure(self._like[part]), found)

    def deltas(self, names: Sequence[str]) -> Iterator[PyTree[np.ndarray]]:
        """Task vectors one at a time."""
        return (self.delta(name) for name in names)

    def stacked(self, names: Sequence[str]) -> PyTree[np.ndarray]:
        """Task vectors all at once, a leading axis N on every leaf."""
        return jax.tree.map(lambda *leaves: np.stack(leaves), *self.deltas(names))


def _named(tree: PyTree[Any]) -> list[tuple[str, Any]]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in flat]
