"""The podium of SemEval-2025 Task 4, and what they beat, side by side: alone, and as candidates of one merge.

Command (LUME is a folder with the task's parquet files, from the hub: llmunlearningsemeval2025organization; the same
command goes on after a stop with --resume added):

    python experiments/podium.py --forget LUME/forget_validation.parquet --retain LUME/retain_validation.parquet \\
        --nonmembers LUME/mia/member.jsonl --out out/podium

Models and data are those of semeval_ties.py --scale small (a --work folder of its models serves here too). Every
candidate of podium_small.yml is trained with each seed (of the adapter and of the order of rows), all in one run, but
SUGD once: it takes rows in their order and draws nothing. They are
merged with those of its seed: ZJUKLAB (TIES of an over- and an under-forgetting LoRA), NegMerge (consensus of four
that learn, subtracted), Selective Amnesia (MLPs of the layers that a trace of the forget set recommends), SUGD, AGAD,
gradient ascent, GradDiff, NPO, SimNPO, RMU; and merges across the first three systems.

`--scale paper --model FOLDER_OR_HUB_ID` takes podium_paper.yml: the published settings of each, for a model of 16
layers or more that has memorised LUME; it needs an accelerator and has not been run.

Writes the run under --out, and --results: each system's official scores with intervals (as in intervals.py: a bootstrap
over documents and seeds), of the difference from ZJUKLAB's merge too; the shares of degenerate answers, the probe, and,
with `--evaluate full`, what comes back after relearning and after rounding to 4 bits. Expected from the task's
leaderboard (1B, not the same data): SUGD .688, Selective Amnesia .652, ZJUKLAB .483. Hardware: see the JSON.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from _images import save
from _small import add_arguments, load_lume, small_models, write_sources
from intervals import bootstrap, by_seed, outcome, table

from unlearnjax.models.language_model import load_model
from unlearnjax.recipes.load import load_recipe, with_suite
from unlearnjax.recipes.run import run
from unlearnjax.recipes.schema import Candidate, Merge, Recipe
from unlearnjax.report.schema import FILE, read_report

HERE = Path(__file__).parent
AGAINST = "zjuklab"
HIDDEN = ("relearning", "quantisation", "sampled", "gold_gap")  # of the full suite, what is kept


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(p)
    p.add_argument("--scale", choices=("small", "paper"), default="small")
    p.add_argument("--model", help="for --scale paper: a folder or hub id")
    p.add_argument("--gold", help="for --scale paper: a model trained on the retain set only")
    p.add_argument("--recipe", help="default: experiments/podium_SCALE.yml")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--evaluate", choices=("official", "full"))
    p.add_argument("--out", required=True)
    p.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out")
    p.add_argument("--results", help="the JSON file to write (default: experiments/results/podium_SCALE.json)")
    a = p.parse_args()
    if a.scale == "paper" and a.model is None:
        p.error("--scale paper needs --model")
    return a


def with_seeds(recipe: Recipe, seeds: list[int]) -> Recipe:
    """Every candidate and merge once per seed, called NAME-seedS; a merge is of its seed's candidates. A candidate that
    draws nothing is there once, as NAME."""
    fixed = {c.name for c in recipe.candidates if c.order == "chunked" and c.adapter == "full"}

    def candidate(c: Candidate, seed: int) -> Candidate:
        if c.name in fixed:
            return c
        more = {"init_seed": c.init_seed + seed, "order_seed": c.order_seed + seed}
        return dataclasses.replace(c, name=f"{c.name}-seed{seed}", **more)  # type: ignore[arg-type]

    def merge(m: Merge, seed: int) -> Merge:
        of = [name if name in fixed else f"{name}-seed{seed}" for name in m.of or ()]
        return dataclasses.replace(m, name=f"{m.name}-seed{seed}", of=of)

    return dataclasses.replace(
        recipe,
        candidates=tuple(
            {own.name: own for s in seeds for own in (candidate(c, s) for c in recipe.candidates)}.values()
        ),
        merges=tuple(merge(m, seed) for seed in seeds for m in recipe.merges),
    )


def main() -> None:
    a = arguments()
    data = load_lume(a.forget, a.retain, a.members, a.nonmembers, a.model_seed)
    small, work, out = a.scale == "small", Path(a.work), Path(a.out)
    if small:
        base, gold = small_models(work, data, seed=a.model_seed, epochs=a.epochs)
    else:
        base, gold = load_model(a.model, a.dtype), load_model(a.gold, a.dtype) if a.gold else None
    sources = write_sources(data, work, a.forget, a.retain, a.nonmembers, probe=small)
    recipe = with_seeds(load_recipe(a.recipe or str(HERE / f"podium_{a.scale}.yml")), a.seeds)
    recipe = with_suite(recipe, a.evaluate)
    if a.resume and (out / FILE).exists():
        report = read_report(out)
    else:
        command = ["python", "experiments/podium.py", "--scale", a.scale]
        title = f"The podium of SemEval-2025 Task 4 on LUME ({a.scale})"
        resume = a.resume and out.exists()
        report = run(base, sources, out, recipe, gold=gold, command=command, title=title, resume=resume)
    kept = figures(report, out)
    save(kept, Path(a.results or HERE / "results" / f"podium_{a.scale}.json"))
    print(table(kept["models"], AGAINST))


def figures(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What is kept: scores with intervals by system, and what the score hides by seed."""
    models = {m["name"]: m for m in report["models"]}
    groups = by_seed(list(models))
    outcomes = {name: outcome(folder / "generations" / name) for name in models}
    found = bootstrap({g: [outcomes[n] for n in own] for g, own in groups.items()}, AGAINST, 2000, 0)
    for group, own in groups.items():
        each = [models[name] for name in dict.fromkeys(own)]
        found[group] |= {
            "kind": each[0]["kind"],
            "degenerate": [m["scores"]["degenerate"] for m in each],
            "probe": [(m["scores"]["probe"] or {}).get("accuracy") for m in each],
            "hidden": [{part: m["full"].get(part) for part in HIDDEN} for m in each if "full" in m],
        }
    keep = ("recipe", "data", "hardware", "warnings", "merges", "training")
    return {"against": AGAINST, "models": found, **{key: report[key] for key in keep}}


if __name__ == "__main__":
    main()
