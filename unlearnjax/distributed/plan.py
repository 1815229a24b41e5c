"""A plan before you pay: the programs of a job compiled for a machine that is not there, and what they take."""

import re
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from unlearnjax.distributed.choose import best_way, fits, meshes, ways
from unlearnjax.distributed.costs import Costs, costs
from unlearnjax.distributed.estimate import candidates_apart, candidates_together, estimate, remat_of
from unlearnjax.distributed.mesh import check_sizes, describe_sizes, make_mesh
from unlearnjax.distributed.programs import (
    Program,
    Workload,
    bytes_on_a_device,
    generation_step,
    merge_step,
    training_step,
)
from unlearnjax.distributed.topology import JAX_SHARE, Chip, Topology, tpu_devices
from unlearnjax.errors import UserError
from unlearnjax.models.config import ModelConfig

TRIED = 3  # meshes that are compiled where none is asked for
_RESERVED = 2**28  # bytes that programs may not have: v5e's compiler gives them 15.75 of 16 GiB
_TOO_LARGE = re.compile(r"\(([\d.]+)([KMGT])\) exceeds available HBM \(([\d.]+)([KMGT])\)")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiled(NamedTuple):
    """One program on one mesh. Bytes are of one device.

    held: arguments by kind, what stays there beside them, what tiles pad arguments with, results that take no
    argument's place, the program's code.
    temporary: what it needs beside them; where it does not fit, what it would.
    total: at its largest. available: what a program may have. costs: None where it does not fit.
    """

    name: str
    fits: bool
    held: dict[str, int]
    temporary: int
    total: int
    available: int
    costs: Costs | None
    compile_seconds: float

    def seconds(self, chip: Chip) -> dict[str, float]:
        """What each of the chip's limits alone takes, with collectives along one axis of its links at a time."""
        if self.costs is None:
            return {}
        return {
            "products": self.costs.flops / chip.flops,
            "memory": self.costs.bytes / chip.bandwidth,
            "links": self.costs.sent / chip.link,
        }

    def bound(self, chip: Chip) -> tuple[str, float]:
        """The limit that takes longest, and how long."""
        own = self.seconds(chip)
        name = max(own, key=own.__getitem__)
        return name, own[name]


def _text(folder: Path, pattern: str) -> str | None:
    """Of the program: parts of it for a chip's SparseCores are written beside it, and are smaller."""
    found = max(folder.glob(pattern), key=lambda path: path.stat().st_size, default=None)
    return None if found is None else found.read_text(encoding="utf-8", errors="replace")


def compile_program(program: Program, chip: Chip) -> Compiled:
    """Compile a program for the devices of its arguments' shardings.

    Raises:
      JaxRuntimeError: it does not compile, for another reason than its memory.
    """
    arguments = {kind: bytes_on_a_device(tree) for kind, tree in program.held.items()}
    beside = {kind: bytes_on_a_device(tree) for kind, tree in program.beside.items()}
    held = {**arguments, **beside}
    began = time.perf_counter()
    kept = jax.config.values["jax_enable_compilation_cache"]
    # A program for devices that are not there can be kept, but not read back.
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # it keeps in mind whether it is used
    try:
        with tempfile.TemporaryDirectory() as name:
            options = {
                "xla_dump_to": name, "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": ".*partitioner.*"
            }  # fmt: skip
            try:
                compiled = program.lower().compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                large = _TOO_LARGE.search(str(error))
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                needed, available = 0, int(chip.memory)
                if large:
                    needed = int(float(large[1]) * _UNITS[large[2]])
                    available = int(float(large[3]) * _UNITS[large[4]])
                seconds = time.perf_counter() - began
                total = needed + sum(beside.values())
                return Compiled(program.name, False, held, needed, total, available, None, seconds)
            optimized = _text(Path(name), "*.after_optimizations.txt") or compiled.as_text()
            partitioned = _text(Path(name), "*.after_*before_pipeline-end.txt")
    finally:
        jax.config.update("jax_enable_compilation_cache", kept)
        compilation_cache.reset_cache()
    memory = compiled.memory_analysis()
    held["padding"] = memory.argument_size_in_bytes - sum(arguments.values())
    held["results"] = memory.output_size_in_bytes - memory.alias_size_in_bytes
    held["code"] = memory.generated_code_size_in_bytes
    total = sum(held.values()) + memory.temp_size_in_bytes
    # The compiler answers for the program alone, not for what is beside it.
    fits, own = not beside or total + _RESERVED <= chip.memory, costs(optimized, partitioned)
    seconds = time.perf_counter() - began
    return Compiled(
        program.name, fits, held, memory.temp_size_in_bytes, total, int(chip.memory), own, seconds
    )  # fmt: skip


class Way(NamedTuple):
    """How a step goes through the model: what the backward pass recomputes, and how many of a device's candidates are
    together in it."""

    remat: str
    together: int
    candidates: int  # of the device


class Tried(NamedTuple):
    """A mesh, how the training step goes, what it takes, and what the other programs that were compiled for it take."""

    sizes: dict[str, int]
    way: Way
    training: Compiled
    others: tuple[Compiled, ...] = ()

    @property
    def fits(self) -> bool:
        return all(own.fits for own in (self.training, *self.others))


class Plan(NamedTuple):
    """The meshes that were compiled, and the fastest at training of those whose programs all fit (None: none)."""

    topology: Topology
    workload: Workload
    tried: list[Tried]
    best: Tried | None


def make_plan(
    config: ModelConfig,
    topology: Topology,
    workload: Workload,
    sizes: Mapping[str, int] | None = None,
    *,
    tries: int = TRIED,
    whole: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Plan:
    """Compile a job's programs for a TPU slice.

    Args:
      sizes: of the mesh; None: the `tries` that an estimate calls fastest are compiled, and the fastest whose programs
        all fit is taken.
      whole: the generation step and a merge must fit too, not the training step alone.
      say: told what is being compiled.

    Raises:
      UserError: no compiler for TPUs, it failed at every mesh, or the mesh is not of the topology's devices.
    """
    devices = tpu_devices(topology)
    chip = topology.chip
    wanted = [dict(sizes)] if sizes is not None else meshes(config, workload, topology.devices, chip)[:tries]
    tried = []
    for own in wanted:
        try:
            tried.append(_training(config, own, devices, workload, topology, say))
        except jax.errors.JaxRuntimeError as error:  # a fault of the compiler's, which other meshes may not meet
            failed = f"mesh {describe_sizes(own)}: the compiler failed ({' '.join(str(error).split())[:200]})"
            say(failed)
    if not tried:
        raise UserError(f"--topology {topology.name}: {failed}; try another --mesh")
    best = None
    # The fastest first: of those behind the first that fits nothing more needs to be known.
    order = sorted((t for t in tried if t.training.fits), key=lambda t: t.training.bound(chip)[1])
    for own_try in order:
        if whole:
            say(f"compiling the generation step and a merge, mesh {describe_sizes(own_try.sizes)}")
            tried[tried.index(own_try)] = own_try = _with_others(own_try, config, devices, workload, chip)
        if own_try.fits:
            best = own_try
            break
    return Plan(topology, workload, tried, best)


def _training(
    config: ModelConfig, sizes: dict[str, int], devices: list[Any], w: Workload, topology: Topology,
    say: Callable[[str], None],
) -> Tried:  # fmt: skip
    """The training step on one mesh, the first way that the compiler says fits: what the closed form calls fastest, and
    then what takes least."""
    mesh, chip = make_mesh(sizes, devices), topology.chip
    order = ways(config, w, sizes, chip)
    least = min(order, key=lambda way: estimate(config, way, sizes, chip).held)
    for way in dict.fromkeys((order[0], least)):
        own = _way(config, way, sizes)
        say(f"compiling the training step for {topology.name}, mesh {describe_sizes(sizes)}, {described(own)}")
        tried = Tried(sizes, own, compile_program(training_step(config, mesh, way), chip))
        if tried.fits:
            break
    return tried


def _way(config: ModelConfig, w: Workload, sizes: Mapping[str, int]) -> Way:
    own = candidates_apart(w, sizes)
    return Way(remat_of(config, w), candidates_together(w, own), own)


def described(way: Way) -> str:
    """`remat linears, 4 of 8 candidates at a time`."""
    some = "" if way.together == way.candidates else f", {way.together} of {way.candidates} candidates at a time"
    return f"remat {way.remat}{some}"


def _with_others(tried: Tried, config: ModelConfig, devices: list[Any], w: Workload, chip: Chip) -> Tried:
    mesh = make_mesh(tried.sizes, devices)
    others = generation_step(config, mesh, w), merge_step(config, mesh, w, "ties", {"density": 0.2})
    return tried._replace(others=tuple(compile_program(own, chip) for own in others))


def _gib(size: float) -> float:
    return round(size / 2**30, 2)


def as_plain(found: Compiled, chip: Chip) -> dict[str, Any]:
    """For JSON."""
    out: dict[str, Any] = {
        "program": found.name,
        "fits": found.fits,
        "gib": {
            **{kind: _gib(size) for kind, size in found.held.items()},
            "temporaries": _gib(found.temporary),
            "total": _gib(found.total),
            "available": _gib(found.available),
        },
        "compile_seconds": round(found.compile_seconds, 1),
    }
    if found.costs is not None:
        c = found.costs
        out |= {
            "flops": float(f"{c.flops:.4g}"),
            "bytes": float(f"{c.bytes:.4g}"),
            "collectives": {
                kind: {"times": own.times, "bytes_sent": float(f"{own.bytes:.4g}")}
                for kind, own in c.collectives.items()
            },
            "seconds": {k: float(f"{v:.3g}") for k, v in found.seconds(chip).items()},
            "bound": found.bound(chip)[0],
        }
        if c.unknown:
            out["loops_of_unknown_length"] = c.unknown
    return out


def plan_as_plain(found: Plan) -> dict[str, Any]:
    """For JSON."""
    chip = found.topology.chip
    return {
        "topology": found.topology.name,
        "devices": found.topology.devices,
        "workload": found.workload._asdict(),
        "tried": [
            {
                "mesh": describe_sizes(t.sizes),
                "way": t.way._asdict(),
                **as_plain(t.training, chip),
                "others": [as_plain(own, chip) for own in t.others],
            }
            for t in found.tried
        ],
        "best": None if found.best is None else describe_sizes(found.best.sizes),
    }


def by_analysis(
    config: ModelConfig, topology: Topology, w: Workload, sizes: Mapping[str, int] | None
) -> dict[str, Any]:
    """For GPUs, which nothing here compiles for: the closed forms of `estimate` of the mesh that they call best."""
    chip = topology.chip._replace(memory=JAX_SHARE * topology.chip.memory)
    if sizes is None:
        sizes = meshes(config, w, topology.devices, chip)[0]
    check_sizes(sizes, topology.devices)
    way, own = best_way(config, w, sizes, chip)
    return {
        "topology": topology.name, "devices": topology.devices, "workload": w._asdict(), "best": describe_sizes(sizes),
        "way": _way(config, way, sizes)._asdict(), "fits": fits(own, chip.memory),
        "gib": {"total": _gib(own.held), "available": _gib(chip.memory)},
        "flops": float(f"{own.flops:.4g}"), "sent": float(f"{own.sent:.4g}"),
        "seconds": {"products": float(f"{own.flops / chip.flops:.3g}"), "links": float(f"{own.sent / chip.link:.3g}")},
        "by": "closed form",
    }  # fmt: skip


def render(plain: Mapping[str, Any]) -> str:
    """The plan as text."""
    lines = [f"{plain['topology']}: {plain['devices']} devices, {plain['workload']['candidates']} candidates"]
    if plain.get("by"):
        lines += _rendered_estimate(plain)
        return "\n".join(lines)
    for own in plain["tried"]:
        lines += [f"\nmesh {own['mesh']}: {described(Way(**own['way']))}", *_rendered(own)]
        for other in own["others"]:
            lines += _rendered(other)
    if plain["best"] is None:
        lines.append("\nnone of these fits: more devices, fewer candidates, or a smaller --micro-batch or --length")
    else:
        lines.append(f"\nbest: --mesh {plain['best']}")
    return "\n".join(lines)


def _rendered_estimate(plain: Mapping[str, Any]) -> list[str]:
    word = "should fit" if plain["fits"] else "should not fit"
    return [
        f"GPUs by analysis: closed forms, nothing was compiled; {JAX_SHARE:.0%} of the memory is JAX's by default",
        f"  {word}: about {plain['gib']['total']} of {plain['gib']['available']} GiB",
        f"  step: {plain['flops']:.3g} FLOPs, {plain['sent']:.3g} bytes sent; about "
        f"{1000 * max(plain['seconds'].values()):.3g} ms at the chip's limits",
        f"best: --mesh {plain['best']}; {described(Way(**plain['way']))}",
    ]


def _rendered(own: Mapping[str, Any]) -> list[str]:
    gib = own["gib"]
    parts = ", ".join(f"{kind} {size}" for kind, size in gib.items() if kind not in ("total", "available"))
    lines = [
        f"  {own['program']}: {'fits' if own['fits'] else 'does not fit'}, {gib['total']} of {gib['available']} GiB a "
        f"device ({parts})"
    ]
    if "flops" in own:
        sent = ", ".join(f"{c['times']:g} {kind} {c['bytes_sent']:.3g} B" for kind, c in own["collectives"].items())
        limits = ", ".join(f"{kind} {1000 * s:.3g}" for kind, s in own["seconds"].items())
        lines.append(f"    {own['flops']:.3g} FLOPs, {own['bytes']:.3g} B of memory moved; sent: {sent or 'nothing'}")
        least = 1000 * max(own["seconds"].values())
        lines.append(f"    about {least:.3g} ms at the chip's limits, bound by {own['bound']} (ms: {limits})")
    if own.get("loops_of_unknown_length"):
        lines.append("    the length of a loop is not in the program: its turns count once")
    return lines
