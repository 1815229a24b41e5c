"""The lambda sweep of several merges on validation images: all points in one program, or a program called point by
point, or (the obvious loop) a new model and a call of the library per point.

    python benchmarks/image_sweep.py --out benchmarks/results/image_sweep_cpu.json

Reported: seconds of the first call (which compiles) and of later ones, how many programs were compiled, peak memory,
the bytes of weights that a point reads and writes, and whether all ways give the same scores.
"""

import argparse
import time
from typing import Any

import _common as bench

LAMBDAS = 21


def one_way(way: str, merges: int, rows: int, widths: list[int], laps: int) -> dict[str, Any]:
    import jax
    import numpy as np

    from unlearnjax.data.labelled import labelled
    from unlearnjax.evaluation.images import Scored, Sheet, edit, score, sweep
    from unlearnjax.models.vision.classifier import new_classifier
    from unlearnjax.models.vision.net import classifier_subject
    from unlearnjax.models.vision.resnet import ResNetConfig

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    sizes = tuple(widths)
    config = ResNetConfig(10, stem="cifar", embedding=sizes[0], widths=sizes, depths=(1,) * len(sizes))
    subject = classifier_subject(new_classifier("resnet", config, tuple("0123456789"), 32, jax.random.key(0)))
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (rows, 32, 32, 3), np.uint8)
    sheet = Sheet(labelled(pixels, rng.integers(0, 10, rows)), subject.fixed)
    directions = [
        jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), subject.trained) for _ in range(merges)
    ]
    lambdas = np.linspace(0, 1, LAMBDAS).tolist()

    def lap() -> Scored:
        if way != "obvious loop":
            found = sweep(
                subject.net, subject.trained, directions, lambdas, {"x": sheet}, one_program=way == "one program"
            )
            return found["x"]
        each = [[score(subject.net, edit(subject.trained, d, float(k)), sheet) for k in lambdas] for d in directions]
        return Scored(*(np.stack([[getattr(s, f) for s in row] for row in each]) for f in Scored._fields))

    before = len(compiled)
    begin = time.perf_counter()
    found = lap()
    first = time.perf_counter() - begin
    programs, compiling = len(compiled) - before, sum(compiled[before:])
    times = [bench.clock(lap) for _ in range(laps)]
    weights = sum(x.nbytes for x in jax.tree.leaves(subject.trained))
    return {
        "way": way, "merges": merges, "lambdas": LAMBDAS, "rows": rows, "first_call_seconds": first,
        "seconds": bench.spread(times), "programs": programs, "compile_seconds": compiling,
        "weight_bytes_per_point": 3 * weights,
        "images_per_second": bench.spread([merges * LAMBDAS * rows / t for t in times]),
        "checksum": float(found.confidence.sum(dtype=np.float64)), **bench.memory(bench.jax_peak_mib()),
    }  # fmt: skip


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    p.add_argument("--merges", type=int, default=6)
    p.add_argument("--rows", type=int, default=500)
    p.add_argument("--widths", type=int, nargs="+", default=[16, 32, 64])
    p.add_argument("--ways", nargs="+", default=["one program", "point by point", "obvious loop"])
    p.add_argument("--laps", type=int, default=2)
    p.add_argument("--out", help="write the whole result to this JSON file")
    a = p.parse_args()
    lines = [bench.in_child(one_way, way, a.merges, a.rows, a.widths, a.laps) for way in a.ways]
    for line in lines:
        bench.emit(line)
        if abs(line["checksum"] / lines[0]["checksum"] - 1) > 1e-4:
            raise SystemExit(f"{line['way']}: other scores than {lines[0]['way']}")
    bench.write(a.out, {"benchmark": "image_sweep", "hardware": bench.in_child(bench.hardware), "cases": lines})


if __name__ == "__main__":
    main()
