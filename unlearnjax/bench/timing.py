"""Timing jobs turn by turn, and the devices they run on."""

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from unlearnjax.distributed.mesh import describe_sizes, make_mesh, parse_mesh
from unlearnjax.distributed.topology import known_chip
from unlearnjax.errors import UserError
from unlearnjax.models.precision import precision


def laps(jobs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each job, `repeats` times, in turn: what slows the machine for a while slows all of them.

    Each runs once before, untimed. A job's result is waited for.
    """
    for job in jobs.values():
        jax.block_until_ready(job())
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            begin = time.perf_counter()
            jax.block_until_ready(job())
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most, to four digits."""
    found = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def device(mesh: Mesh | None) -> dict[str, Any]:
    """What the figures are of: the devices that took part."""
    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "device": first.device_kind,
        "devices": 1 if mesh is None else mesh.size,
        "mesh": None if mesh is None else describe_sizes(mesh.shape),
    }


@functools.cache
def matmul_rate(dtype: str) -> float:
    """Operations per second of large products of square matrices on the first device, the best of five: what a step
    made of nothing else could reach there. Entries are random: an accelerator is faster at zeros, and waits for the
    host between single ones."""
    edge, count = (2048, 1) if jax.default_backend() == "cpu" else (8192, 8)
    exact = precision(jnp.dtype(dtype))
    a = jax.random.normal(jax.random.key(0), (edge, edge), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=exact))
    return 2 * edge**3 * count / min(laps({"products": lambda: [product(a) for _ in range(count)]}, 5)["products"])


def published_rate(dtype: str) -> float | None:
    """The device's operations per second by its data sheet; None where it is not known for the device or dtype."""
    chip = known_chip(jax.devices()[0].device_kind)
    return None if chip is None or dtype == "float32" else chip.flops


def bytes_held(tree: Any) -> int:
    """What the first device has of a tree's arrays."""
    first = jax.devices()[0]
    return sum(s.data.nbytes for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first)


def parse_size(text: str) -> int:
    """`4M` as 4 * 2**20; K, M and G are powers of 1024.

    Raises:
      UserError: no such size.
    """
    factors = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
    number, factor = (text[:-1], factors[text[-1].lower()]) if text[-1:].lower() in factors else (text, 1)
    if not number.isdigit() or int(number) == 0:
        raise UserError(f"bench: size {text!r} is no number of entries; give one such as 4M (K, M, G: powers of 1024)")
    return int(number) * factor


def mesh_named(text: str | None) -> Mesh | None:
    """`candidate=2,data=4` as a mesh of the first 8 devices; None for one device.

    Raises:
      UserError: see `parse_mesh`; or more devices than there are.
    """
    if text is None:
        return None
    sizes = parse_mesh(text)
    wanted, found = math.prod(sizes.values()), jax.devices()
    if wanted > len(found):
        raise UserError(f"bench: mesh {text} needs {wanted} devices and there are {len(found)}")
    mesh = make_mesh(sizes, found[:wanted])
    return mesh if wanted > 1 else None
