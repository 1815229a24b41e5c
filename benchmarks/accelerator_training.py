"""Candidate-steps per second and MFU of N candidates of OLMo-1B's size on one accelerator, over torch and PEFT.

    python benchmarks/accelerator_training.py --out benchmarks/results/accelerator_training_h100.json

Ours is `unlearnjax bench train`, in one process for all N: rank 32 on every linear, 4 + 4 rows of 256 tokens
(--micro-batch) per candidate and step, dropout .05, base and activations in bfloat16, adapters and AdamW in float32.
The other side is ZJUKLAB's recipe as its code does it (benchmarks/_torch_recipe.py; adapters in float32 and no
autocast, as PEFT and that code have it) with as many rows, as wide, one candidate after another, before ours and
after. Nothing is gained here by length buckets, which leave out most of what torch pads of real rows.

MFU counts the products that the model needs (not what is recomputed) over the device's published rate.
"""

import argparse
import json
import statistics
import tempfile
from typing import Any

import _common as bench
import _torch_recipe
from _subject import LIMIT, SIZES, make

DROPOUT, DTYPE = 0.05, "bfloat16"


def ours(folder: str, counts: list[int], micro_batch: int, length: int, repeats: int) -> list[dict[str, Any]]:
    """Call it in a child: it fills the device's memory."""
    from unlearnjax.bench.training import measure
    from unlearnjax.io.huggingface import load_config

    found = []
    for n in counts:
        found.append(
            measure(
                load_config(folder), candidates=n, micro_batch=micro_batch, length=length, dtype=DTYPE,
                dropout=DROPOUT, repeats=repeats,
            )
        )  # fmt: skip
        bench.emit({name: found[-1][name] for name in ("candidates", "steps_per_second", "tflops", "mfu_percent")})
    return found


def theirs(subject: Any, micro_batch: int, steps: int, laps: int) -> dict[str, Any]:
    """Call it in a child."""
    settings = _torch_recipe.Settings(DTYPE, micro_batch, DROPOUT, steps, True)
    info, answer = _torch_recipe.setup(subject, settings)
    seconds = [answer("lap")["seconds"] for _ in range(laps)]
    return {"device": info["device"], "seconds": seconds, "device_peak_mib": answer("after")["device_peak_mib"]}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--out")
    p.add_argument("--candidates", default="1,2,4,8,16,32", help="the values of N (default: 1,2,4,8,16,32)")
    p.add_argument("--micro-batch", type=int, default=4, help="rows of each side in a step (default: 4)")
    p.add_argument("--repeats", type=int, default=7, help="of our step, for each N (default: 7)")
    p.add_argument("--quick", action="store_true", help="a tiny model, for a look; figures that mean nothing")
    a = p.parse_args()
    counts = [1, 2] if a.quick else [int(n) for n in a.candidates.split(",")]
    size = "tiny" if a.quick else "olmo-1b"
    given = argparse.Namespace(dtype=DTYPE, size=size, quick=a.quick, forget=None, retain=None, tokenizer=None)
    with tempfile.TemporaryDirectory() as folder:
        subject = bench.in_child(make, folder + "/model", given)
        before = bench.in_child(theirs, subject, a.micro_batch, 2 if a.quick else 12, 2)
        points = bench.in_child(ours, folder + "/model", counts, a.micro_batch, 32 if a.quick else LIMIT, a.repeats)
        after = bench.in_child(theirs, subject, a.micro_batch, 2 if a.quick else 12, 2)
    seconds = [*before["seconds"], *after["seconds"]]
    rate = 1 / statistics.median(seconds)
    torch = {**after, "seconds": bench.spread(seconds, 4), "steps_per_second": float(f"{rate:.4g}")}
    for point in points:
        point["over_torch"] = bench.spread([point["steps_per_second"] * x for x in seconds])
        point["over_alone"] = float(f"{point['steps_per_second'] / points[0]['steps_per_second']:.3g}")
    result = {
        "benchmark": "accelerator_training", "hardware": subject.hardware, "model": SIZES[size]._asdict(),
        "torch": torch, "points": points,
    }  # fmt: skip
    print(json.dumps(torch))
    for point in points:
        print(
            f"N = {point['candidates']}: {point['steps_per_second']} candidate-steps/s, {point['over_torch']} times "
            f"torch, {point['over_alone']} times N = {counts[0]}, MFU {point['mfu_percent']}%"
        )
    bench.write(a.out, result)


if __name__ == "__main__":
    main()
