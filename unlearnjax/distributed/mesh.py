"""The mesh: which devices share what. Candidates, rows of a batch, and the base weights in two ways."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from jaxtyping import PyTree

from unlearnjax.distributed.processes import agreed, largest, require_same
from unlearnjax.errors import UserError, check_known

CANDIDATE, DATA, FSDP, TENSOR = "candidate", "data", "fsdp", "tensor"
AXES = {
    CANDIDATE: "candidates lie apart: adapters, optimizers and their rows; nothing is exchanged in training",
    DATA: "rows of a batch lie apart; the base weights are whole on each",
    FSDP: "rows lie apart and so do the base weights, which are gathered layer by layer",
    TENSOR: "each linear's heads or wide axis lies apart; activations are summed",
}


WEIGHTS_SHARE = 0.4  # of a device's memory, at most, by default; adapters, optimizers and activations want the rest


def parse_mesh(text: str) -> dict[str, int]:
    """`candidate=4,fsdp=2` to sizes by axis; axes that are not named have one device.

    Raises:
      UserError: an unknown axis, one given twice, or a size that is not a whole number above 0.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, equals, value = (x.strip() for x in part.partition("="))
        check_known([name], AXES, "axis", "--mesh")
        if name in sizes:
            raise UserError(f"--mesh: axis {name} is given twice")
        if not equals or not value.isdecimal() or int(value) < 1:
            raise UserError(f"--mesh: {name} must be a whole number above 0, as in candidate=4,fsdp=2, not {value!r}")
        sizes[name] = int(value)
    return sizes


def check_sizes(sizes: Mapping[str, int], devices: int) -> None:
    """Raise `UserError` where the sizes do not multiply to the number of devices."""
    wanted = math.prod(sizes.values())
    if wanted != devices:
        raise UserError(
            f"--mesh {describe_sizes(sizes)}: is for {wanted} device{'s' * (wanted > 1)}, and there "
            f"{'is' if devices == 1 else 'are'} {devices}; the sizes must multiply to that"
        )


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """As `--mesh` takes it, without the axes of one device: `candidate=4,fsdp=2`."""
    return ",".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes.get(axis, 1) > 1) or "candidate=1"


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all axes in their order, those not in `sizes` with one device.

    Neighbours in the list of devices, whose links are the fastest, are neighbours along `tensor`, then along `fsdp`.

    Args:
      devices: default: all of this job's, laid out by JAX as suits their links.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    check_sizes(sizes, jax.device_count() if devices is None else len(devices))
    types = (AxisType.Auto,) * len(shape)
    if devices is None:
        return jax.make_mesh(shape, tuple(AXES), axis_types=types)
    return Mesh(np.asarray(devices).reshape(shape), tuple(AXES), axis_types=types)


def default_sizes(
    devices: int, candidates: int, weight_bytes: int, memory_bytes: int | None, rows: int = 0
) -> dict[str, int]:
    """Sizes for so many devices: base weights cut no finer than they must be, then candidates apart, then rows, and by
    heads what rows do not divide among.

    Args:
      weight_bytes: of the base. memory_bytes: of a device, of which the base may take WEIGHTS_SHARE; None: unknown, and
        the weights stay whole. rows: of a candidate in a step; 0: as many as one likes.
    """
    fits = memory_bytes is None
    fsdp = 1
    while not fits:
        fits = weight_bytes / fsdp <= WEIGHTS_SHARE * (memory_bytes or 0) or fsdp == devices
        fsdp = fsdp if fits else next(d for d in range(fsdp + 1, devices + 1) if devices % d == 0)
    rest = devices // fsdp
    apart = math.gcd(rest, candidates)
    data = math.gcd(rest // apart, rows // math.gcd(rows, fsdp))  # fsdp cuts rows too
    return {CANDIDATE: apart, DATA: data, FSDP: fsdp, TENSOR: rest // apart // data}


def device_memory() -> int | None:
    """Bytes that programs may take on a device; None where it does not tell, as CPUs."""
    if jax.default_backend() == "cpu":
        return None
    found = agreed(lambda: (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"))
    return None if found is None else int(found)


def free_memory() -> int | None:
    """Bytes of `device_memory` that are not taken now, on this job's fullest device; None where one does not tell.

    All processes of a job must call it at the same place.
    """
    if device_memory() is None:
        return None
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    told = all("bytes_limit" in one and "bytes_in_use" in one for one in stats)
    free = min(one["bytes_limit"] - one["bytes_in_use"] for one in stats) if told else 0
    least, untold = largest(-(free // 2**20), not told)  # `largest` is of 32 bits
    return None if untold else max(0, -least * 2**20)


def choose_mesh(
    sizes: Mapping[str, int] | Mesh | None,
    candidates: int,
    weight_bytes: int,
    rows: int = 0,
    best: Callable[[int, int], Mapping[str, int]] | None = None,
) -> Mesh | None:
    """The mesh of a job, or None where it runs on one device.

    Args:
      sizes: by axis; a mesh, which is taken as it is; or None for `default_sizes` of all devices, but one device where
        they are a single process's CPU devices: these share the same cores.
      best: gives the default sizes instead, of the number of devices and the bytes of each, where that is known.

    Raises:
      UserError: see `make_mesh`; or the processes of a job are not told the same sizes.
    """
    if isinstance(sizes, Mesh):
        return sizes if sizes.size > 1 else None
    # Before anything else is asked of all: a process that was told its mesh would not answer.
    require_same({"--mesh": None if sizes is None else describe_sizes(sizes)})
    if sizes is None:
        if jax.default_backend() == "cpu" and jax.process_count() == 1:
            return None
        memory = device_memory()
        if best is not None and memory is not None:
            sizes = best(jax.device_count(), memory)
        else:
            sizes = default_sizes(jax.device_count(), candidates, weight_bytes, memory, rows)
    mesh = make_mesh(sizes)
    return mesh if mesh.size > 1 else None


def mesh_of(tree: PyTree[Any]) -> Mesh | None:
    """The mesh that a tree's arrays lie on: of the first that lies on one of several devices; None: there is none."""
    for leaf in jax.tree.leaves(tree):
        mesh = getattr(getattr(leaf, "sharding", None), "mesh", None)
        if isinstance(mesh, Mesh) and mesh.size > 1:
            return mesh
    return None
