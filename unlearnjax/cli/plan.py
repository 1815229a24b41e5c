"""`unlearnjax plan`."""

import argparse
import json
from pathlib import Path
from typing import get_args

from unlearnjax.cli.commands import mesh_sizes, say
from unlearnjax.errors import UserError
from unlearnjax.models.config import Remat


def add_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, help="a model folder, which needs no more than config.json, or a hub id")
    text = "the machine: v5e:16x16, v5e-256 (Google's names: of v5p they count cores, two to a chip), h100-8"
    p.add_argument("--topology", required=True, metavar="T", help=text)
    p.add_argument("--candidates", type=int, default=16, metavar="N", help="default: 16")
    text = "rows of each side in a step, per candidate (default: 4)"
    p.add_argument("--micro-batch", type=int, default=4, help=text)
    p.add_argument("--length", type=int, default=256, help="tokens of a row (default: 256)")
    p.add_argument("--rank", type=int, default=32, help="of the LoRAs, which are on all linears (default: 32)")
    p.add_argument("--objective", default="zjuklab", metavar="O", help="what trains (default: zjuklab)")
    p.add_argument("--dtype", default="bfloat16", help="of the base weights (default: bfloat16)")
    text = "what the backward pass recomputes: none, linears or full (default: what is fastest and fits)"
    p.add_argument("--remat", choices=get_args(Remat), help=text)
    text = "as in a recipe: candidates in groups of so many (default: as many at once as fit)"
    p.add_argument("--tokens-at-once", type=int, metavar="N", help=text)
    text = "tokens of the forget set and of the retain set, each (default: 100000)"
    p.add_argument("--set-tokens", type=int, default=100_000, help=text)
    p.add_argument("--tries", type=int, default=3, help="meshes to compile, where --mesh names none (default: 3)")
    p.add_argument("--out", metavar="FILE", help="write the plan as JSON too")


def plan(a: argparse.Namespace) -> None:
    """Compile a job for a machine that need not be there, and print what it takes."""
    from unlearnjax.distributed.plan import by_analysis, make_plan, plan_as_plain, render
    from unlearnjax.distributed.programs import Workload
    from unlearnjax.distributed.topology import parse_topology
    from unlearnjax.io.atomic import staged_file
    from unlearnjax.io.huggingface import check_dtype, load_config, resolve_config
    from unlearnjax.objectives.objective import TERMS, expand

    counts = {
        "candidates": 1,
        "micro_batch": 1,
        "length": 2,
        "rank": 1,
        "set_tokens": 2,
        "tries": 1,
        "tokens_at_once": 1,
    }
    for name, least in counts.items():
        value = getattr(a, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if a.out is not None and not Path(a.out).expanduser().resolve().parent.is_dir():
        raise UserError(f"--out {a.out}: there is no such folder; make it first")
    check_dtype(a.dtype)
    topology = parse_topology(a.topology)
    terms = tuple(expand(a.objective, "--objective"))
    known = {"forget", "retain", None}
    odd = [name for name in terms if not {TERMS[name].side, TERMS[name].beside} <= known or TERMS[name].parameters]
    if odd:
        raise UserError(
            f"--objective {a.objective}: plan knows the terms of forget and retain rows alone, not {odd[0]}"
        )
    config = load_config(resolve_config(a.model))
    if a.length > config.max_positions:
        raise UserError(f"--length {a.length}: the model's context holds {config.max_positions} tokens")
    work = Workload(
        a.candidates, a.micro_batch, a.length, a.rank, terms, a.dtype, a.set_tokens, tokens_at_once=a.tokens_at_once,
        remat=a.remat,
    )  # fmt: skip
    sizes = mesh_sizes(a)
    if topology.chip.tpu:
        progress = (lambda _: None) if a.quiet else say
        found = plan_as_plain(make_plan(config, topology, work, sizes, tries=a.tries, say=progress))
    else:
        found = by_analysis(config, topology, work, sizes)
    print(render(found))
    if a.out:
        with staged_file(a.out) as path:
            path.write_text(json.dumps({"model": a.model, **found}, indent=1) + "\n", encoding="utf-8")
