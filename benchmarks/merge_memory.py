"""Merges of N deltas in memory: a method beside a copy of the deltas, and TIES beside PEFT's.

    python benchmarks/merge_memory.py --out benchmarks/results/merge_memory_cpu.json

For N = 2, 8 and 30 candidates of 4M entries (30 of 1M), in float32 and bfloat16: seconds, GB/s, and the seconds in
copies of the deltas ("copy": numpy into memory that has been written before; on an accelerator a copy on the device).
PEFT's `ties` (torch, the same number of threads) takes turns with ours on the same 8 x 4M float32 numbers, trimmed to
the same density; its result is compared in the run.
"""

import argparse
import time
from typing import Any

import _common as bench

METHODS = ("linear", "consensus", "magmax", "dare_linear", "ties")
CASES = ((2, "4M"), (8, "4M"), (30, "1M"))


def ours(methods: list[str], repeats: int) -> list[dict[str, Any]]:
    from unlearnjax.bench.merging import measure
    from unlearnjax.bench.timing import parse_size

    found = []
    for dtype in ("float32", "bfloat16"):
        for count, size in CASES:
            for method in methods:
                found.append(measure(method, candidates=count, size=parse_size(size), dtype=dtype, repeats=repeats))
                shown = {k: found[-1][k] for k in ("method", "candidates", "dtype", "over_copy", "call_over_copy")}
                bench._note(str(shown))
    return found


def beside_peft(density: float, laps: int) -> dict[str, Any]:
    """PEFT's `ties` with weights of 1, and ours of its semantics."""
    import jax.numpy as jnp
    import numpy as np
    import torch
    from peft.utils.merge_utils import ties

    from unlearnjax.merging import merge

    deltas = np.random.default_rng(0).standard_normal((8, 4 << 20), np.float32)
    theirs = [torch.from_numpy(x) for x in deltas]
    x = jnp.asarray(deltas)
    seconds: dict[str, list[float]] = {"ours": [], "peft": []}
    for lap in range(laps + 1):
        begin = time.perf_counter()
        mine = merge(x, "ties", semantics="peft", density=density).block_until_ready()  # checked for NaN, unlike PEFT's
        middle = time.perf_counter()
        other = ties(theirs, torch.ones(8), density)
        end = time.perf_counter()
        if lap:  # the first compiles
            seconds["ours"].append(middle - begin)
            seconds["peft"].append(end - middle)
    return {
        "density": density,
        "threads": torch.get_num_threads(),
        "largest_difference": float(np.abs(np.asarray(mine) - other.numpy()).max()),
        "ours_seconds": bench.spread(seconds["ours"]),
        "peft_seconds": bench.spread(seconds["peft"]),
        "peft_over_ours": bench.ratio(seconds["peft"], seconds["ours"]),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--method", nargs="+", default=list(METHODS))
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument("--laps", type=int, default=3, help="of PEFT")
    p.add_argument("--out", help="write the whole result to this JSON file")
    a = p.parse_args()
    result = {
        "benchmark": "merge_memory",
        "hardware": bench.in_child(bench.hardware),
        "merges": bench.in_child(ours, a.method, a.repeats),
        "peft": bench.in_child(beside_peft, 0.2, a.laps),
    }
    for line in (*result["merges"], result["peft"]):
        bench.emit(line)
    bench.write(a.out, result)


if __name__ == "__main__":
    main()
