"""Merge throughput: a method on N made-up deltas in memory, beside a copy of the same bytes."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from unlearnjax.bench.timing import bytes_held, device, laps, spread
from unlearnjax.distributed.rules import sharding
from unlearnjax.errors import UserError
from unlearnjax.merging import merge
from unlearnjax.merging.api import find_rule
from unlearnjax.merging.protocol import Rule

DENSITY = 0.2  # the paper's, for methods that have one


def measure(
    method: str,
    *,
    candidates: int,
    size: int,
    dtype: str = "float32",
    semantics: str | None = None,
    settings: dict[str, Any] | None = None,
    mesh: Mesh | None = None,
    repeats: int = 7,
) -> dict[str, Any]:
    """Time one merge of arrays that are there already: `merge(...)` as it is called, and as a program (`jit(merge)`).

    A call checks for NaN first, and on a CPU it finds thresholds outside of the program, which is faster.

    Args:
      candidates, size: N deltas of that many normally distributed entries.
      settings: hyperparameters; a method with a density takes .2 where none is given.
      mesh: cut the entries over its devices.

    Returns:
      seconds, call_seconds and copy_seconds (of the program, the call and the copy: median, least, most), gb_per_second
      (bytes of the N deltas read once and the result written, over the program's median), percent_of_copy (that over
      the copy's bandwidth), over_copy and call_over_copy (the merge's seconds in copies of the deltas, lap by lap),
      compile_seconds, held_mib (of the first device: its part of the deltas), and what was measured.

    Raises:
      UserError: an unknown method, semantics or hyperparameter; a size that the mesh does not divide.
    """
    _, rule = find_rule(method, semantics)
    has_density = "density" in [p.name for p in rule.hyperparameters]
    chosen = {**({"density": DENSITY} if has_density else {}), **(settings or {})}
    if mesh is not None and size % mesh.size:
        raise UserError(f"bench: {size} entries cannot be cut evenly over {mesh.size} devices")
    deltas, base = _inputs(rule, candidates, size, dtype, mesh)
    key = jax.random.key(0) if rule.needs_key else None

    def run(deltas: jax.Array, base: jax.Array | None) -> jax.Array:
        return merge(deltas, method, semantics=semantics, key=key, base=base, **chosen)

    begin = time.perf_counter()
    program = jax.jit(run).lower(deltas, base).compile()
    compile_seconds = time.perf_counter() - begin
    work = {"copy": copier(deltas), "merge": lambda: program(deltas, base), "call": lambda: run(deltas, base)}
    seconds = laps(work, repeats)
    over = {
        name: spread([a / b for a, b in zip(seconds[name], seconds["copy"], strict=True)]) for name in ("merge", "call")
    }
    moved = deltas.nbytes + deltas.nbytes // candidates
    copied = 2 * deltas.nbytes  # read and written
    rate = moved / spread(seconds["merge"])["median"]
    return {
        "bench": "merge",
        "method": method,
        "semantics": rule.semantics,
        "settings": chosen,
        "candidates": candidates,
        "size": size,
        "dtype": dtype,
        "held_mib": round(bytes_held(deltas) / 2**20, 1),
        "seconds": spread(seconds["merge"]),
        "copy_seconds": spread(seconds["copy"]),
        "over_copy": over["merge"],
        "call_seconds": spread(seconds["call"]),
        "call_over_copy": over["call"],
        "gb_per_second": float(f"{rate / 1e9:.4g}"),
        "percent_of_copy": float(f"{100 * rate * spread(seconds['copy'])['median'] / copied:.3g}"),
        "compile_seconds": float(f"{compile_seconds:.3g}"),
        **device(mesh),
    }


def _inputs(rule: Rule, candidates: int, size: int, dtype: str, mesh: Mesh | None) -> tuple[jax.Array, Any]:
    where = None if mesh is None else sharding(mesh, (None, "merged"), (candidates, size))
    whole = None if mesh is None else sharding(mesh, ("merged",), (size,))
    needs_base = bool(rule.needs_base)

    def make() -> tuple[jax.Array, jax.Array | None]:
        first, second = jax.random.split(jax.random.key(0))
        deltas = jax.random.normal(first, (candidates, size), dtype)
        return deltas, jax.random.normal(second, (size,), dtype) if needs_base else None

    return jax.jit(make, out_shardings=(where, whole if needs_base else None))()


def copier(x: jax.Array) -> Callable[[], Any]:
    """Copies the deltas: numpy into memory that has been written before on a CPU (whose fresh pages would cost more
    than the copy), else a program on the devices."""
    if jax.default_backend() == "cpu" and len(x.sharding.device_set) == 1:
        source = np.asarray(x)
        target = np.empty_like(source)
        target[:] = 0
        return lambda: np.copyto(target, source)
    program = jax.jit(jnp.copy)
    return lambda: program(x)
