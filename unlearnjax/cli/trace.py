"""`unlearnjax trace`."""

import argparse
from pathlib import Path

from unlearnjax.cli.commands import mesh_sizes, say


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, help="a model folder or hub id")
    text = "rows with prompt, subject and attribute (the first token of the answer), or with input and output"
    p.add_argument("--facts", required=True, metavar="F", help=f"JSON, JSONL, parquet or a hub data set: {text}")
    p.add_argument("--out", required=True, help="a new or empty folder")
    text = "what is restored: hidden, mlp, attention (default: all)"
    p.add_argument("--kinds", nargs="+", metavar="K", default=["hidden", "mlp", "attention"], help=text)
    text = "layers restored together, of mlp and attention (default: 10 of 48)"
    p.add_argument("--window", type=int, help=text)
    p.add_argument("--noise", type=float, default=3.0, help="in standard deviations of the embeddings (default: 3)")
    p.add_argument("--draws", type=int, default=10, help="of noise for each fact (default: 10)")
    p.add_argument("--seed", type=int, default=1, help="of the noise (default: 1)")
    text = "how effects are averaged: as ROME defines them, or as Selective Amnesia's figures do (default: rome)"
    p.add_argument("--semantics", default="rome", help=f"rome or sha256: {text}")
    p.add_argument(
        "--by", metavar="K", help="what the layers are recommended by (default: mlp, or the first kind traced)"
    )
    p.add_argument("--width", type=int, help="how many layers to recommend (default: 3 of 8)")
    p.add_argument("--most", type=int, metavar="N", help="trace the first N facts that the model knows (default: all)")
    p.add_argument("--dtype", default="float32", help="of the weights: float32, bfloat16 or float16")


def trace(a: argparse.Namespace) -> None:
    """Trace, and print what to unlearn."""
    from unlearnjax.recipes.trace import run_trace
    from unlearnjax.tracing.trace import Settings

    settings = Settings(tuple(a.kinds), a.window, a.noise, a.draws, a.seed)
    report = run_trace(
        a.model, a.facts, a.out, settings, semantics=a.semantics, by=a.by, width=a.width, most=a.most, dtype=a.dtype,
        command=a.command_line, progress=not a.quiet, resume=a.resume, stop=a.stop, say=say, mesh=mesh_sizes(a),
    )  # fmt: skip
    counts, best, found = report["counts"], report["recommended"], report["effects"]
    left = f"{counts['wrong']} the model gets wrong, {counts['skipped']} skipped"
    print(f"facts:  {counts['traced']} traced of {counts['known']} known; {left}")
    print(f"noise:  p(answer) {found['clean']:.3f} -> {found['corrupted']:.3f}")
    first, last = best["layers"]
    agree = "" if best["stability"] is None else f", {100 * best['stability']:.0f}% of resamples agree"
    why = f"{100 * best['share']:.0f}% of its effect{agree}"
    print(f"layers: {first} to {last} (by {best['kind']}: {why})")
    print(f"page:   {Path(a.out) / 'trace.html'}")
