"""The podium of SemEval-2025 Task 4, and what they beat, side by side: alone, and as candidates of one merge.

Command (LUME is a folder with the task's parquet files, from the hub: llmunlearningsemeval2025organization; the same
command goes on after a stop with --resume added):

    python experiments/podium.py --forget LUME/forget_validation.parquet --retain LUME/retain_validation.parquet \\
        --nonmembers LUME/mia/member.jsonl --out out/podium

Models and data are those of semeval_ties.py --scale small (a --work folder of its models serves here too). Every seed
(of the adapter and of the order of rows; SUGD draws nothing and is the same in each) is a run of its own, of all
candidates of podium_small.yml and their merges: ZJUKLAB (TIES of an over- and an under-forgetting LoRA), NegMerge
(consensus of four that learn, subtracted), Selective Amnesia (MLPs of the layers that a trace of the forget set
recommends), SUGD, AGAD, gradient ascent, GradDiff, NPO, SimNPO, RMU; and merges across the first three systems. Seeds
may be run one by one: those of other runs stay in --results.

`--scale paper --model FOLDER_OR_HUB_ID` takes podium_paper.yml: the published settings of each, for a model of 16
layers or more that has memorised LUME; it needs an accelerator and has not been run.

Writes a run per seed under --out, and --results, with a plot beside it: of every seed each model's scores by document
and losses, and of all seeds together each system's official scores with intervals (as in intervals.py: a bootstrap
over documents and seeds), of the difference from ZJUKLAB's merge too; the shares of degenerate answers, the probe,
and, with `--evaluate full`, what comes back after relearning and after rounding to 4 bits. Expected from the task's
leaderboard (1B, not the same data): SUGD .688, Selective Amnesia .652, ZJUKLAB .483. Hardware: see the JSON.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from _images import save
from _small import add_arguments, load_lume, run_or_read, small_models, write_sources
from intervals import PLANE, bootstrap, from_plain, outcome, table, to_plain

from unlearnjax.models.language_model import load_model
from unlearnjax.recipes.load import load_recipe, with_suite
from unlearnjax.recipes.schema import Recipe
from unlearnjax.report.charts import Point
from unlearnjax.report.figure import points_svg

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
    p.add_argument("--resume", action="store_true", help="go on with the unfinished runs in --out")
    p.add_argument("--results", help="the JSON file to write (default: experiments/results/podium_SCALE.json)")
    a = p.parse_args()
    if a.scale == "paper" and a.model is None:
        p.error("--scale paper needs --model")
    return a


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with other draws."""
    return dataclasses.replace(
        recipe,
        candidates=tuple(
            dataclasses.replace(c, init_seed=c.init_seed + seed, order_seed=c.order_seed + seed)
            for c in recipe.candidates
        ),
    )


def main() -> None:
    a = arguments()
    data = load_lume(a.forget, a.retain, a.members, a.nonmembers, a.model_seed)
    small, work = a.scale == "small", Path(a.work)
    if small:
        base, gold = small_models(work, data, seed=a.model_seed, epochs=a.epochs)
    else:
        base, gold = load_model(a.model, a.dtype), load_model(a.gold, a.dtype) if a.gold else None
    sources = write_sources(data, work, a.forget, a.retain, a.nonmembers, probe=small)
    recipe = with_suite(load_recipe(a.recipe or str(HERE / f"podium_{a.scale}.yml")), a.evaluate)
    results = Path(a.results or HERE / "results" / f"podium_{a.scale}.json")
    for seed in a.seeds:
        out = Path(a.out) / f"seed{seed}"
        command = ["python", "experiments/podium.py", "--scale", a.scale, "--seeds", str(seed)]
        title = f"The podium of SemEval-2025 Task 4 on LUME ({a.scale}, seed {seed})"
        own = with_seed(recipe, seed)
        report = run_or_read(a.resume, base, sources, out, own, gold=gold, command=command, title=title)
        others = json.loads(results.read_text(encoding="utf-8"))["seeds"] if results.exists() else []
        others = [one for one in others if one["seed"] != seed]
        seeds = sorted([*others, of_seed(report, out, seed)], key=lambda one: one["seed"])
        save({"against": AGAINST, "models": together(seeds), "seeds": seeds}, results)
        results.with_suffix(".svg").write_text(drawn(seeds), encoding="utf-8")
    found = together(seeds)
    print(table(found, AGAINST))
    for name, own in found.items():
        values = [f"{own[score]['value']:.3f}" for score in PLANE]
        print(f"{name}: forgotten {values[0]}, retained {values[1]}")


def of_seed(report: dict[str, Any], folder: Path, seed: int) -> dict[str, Any]:
    """What is kept of one seed's run: what the scores are made of, and what they hide."""
    outcomes = {m["name"]: outcome(folder / "generations" / m["name"]) for m in report["models"]}
    models = {
        m["name"]: {
            "kind": m["kind"],
            "outcome": to_plain(outcomes[m["name"]]),
            "degenerate": m["scores"]["degenerate"],
            "probe": (m["scores"]["probe"] or {}).get("accuracy"),
            "hidden": {part: m["full"].get(part) for part in HIDDEN} if "full" in m else None,
        }
        for m in report["models"]
    }
    counts = {split: cells.counts.astype(int).tolist() for split, cells in next(iter(outcomes.values())).cells.items()}
    keep = ("recipe", "data", "hardware", "warnings", "merges", "training")
    return {"seed": seed, "counts": counts, "models": models, **{key: report[key] for key in keep}}


def drawn(seeds: list[dict[str, Any]]) -> str:
    """Forgotten against retained, over the seeds; NegMerge's candidates, which are to be subtracted, left out."""
    kinds = {name: own["kind"] for name, own in seeds[0]["models"].items()}
    points = [
        Point(name, kinds[name], own["retained"]["value"], own["forgotten"]["value"])
        for name, own in together(seeds).items()
        if not name.startswith("learn-")
    ]
    return points_svg(points)


def together(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """Every model's scores with intervals, over the seeds that have all of them."""
    names = [name for name in seeds[0]["models"] if all(name in one["models"] for one in seeds)]
    outcomes = {name: [from_plain(one["models"][name]["outcome"], one["counts"]) for one in seeds] for name in names}
    return bootstrap(outcomes, AGAINST, 2000, 0)


if __name__ == "__main__":
    main()
