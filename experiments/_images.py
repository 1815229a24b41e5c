"""What the experiments on images share: the first rows of a data set, and the figures that are kept."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from unlearnjax.report.figure import sweeps_svg


def subset(source: Path, target: Path, rows: int | None) -> str:
    """The first rows of a parquet file, as a file; CIFAR-10's and MNIST's rows are in random order."""
    if not target.exists():
        table = pq.read_table(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table if rows is None else table.slice(0, rows), target)
    return str(target)


def slim(report: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a report: not the candidates' curves."""
    return {key: report[key] for key in ("models", "merges", "rule", "weights", "hardware", "data", "warnings")}


DRAWN = ("consensus", "uniform", "ties", "magmax", "best_single", "conflict_only")


def draw(run: dict[str, Any], path: Path) -> None:
    """A run's curves along lambda, of the merges of all candidates."""
    path.write_text(sweeps_svg(run, DRAWN), encoding="utf-8")


def save(kept: dict[str, Any], path: Path) -> None:
    """Numbers cut to five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    short = json.loads(json.dumps(kept), parse_float=lambda x: float(f"{float(x):.5g}"))
    path.write_text(json.dumps(short, separators=(",", ":")) + "\n", encoding="utf-8")
