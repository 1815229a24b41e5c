"""Arrays that lie on many devices as pieces in host memory: each process keeps its own, and finds what it asks for in
the pieces of all."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from unlearnjax.distributed.processes import follows

Region = tuple[tuple[int, int], ...]  # begin and end along each axis


@dataclass(frozen=True)
class Pieces:
    """What one process keeps of an array: of equal copies on several devices one, in one process.

    Attributes:
      shape, dtype: of the whole array.
      parts: where each piece lies, and its values, which nobody changes.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Mapping[Region, np.ndarray]


def whole_of(shape: Iterable[int]) -> Region:
    return tuple((0, size) for size in shape)


def region_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> Region:
    """Of an index of slices with no steps."""
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def held(leaf: Any) -> Pieces:
    """A copy of what this process is to keep of an array. A numpy array is the same in every process."""
    if not isinstance(leaf, jax.Array):
        return Pieces(leaf.shape, leaf.dtype, {} if follows() else {whole_of(leaf.shape): np.array(leaf)})
    parts = {
        region_of(shard.index, leaf.shape): np.array(shard.data)
        for shard in leaf.addressable_shards
        if shard.replica_id == 0
    }
    return Pieces(leaf.shape, np.dtype(leaf.dtype), parts)


class Gathering:
    """An array that is put together again, as far as this process needs it.

    Args:
      like: its shape, its dtype and, where it is to lie on a mesh, its sharding.
    """

    def __init__(self, like: Any) -> None:
        self.shape, self.dtype = tuple(like.shape), np.dtype(like.dtype)
        self.sharding = getattr(like, "sharding", None)
        if self.sharding is None:
            wanted = {whole_of(self.shape)}
        else:
            indices = self.sharding.addressable_devices_indices_map(self.shape).values()
            wanted = {region_of(index, self.shape) for index in indices}
        self._missing = {region: math.prod(_sizes(region)) for region in wanted}
        self._found: dict[Region, np.ndarray] = {}

    def needs(self, region: Region) -> bool:
        """Whether a piece that lies there is one to add."""
        return any(_common(region, own) is not None for own in self._missing)

    def add(self, region: Region, values: np.ndarray) -> None:
        """Take over what is needed of a piece."""
        for own in self._missing:
            common = _common(region, own)
            if common is None:
                continue
            if own == region:
                self._found[own] = values
            else:
                if own not in self._found:
                    self._found[own] = np.empty(_sizes(own), self.dtype)
                self._found[own][_within(common, own)] = values[_within(common, region)]
            self._missing[own] -= math.prod(_sizes(common))

    def complete(self) -> bool:
        """Whether as many entries were added as there are: pieces of one array do not overlap."""
        return not any(self._missing.values())

    def array(self) -> np.ndarray | jax.Array:
        """The array: on the host without a sharding, else on this process's devices."""
        found = {region: self._found.get(region, np.empty(_sizes(region), self.dtype)) for region in self._missing}
        if self.sharding is None:
            return found[whole_of(self.shape)]

        def own(index: Any) -> np.ndarray:
            return found[region_of(index, self.shape)]

        return jax.make_array_from_callback(self.shape, self.sharding, own)


def _sizes(region: Region) -> list[int]:
    return [end - begin for begin, end in region]


def _common(one: Region, other: Region) -> Region | None:
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return found if all(begin < end for begin, end in found) else None


def _within(inner: Region, outer: Region) -> tuple[slice, ...]:
    return tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(inner, outer, strict=True))
