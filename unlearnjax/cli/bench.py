"""`unlearnjax bench merge` and `unlearnjax bench train`: a table as it goes, and JSON lines."""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from unlearnjax.cli.commands import say
from unlearnjax.errors import UserError
from unlearnjax.models.config import Remat

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def add_options(p: argparse.ArgumentParser) -> None:
    """The two benchmarks, as commands of their own."""
    sub = p.add_subparsers(dest="bench", metavar="merge|train", required=True)

    def common(q: argparse.ArgumentParser) -> None:
        q.add_argument("--dtype", default="f32", help="f32, bf16 or f16 (default: f32)")
        q.add_argument("--repeats", type=int, default=7, help="timed runs of each (default: 7)")
        q.add_argument("--mesh", metavar="A=D,...", help="devices that share the work, as in candidate=2,data=4 (see "
                       "`run`; default: one device)")  # fmt: skip
        q.add_argument("--json", metavar="FILE", help="add one JSON line per measurement to this file")

    q = sub.add_parser("merge", help="merge throughput beside a copy of the same bytes", allow_abbrev=False)
    q.add_argument("--method", nargs="+", default=["linear", "consensus", "ties"], metavar="M", help="see `methods`")
    q.add_argument("--semantics", help="which definition of them (default: each method's own default)")
    q.add_argument("--density", type=float, help="for methods that have one (default: 0.2)")
    q.add_argument("--n", type=int, nargs="+", default=[8], metavar="N", help="candidates (default: 8)")
    q.add_argument("--size", default="4M", help="entries per candidate, such as 4M or 1G (default: 4M)")
    common(q)
    q = sub.add_parser("train", help="candidate-tokens per second of N candidates in one program", allow_abbrev=False)
    q.add_argument("--n", type=int, nargs="+", default=[1, 2, 4, 8], metavar="N", help="candidates (default: 1 2 4 8)")
    q.add_argument("--model", metavar="FOLDER", help="a folder with a config.json, whose shape is taken, with random "
                   "weights (default: 4 layers of width 256, vocabulary 4096)")  # fmt: skip
    q.add_argument("--micro-batch", type=int, default=4, help="forget rows, and retain rows, per step (default: 4)")
    q.add_argument("--length", type=int, default=128, help="tokens per row (default: 128)")
    q.add_argument("--rank", type=int, default=32, help="of the LoRA adapters (default: 32)")
    q.add_argument("--dropout", type=float, default=0.0, help="on the adapters' inputs (default: 0)")
    text = "what the backward pass recomputes: none, linears or full (default: as a run here would)"
    q.add_argument("--remat", choices=get_args(Remat), help=text)
    q.add_argument("--tokens-at-once", type=int, metavar="N", help="as in a recipe: candidates in groups of so many")
    common(q)


def bench(a: argparse.Namespace) -> None:
    """Measure, print a row after each, and keep the JSON lines."""
    for name in ("repeats", "micro_batch", "length", "rank", "tokens_at_once"):
        value = getattr(a, name, None)
        if value is not None and value < 1:
            raise UserError(f"bench: --{name.replace('_', '-')} must be at least 1, not {value}")
    if not 0 <= getattr(a, "dropout", 0.0) < 1:
        raise UserError(f"bench: --dropout must be at least 0 and below 1, not {a.dropout}")
    if min(a.n) < 1:
        raise UserError(f"bench: --n must be at least 1, not {min(a.n)}")
    if a.dtype not in {*DTYPES, *DTYPES.values()}:
        raise UserError(f"bench: unknown dtype {a.dtype!r}; valid: {', '.join(DTYPES)}")
    dtype = DTYPES.get(a.dtype, a.dtype)
    (_merges if a.bench == "merge" else _training)(a, dtype)


def _merges(a: argparse.Namespace, dtype: str) -> None:
    from unlearnjax.bench.merging import measure
    from unlearnjax.bench.timing import mesh_named, parse_size
    from unlearnjax.merging.api import find_rule

    size, mesh = parse_size(a.size), mesh_named(a.mesh)
    for method in a.method:  # all of them before the first is measured
        find_rule(method, a.semantics)
    settings = {} if a.density is None else {"density": a.density}
    columns = ("method", "semantics", "N", "ms", "copies", "a call: copies", "GB/s", "% of copy", "compile s")
    rows = _Table(columns, a.json)
    for count in a.n:
        for method in a.method:
            names = [p.name for p in find_rule(method, a.semantics)[1].hyperparameters]
            own = {name: value for name, value in settings.items() if name in names}
            found = measure(
                method, candidates=count, size=size, dtype=dtype, semantics=a.semantics, settings=own, mesh=mesh,
                repeats=a.repeats,
            )  # fmt: skip
            copies = [f"{found[name]['median']:.2f}" for name in ("over_copy", "call_over_copy")]
            shown = (method, found["semantics"], count, _ms(found), *copies, found["gb_per_second"],
                     found["percent_of_copy"], found["compile_seconds"])  # fmt: skip
            rows.add(shown, found)
    print(f"\n{found['device']} x {found['devices']}, {size} entries of {dtype} each. copies: in times that a copy of "
          "the N deltas takes;\na call: of merge(...) itself, which checks for NaN, and on a CPU finds thresholds "
          "outside of the program.\nGB/s: N deltas read once and the result written; % of copy: of the bandwidth of "
          "that copy.")  # fmt: skip


def _training(a: argparse.Namespace, dtype: str) -> None:
    from unlearnjax.bench.timing import mesh_named
    from unlearnjax.bench.training import SMALL, measure
    from unlearnjax.io.huggingface import load_config

    config, mesh = SMALL if a.model is None else load_config(a.model), mesh_named(a.mesh)
    columns = ("N", "together", "remat", "ms per step", "candidate-steps/s", "candidate-tokens/s", "TFLOP/s",
               "% of matmul", "MFU %", "states MiB", "temporaries MiB", "compile s")  # fmt: skip
    rows = _Table(columns, a.json)
    for count in a.n:
        found = measure(
            config, candidates=count, micro_batch=a.micro_batch, length=a.length, rank=a.rank, dtype=dtype,
            dropout=a.dropout, mesh=mesh, remat=a.remat, tokens_at_once=a.tokens_at_once, repeats=a.repeats,
        )  # fmt: skip
        mfu = "" if found["mfu_percent"] is None else found["mfu_percent"]
        shown = (count, found["together"], found["remat"], _ms(found), found["steps_per_second"],
                 f"{found['tokens_per_second']:.0f}", found["tflops"], found["percent_of_matmul"], mfu,
                 found["state_mib"], found["temporary_mib"], found["compile_seconds"])  # fmt: skip
        rows.add(shown, found)
        for line in found["idle"]:
            say(f"warning: bench: N = {count}: {line}")
    print(f"\n{found['device']} x {found['devices']}, {found['parameters'] / 1e6:.1f}M parameters in {dtype}, random; "
          f"a step is {a.micro_batch} forget and {a.micro_batch} retain rows of {a.length} tokens per candidate "
          "(NPO + GDR + KLR, AdamW).\nTFLOP/s: of a device, the model's own products, without what the backward pass "
          f"recomputes; % of matmul: of a large matrix product there ({found['matmul_tflops']:.4g} TFLOP/s); "
          "MFU: of the\npublished rate, where it is known. together: candidates of a device that go through the model "
          "at once.")  # fmt: skip


def _ms(found: Mapping[str, Any]) -> str:
    return f"{1000 * found['seconds']['median']:.1f}"


class _Table:
    """Rows as they come, and their JSON lines."""

    def __init__(self, columns: Sequence[str], file: str | None) -> None:
        self.file = None if file is None else Path(file)
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        self.widths = [max(len(name), 9) for name in columns]
        self._print(columns)

    def add(self, shown: Sequence[Any], found: Mapping[str, Any]) -> None:
        self._print(shown)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(found) + "\n")

    def _print(self, cells: Sequence[Any]) -> None:
        print("  ".join(str(cell).rjust(width) for cell, width in zip(cells, self.widths, strict=True)), flush=True)
