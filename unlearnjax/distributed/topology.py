"""Machines by name: what their chips can do, and their devices to compile for, without having them."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

from unlearnjax.errors import UserError, nearest


class Chip(NamedTuple):
    """One device. `link`: bytes per second that it sends along one axis of a mesh: of a TPU's torus the two links of
    one axis, of GPUs all of NVLink. `layer`: seconds that a group of candidates costs in each pass through a layer
    beside its products (OLMo-1B's size on an H100: 1 candidate against 8 and 16; not measured on TPUs)."""

    flops: float  # bfloat16, dense, per second
    memory: float  # bytes
    bandwidth: float  # bytes of main memory per second
    link: float
    tpu: bool = True
    layer: float = 0.0


# cloud.google.com/tpu/docs/v5e, v5p, v6e (interconnect: of all ports of a chip, over the torus's axes); NVIDIA's
# data sheets of the SXM modules (NVLink: one direction).
CHIPS = {
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 1600e9 / 8 / 2),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 4800e9 / 8 / 3),
    "v6e": Chip(918e12, 32 * 2**30, 1600e9, 3200e9 / 8 / 2),
    "a100": Chip(312e12, 80e9, 2039e9, 300e9, tpu=False, layer=3e-4),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, tpu=False, layer=3e-4),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, tpu=False, layer=3e-4),
}
JAX_SHARE = 0.75  # of a GPU's memory that JAX takes by default (XLA_PYTHON_CLIENT_MEM_FRACTION)
NODE = 8  # GPUs that NVLink joins
NETWORK = 400e9 / 8  # bytes per second and GPU between machines, as DGX H100 has it (InfiniBand NDR)
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_DEEP = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
}  # fmt: skip
_CORES = ("v5p",)  # whose slices are named by the number of cores, two to a chip


def known_chip(kind: str) -> Chip | None:
    """The chip that a device says it is (`jax.Device.device_kind`); None: it is not in `CHIPS`, whose GPUs are the SXM
    modules."""
    said = kind.lower().replace("lite", "e").replace(" ", "")
    if "pcie" in said or "nvl" in said:
        return None
    found = next((name for name in CHIPS if name in said), "v5p" if "tpuv5" in said else None)
    return None if found is None else CHIPS[found]


def chip_of(kind: str, devices: int, memory: int) -> Chip:
    """`known_chip` with as much memory as it has; an A100 where it is not known.

    Args:
      devices: of the job. More GPUs than NVLink joins send as fast as the network between machines lets them.
    """
    chip = (known_chip(kind) or CHIPS["a100"])._replace(memory=float(memory))
    return chip if chip.tpu or devices <= NODE else chip._replace(link=NETWORK)


class Topology(NamedTuple):
    """A machine: `name` as libtpu knows it (`v5e:4x4`), or `h100-8`."""

    kind: str
    name: str
    devices: int

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]


def parse_topology(text: str) -> Topology:
    """`v5e:16x16`, `v5e-256` or `h100-8`.

    TPU slices by number are Google's names: of v5e and v6e the number of chips, of v5p that of cores, two to a chip
    (v5p-64 has 32 chips). v4 is not known: libtpu gives two devices to each of its chips.

    Raises:
      UserError: no such kind of device, or no such slice of it.
    """
    found = re.fullmatch(r"([a-z]\w*?)(?::(\d+(?:x\d+)+)|-(\d+))", text.strip().lower())
    if not found or found[1] not in CHIPS:
        kind = found[1] if found else text.split(":")[0].split("-")[0]
        hint = nearest(kind, CHIPS) if kind not in CHIPS else "; give v5e:4x4, v5e-16 or h100-8"
        raise UserError(f"--topology {text!r}: is no machine that is known{hint}")
    kind, shape, number = found[1], found[2], int(found[3] or 0)
    if not CHIPS[kind].tpu:
        if shape or number < 1:
            raise UserError(f"--topology {text}: GPUs are given by their number, as in {kind}-8")
        if number > NODE:
            raise UserError(
                f"--topology {text}: GPUs are planned within one machine, of at most {NODE}; nothing is known "
                "here of what is between machines"
            )
        return Topology(kind, f"{kind}-{number}", number)
    known = _DEEP if kind in _CORES else _FLAT
    if shape is None:
        chips = number // 2 if kind in _CORES else number
        if chips not in known or (kind in _CORES and number % 2):
            scale = 2 if kind in _CORES else 1
            named = ", ".join(f"{kind}-{n * scale}" for n in known)
            raise UserError(f"--topology {text}: no such slice; known: {named}, or its shape, as in {kind}:{known[8]}")
        shape = known[chips]
    axes = [int(x) for x in shape.split("x")]
    if len(axes) != (3 if kind in _CORES else 2) or min(axes) < 1:
        raise UserError(f"--topology {text}: {kind} is a torus of {'3' if kind in _CORES else '2'} axes: {known[8]}")
    devices = 1
    for size in axes:
        devices *= size
    return Topology(kind, f"{kind}:{shape}", devices)


def tpu_devices(topology: Topology) -> list[Any]:
    """The TPU devices of a slice that need not be there; programs can be compiled for them.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    beside = Path(sys.prefix) / "tpu" / "libtpu" / "libtpu.so"  # where this project's `make` puts it
    if beside.exists():
        os.environ.setdefault("TPU_LIBRARY_PATH", str(beside))
    elif "TPU_LIBRARY_PATH" not in os.environ and importlib.util.find_spec("libtpu") is None:
        raise UserError("plan: compiling for TPUs needs their compiler; install it: pip install libtpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices)
    except Exception as error:  # the plugin raises what its C library reports
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--topology {topology.name}: libtpu knows no such slice ({reason})") from None
