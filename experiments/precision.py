"""What bfloat16 base weights and activations change in the scores (adapters, optimizer and merges are float32 in both).

Command (LUME is a folder with the task's parquet files, from the hub: llmunlearningsemeval2025organization; the same
command goes on after a stop with --resume added):

    python experiments/precision.py --forget LUME/forget_validation.parquet --retain LUME/retain_validation.parquet \\
        --nonmembers LUME/mia/member.jsonl --out out/precision

Models and data are those of semeval_ties.py --scale small (a --work folder of its models serves here too). The recipe
is confirmation.yml: an over- and an under-forgetting LoRA and two of their merges, three seeds each, on the validation
split: once with the base in float32, once with the same base rounded to bfloat16, as `--dtype` of the command line has
it. Everything else is the same, row order and initialisation too.

Writes a run per dtype under --out, and --results: each model's official scores in both, and the difference with its
interval (as in intervals.py: a bootstrap over documents and seeds, both dtypes' scores of a document drawn together).
Hardware: see the JSON.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

from _images import save
from _small import add_arguments, load_lume, run_or_read, small_models, write_sources
from intervals import bootstrap, by_seed, outcome

from unlearnjax.models.language_model import load_model
from unlearnjax.recipes.load import load_recipe

HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16")


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(p)
    p.add_argument("--recipe", default=str(HERE / "confirmation.yml"))
    p.add_argument("--out", required=True)
    p.add_argument("--resume", action="store_true", help="go on with the unfinished runs in --out")
    p.add_argument("--results", default=str(HERE / "results" / "precision.json"), help="the JSON file to write")
    return p.parse_args()


def main() -> None:
    a = arguments()
    work = Path(a.work)
    data = load_lume(a.forget, a.retain, a.members, a.nonmembers, a.model_seed)
    small_models(work, data, seed=a.model_seed, epochs=a.epochs)
    sources = write_sources(data, work, a.forget, a.retain, a.nonmembers)
    recipe = load_recipe(a.recipe)
    reports, outcomes = {}, {}
    for dtype in DTYPES:
        out = Path(a.out) / dtype
        base, gold = (load_model(str(work / f"{name}-seed{a.model_seed}"), dtype) for name in ("base", "gold"))
        reports[dtype] = run_or_read(
            a.resume, base, sources, out, recipe, gold=gold, command=["python", "experiments/precision.py"],
            title=f"A pair and its merges, base in {dtype}",
        )  # fmt: skip
        outcomes[dtype] = {m["name"]: outcome(out / "generations" / m["name"]) for m in reports[dtype]["models"]}
    # A candidate may have diverged in one of them.
    groups = by_seed([name for name in outcomes[DTYPES[0]] if name in outcomes[DTYPES[1]]])
    found = {}
    for name, seeds in groups.items():
        both = {dtype: [outcomes[dtype][one] for one in seeds] for dtype in DTYPES}
        found[name] = bootstrap(both, DTYPES[0], 2000, 0)
    last = reports[DTYPES[-1]]
    kept = {key: last[key] for key in ("recipe", "data", "hardware")}
    losses = {
        dtype: {c["name"]: statistics.fmean(c["curves"]["loss"][-32:]) for c in reports[dtype]["candidates"]}
        for dtype in DTYPES
    }
    save({"models": found, "mean_of_the_last_32_losses": losses, **kept}, Path(a.results))
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """As Markdown: a row per model, bfloat16's scores and how far they are from float32's."""
    scores = ("task_aggregate", "membership_auc", "forgotten", "retained")
    lines = ["| Model | " + " | ".join(f"{s} | less float32's" for s in scores) + " |",
             "| --- |" + " ---: |" * 2 * len(scores)]  # fmt: skip
    for name, both in found.items():
        cells = []
        for score in scores:
            own = both[DTYPES[-1]].get(score)
            if own is None:  # no attack without non-members
                cells.append("|")
                continue
            low, high = own["difference_interval"]
            cells.append(f"{own['value']:.3f} | {own['difference']:+.3f} [{low:+.3f}, {high:+.3f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
