"""Where facts live, and whether it helps to unlearn there (Selective Amnesia, 2504.12996).

Command (LUME is a folder with the task's parquet files, from the hub: llmunlearningsemeval2025organization; the same
command goes on after a stop with --resume added):

    python experiments/where_facts_live.py --forget LUME/forget_validation.parquet \\
        --retain LUME/retain_validation.parquet --nonmembers LUME/mia/member.jsonl --out out/where_facts_live

Models and data are those of semeval_ties.py --scale small (a --work folder of its models serves here too); with
`--scale paper --model FOLDER_OR_HUB_ID [--gold ...]`, and no --widths, a model of 16 layers or more that has memorised
LUME, the paper's width (6 of 16 layers) and its settings; it needs an accelerator and has not been run. The base's
facts, the forget set's questions, are traced: hidden states, MLPs, attention. Then Selective Amnesia's objective trains
the MLPs of every contiguous range of layers of each width, three seeds each, all in one run: those of one width in one
program. Each range gets the same settings. Last come all layers.

Writes the trace and the run under --out, and --results, with a plot beside it: the trace's averages, and for every
range the official scores with intervals (as in intervals.py: a bootstrap over documents and seeds), also of the
difference from the range of its width that the trace recommends, and so for all layers. Expected from the paper: early
layers' MLPs hold the facts, and unlearning there is best; it tells no table per range. Hardware: see the JSON.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from _images import save
from _small import add_arguments, load_lume, run_or_read, small_models, write_sources
from intervals import bootstrap, by_seed, outcome

from unlearnjax.models.language_model import load_model
from unlearnjax.recipes.parse import recipe_from
from unlearnjax.recipes.schema import Recipe
from unlearnjax.recipes.trace import run_trace
from unlearnjax.report.charts import Point
from unlearnjax.report.figure import points_svg
from unlearnjax.report.scores import forgotten, retained
from unlearnjax.report.trace import FILE as TRACED
from unlearnjax.report.trace import read_trace
from unlearnjax.tracing.effects import SUBJECT, best_range, default_width

PLANE = ("retained", "forgotten")
HERE = Path(__file__).parent
SETTINGS = {
    "objective": "selective_amnesia", "order": "mixed", "adapter": "full", "modules": "mlp", "weight_decay": 0.0,
    "max_grad_norm": 1.0, "warmup_ratio": 0.0, "micro_batch": 12,
}  # fmt: skip
SCALES = {
    "small": {"order_parameters": {"bucketed": True}, "accumulation": 1, "learning_rate": 5e-4, "epochs": 6},
    "paper": {"accumulation": 10, "learning_rate": 1.5e-5, "epochs": 8, "chat_template": True, "append_eos": False},
}


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(p)
    p.add_argument("--scale", choices=tuple(SCALES), default="small")
    p.add_argument("--model", help="for --scale paper: a folder or hub id")
    p.add_argument("--gold", help="for --scale paper: a model trained on the retain set only")
    p.add_argument("--dtype", default="float32")
    p.add_argument(
        "--widths", type=int, nargs="+", help="of the ranges, in layers (default: 1 2, at paper scale 3 in 8)"
    )
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the order of rows")
    p.add_argument("--learning-rate", type=float, help="default: 5e-4, at paper scale 1.5e-5")
    p.add_argument("--passes", type=int, help="epochs of unlearning (default: 6, at paper scale 8)")
    p.add_argument("--out", required=True)
    p.add_argument("--resume", action="store_true", help="go on with the unfinished work in --out")
    p.add_argument(
        "--results", help="the JSON file to write (default: experiments/results/where_facts_live_SCALE.json)"
    )
    a = p.parse_args()
    if a.scale == "paper" and a.model is None:
        p.error("--scale paper needs --model")
    return a


def widths_of(a: argparse.Namespace, layers: int) -> list[int]:
    return a.widths or ([1, 2] if a.scale == "small" else [default_width(layers)])


def name_of(first: int, width: int) -> str:
    return f"layers {first}" if width == 1 else f"layers {first} to {first + width - 1}"


def recipe_of(a: argparse.Namespace, layers: int) -> Recipe:
    """A candidate for each range and seed."""
    own = {"learning_rate": a.learning_rate, "epochs": a.passes}
    settings = SETTINGS | SCALES[a.scale] | {key: value for key, value in own.items() if value is not None}
    ranges = [
        (first, width)
        for width in dict.fromkeys([*widths_of(a, layers), layers])
        for first in range(layers - width + 1)
    ]
    candidates = [
        {**settings, "name": f"{name_of(first, width)}-seed{seed}", "layers": list(range(first, first + width)),
         "order_seed": 42 + seed}
        for first, width in ranges for seed in a.seeds
    ]  # fmt: skip
    return recipe_from({"name": "where-facts-live", "candidates": candidates, "training": {"buckets": 6}}, "experiment")


def main() -> None:
    a = arguments()
    work, out = Path(a.work), Path(a.out)
    data = load_lume(a.forget, a.retain, a.members, a.nonmembers, a.model_seed)
    if a.scale == "small":
        base, gold = small_models(work, data, seed=a.model_seed, epochs=a.epochs)
    else:
        base, gold = load_model(a.model, a.dtype), load_model(a.gold, a.dtype) if a.gold else None
    sources = write_sources(data, work, a.forget, a.retain, a.nonmembers, probe=a.scale == "small")
    command = ["python", "experiments/where_facts_live.py"]
    if a.resume and (out / "trace" / TRACED).exists():
        trace = read_trace(out / "trace" / TRACED)
    else:
        trace = run_trace(base, a.forget, out / "trace", command=command, resume=a.resume and (out / "trace").exists())
    recipe = recipe_of(a, base.config.layers)
    title = "Selective Amnesia on every range of layers"
    report = run_or_read(a.resume, base, sources, out / "run", recipe, gold=gold, command=command, title=title)
    kept = figures(trace, report, out / "run", widths_of(a, base.config.layers))
    results = Path(a.results or HERE / "results" / f"where_facts_live_{a.scale}.json")
    save(kept, results)
    results.with_suffix(".svg").write_text(drawn(kept), encoding="utf-8")
    print(table(kept))


def figures(trace: dict[str, Any], report: dict[str, Any], folder: Path, widths: list[int]) -> dict[str, Any]:
    """What is kept: the trace's averages, and each range's scores, compared with the one that was found."""
    models = {m["name"]: m for m in report["models"]}
    groups = by_seed(list(models))
    outcomes = {name: outcome(folder / "generations" / name) for name in models}
    by_name = {g: [outcomes[name] for name in own] for g, own in groups.items()}
    curve = trace["effects"]["kinds"]["mlp"][SUBJECT]["mean"]
    found, every = {}, name_of(0, len(curve))
    for width in widths:
        best = name_of(best_range(curve, width), width)
        own = [name_of(first, width) for first in range(len(curve) - width + 1)]
        compared = {name: by_name[name] for name in ("base", "gold", *own, every) if name in by_name}
        found[str(width)] = {"recommended": best, "models": bootstrap(compared, best, 2000, 0)}
        for first, name in enumerate(own):
            found[str(width)]["models"][name]["effect"] = sum(curve[first : first + width])
    scores = {group: [_short(models[n]["scores"]) for n in dict.fromkeys(own)] for group, own in groups.items()}
    kept = ("effects", "recommended", "counts", "settings")
    settings = dataclasses.asdict(recipe_from(report["recipe"], "report").candidates[0])
    return {
        "trace": {key: trace[key] for key in kept}, "ranges": found, "by_seed": scores, "settings": settings,
        "hardware": report["hardware"], "data": report["data"],
    }  # fmt: skip


def drawn(kept: dict[str, Any]) -> str:
    """Forgotten against retained of each range, over the seeds; what the trace recommends is drawn as merges are."""
    recommended = {own["recommended"] for own in kept["ranges"].values()}
    kinds = {"base": "base", "gold": "gold", **dict.fromkeys(recommended, "merge")}
    return points_svg([
        Point(name, kinds.get(name, "candidate"), *(sum(one[score] for one in own) / len(own) for score in PLANE))
        for name, own in kept["by_seed"].items()
    ])  # fmt: skip


def _short(scores: dict[str, Any]) -> dict[str, Any]:
    plane = {"forgotten": forgotten(scores), "retained": retained(scores)}
    return {**plane, **{key: scores[key] for key in ("degenerate", "task_aggregate", "membership_auc")}}


def table(kept: dict[str, Any]) -> str:
    """As Markdown: a row per range."""
    lines = ["| Trained | MLP effect | Forgotten | Retained | Task aggregate | less the recommended one's |",
             "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    mean = lambda name, key: sum(s[key] for s in kept["by_seed"][name]) / len(kept["by_seed"][name])  # noqa: E731
    for own in kept["ranges"].values():
        for name, scores in own["models"].items():
            value = scores["task_aggregate"]
            low, high = value["difference_interval"]
            mark = " (recommended)" if name == own["recommended"] else ""
            effect = f"{scores['effect']:.3f}" if "effect" in scores else ""
            lines.append(
                f"| {name}{mark} | {effect} | {mean(name, 'forgotten'):.3f} | {mean(name, 'retained'):.3f} | "
                f"{value['value']:.3f} [{value['interval'][0]:.3f}, {value['interval'][1]:.3f}] | "
                f"{value['difference']:+.3f} [{low:+.3f}, {high:+.3f}] |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
