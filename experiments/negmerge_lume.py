"""NegMerge (2410.05583) for a language model, beside ZJUKLAB's pair (2503.21088), on LUME's validation split.

Command (LUME is a folder with the task's parquet files, from the hub: llmunlearningsemeval2025organization; the same
command goes on after a stop with --resume added):

    python experiments/negmerge_lume.py --forget LUME/forget_validation.parquet \\
        --retain LUME/retain_validation.parquet --nonmembers LUME/mia/member.jsonl --out out/negmerge_lume

Models and data are those of semeval_ties.py --scale small (a --work folder of its models serves here too). Two runs:
negmerge_lume_small.yml, whose candidates learn the forget rows and are merged, searched and subtracted; and the pair
`over` and `under` of semeval_ties_small.yml with its mean, its TIES of deltas and its TIES of factors. They share base,
gold and data, so that one table has both.

Writes the runs to --out/negmerge and --out/pair, and --results: both reports without curves, and each model's scores
with 95% intervals and their differences from NegMerge's (as in intervals.py: a bootstrap over documents).
Expected: nothing, the paper has no language model. Measured (one seed, about an hour on 2 cores): consensus forgets
.279 [.253, .307] and keeps .994, the firm candidate of the pair .930 and .884. The rule keeps 95% of the base's retain
score on the sample, which the pair does not promise: read the table by both columns. Hardware: see the JSON.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from _small import add_arguments, load_lume, small_models, write_sources
from intervals import PLANE, bootstrap, outcome

from unlearnjax.recipes.load import load_recipe
from unlearnjax.recipes.run import run
from unlearnjax.recipes.schema import Evaluation, Recipe
from unlearnjax.report.schema import FILE, read_report
from unlearnjax.report.scores import render_markdown_table

HERE = Path(__file__).parent
PAIR = ("over", "under")
PAIR_MERGES = ("pair-linear", "pair-ties-delta", "pair-ties-factors")


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(p)
    p.add_argument("--recipe", default=str(HERE / "negmerge_lume_small.yml"))
    p.add_argument("--out", required=True)
    p.add_argument("--resume", action="store_true", help="go on with the unfinished runs in --out")
    p.add_argument("--results", default=str(HERE / "results" / "negmerge_lume.json"), help="the JSON file to write")
    return p.parse_args()


def pair(evaluation: Evaluation) -> Recipe:
    """The firm and the mild candidate of semeval_ties_small.yml alone, and their merges; the same questions."""
    recipe = load_recipe(str(HERE / "semeval_ties_small.yml"))
    return dataclasses.replace(
        recipe,
        name="pair",
        candidates=tuple(c for c in recipe.candidates if c.name in PAIR),
        merges=tuple(m for m in recipe.merges if m.name in PAIR_MERGES),
        training=dataclasses.replace(recipe.training, waypoints=0),
        evaluation=evaluation,
    )


def main() -> None:
    a = arguments()
    work, out = Path(a.work), Path(a.out)
    data = load_lume(a.forget, a.retain, a.members, a.nonmembers, a.model_seed)
    base, gold = small_models(work, data, seed=a.model_seed, epochs=a.epochs)
    sources = write_sources(data, work, a.forget, a.retain, a.nonmembers)
    negmerge = load_recipe(a.recipe)
    command = ["python", "experiments/negmerge_lume.py"]
    reports = {}
    for name, recipe in (("negmerge", negmerge), ("pair", pair(negmerge.evaluation))):
        if a.resume and (out / name / FILE).exists():
            reports[name] = read_report(out / name)
            continue
        title = f"{recipe.name} on LUME's validation split (small)"
        resume = a.resume and (out / name).exists()
        reports[name] = run(base, sources, out / name, recipe, gold=gold, command=command, title=title, resume=resume)
    models = together(reports)
    own = {m["name"]: out / run / "generations" / m["name"] for run in reports for m in reports[run]["models"]}
    found = bootstrap({name: [outcome(folder)] for name, folder in own.items()}, "negmerge", 2000, 0)
    save_results({**reports, "intervals": found}, Path(a.results))
    print(render_markdown_table({"models": models}))
    print("\n".join(planes(found)))


def together(reports: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The models of both runs; base and gold, which are the same, once."""
    found: dict[str, dict[str, Any]] = {}
    for report in reports.values():
        for model in report["models"]:
            found.setdefault(model["name"], model)
    return list(found.values())


def planes(found: dict[str, dict[str, Any]]) -> list[str]:
    """Forgotten and retained with intervals, and forgotten less NegMerge's, as a Markdown table."""

    def cell(own: dict[str, Any], value: str, interval: str, sign: str) -> str:
        low, high = own[interval]
        return f"{own[value]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    rows = []
    for name, own in found.items():
        cells = [cell(own[score], "value", "interval", "") for score in PLANE]
        gap = "" if name == "negmerge" else cell(own["forgotten"], "difference", "difference_interval", "+")
        rows.append(f"| {name} | {' | '.join(cells)} | {gap} |")
    return ["| Model | Forgotten | Retained | Forgotten less negmerge's |", "| --- | ---: | ---: | ---: |", *rows]


def save_results(parts: dict[str, dict[str, Any]], path: Path) -> None:
    """Both reports without their candidates' curves, and the intervals; numbers cut to five digits."""
    short = {
        name: part
        if "candidates" not in part
        else {**part, "candidates": [{k: v for k, v in c.items() if k != "curves"} for c in part["candidates"]]}
        for name, part in parts.items()
    }
    plain = json.loads(json.dumps(short), parse_float=lambda x: float(f"{float(x):.5g}"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
