"""Training steps and merges on meshes of this machine's devices, over one device of the same kind.

    python benchmarks/meshes.py --out benchmarks/results/meshes_cpu.json

`unlearnjax bench train` and `unlearnjax bench merge` in a process each, by turns: on one device, and on meshes of
--devices of them. CPU devices share the same cores, so what is measured there is what cutting costs, not what devices
add. On GPUs (`--devices 8` of a machine that has them) it is both.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import _common as bench

AXES = ("candidate", "data", "fsdp", "tensor")
MERGES = ("linear", "consensus", "ties")


def measured(kind: list[str], mesh: str | None, devices: int, quick: bool) -> list[dict[str, Any]]:
    """What `unlearnjax bench` wrote."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "lines.jsonl")
        argv = [sys.executable, "-m", "unlearnjax.cli.main", "bench", *kind, "--json", str(file)]
        argv += ["--repeats", "1" if quick else "7", *(["--mesh", mesh] if mesh else [])]
        own = {"JAX_NUM_CPU_DEVICES": str(devices if mesh else 1)}
        subprocess.run(argv, env=os.environ | own, check=True, stdout=subprocess.DEVNULL)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--devices", type=int, default=2, help="of a mesh (default: 2)")
    p.add_argument("--laps", type=int, default=3)
    p.add_argument("--quick", action="store_true", help="a smoke run; its figures mean nothing")
    a = p.parse_args()
    kinds = {
        "train": ["train", "--n", "2" if a.quick else "8", "--length", "32" if a.quick else "128"],
        "merge": ["merge", "--method", *MERGES, "--n", "8", "--size", "64K" if a.quick else "4M"],
    }
    places = [None, *(f"{axis}={a.devices}" for axis in AXES)]
    found: dict[tuple[str, str | None], list[Any]] = {}
    for lap in range(1 if a.quick else a.laps):
        for kind, options in kinds.items():
            # A merge is cut by entries, whatever the axes are called.
            for mesh in places if kind == "train" else places[:2]:
                own = measured(options, mesh, a.devices, a.quick)
                found.setdefault((kind, mesh), []).append(own)
                print(lap + 1, kind, mesh or "one device", [x["seconds"]["median"] for x in own], flush=True)
    points = []
    for (kind, mesh), laps in found.items():
        for i, last in enumerate(laps[-1]):
            seconds = [lap[i]["seconds"]["median"] for lap in laps]
            alone = [lap[i]["seconds"]["median"] for lap in found[kind, None]]
            points.append({
                "bench": kind, "method": last.get("method"), "mesh": mesh, "candidates": last["candidates"],
                "seconds": bench.spread(seconds), "held_mib": last["held_mib"],
                "speed_over_one_device": bench.ratio(alone, seconds),
            })  # fmt: skip
    result = {"benchmark": "meshes", "hardware": bench.hardware(), "settings": kinds, "points": points}
    bench.write(str(a.out), result)


if __name__ == "__main__":
    main()
