"""ZJUKLAB's system (SemEval-2025 Task 4, 2503.21088) on LUME: candidates between over- and under-forgetting, merged.

Command (LUME is a folder with the task's parquet files, from the hub: llmunlearningsemeval2025organization):

    python experiments/semeval_ties.py --forget LUME/forget_validation.parquet \\
        --retain LUME/retain_validation.parquet --nonmembers LUME/mia/member.jsonl --scale small --out out/semeval_ties

`--scale small` trains a 4-layer OLMo of width 256 from scratch on the rows until it knows them by heart, and beside it
a gold model on the retain rows alone (same initialisation, same number of epochs): what perfect unlearning would give.
Its tokenizer is a 4096-entry BPE of the same texts. Members are the forget set's Task3 documents (input + space +
output, as the organisers made theirs); `--nonmembers` are documents that the model has not seen: for the validation
rows LUME's member.jsonl serves, because its documents are those of the train split and of the same kind. The probe is
60 invented general-knowledge questions that are in no split and are learnt by both models.

`--scale paper --model FOLDER_OR_HUB_ID` runs the recipe `zjuklab` on a model that has memorised LUME (the organisers'
OLMo-1B or 7B), without a gold model unless `--gold FOLDER` names one.

Writes the run under --out, and the figures to keep as experiments/results/semeval_ties_SCALE.{json,svg}. Hardware of
the committed figures: 2 CPU cores (see the JSON). Expected from the paper (7B, local): model 1 (over) task aggregate
.968, membership AUC .022; model 2 (under) .659, .818; merged .939, .501.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from _images import save
from _small import add_arguments, load_lume, small_models, write_sources

from unlearnjax.models.language_model import load_model
from unlearnjax.recipes.load import load_recipe, with_suite
from unlearnjax.recipes.run import run
from unlearnjax.report.figure import scatter_svg
from unlearnjax.report.scores import render_markdown_table

HERE = Path(__file__).parent


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(p)
    p.add_argument("--scale", choices=("small", "paper"), default="small")
    p.add_argument("--model", help="for --scale paper: a folder or hub id")
    p.add_argument("--gold", help="for --scale paper: a model trained on the retain set only")
    p.add_argument("--recipe", help="default: experiments/semeval_ties_small.yml, or zjuklab at the paper's scale")
    p.add_argument("--dtype", default="float32")
    p.add_argument("--seed", type=int, default=0, help="added to the candidates' seeds, and the training's")
    p.add_argument("--evaluate", choices=("official", "full"))
    p.add_argument("--out", required=True)
    p.add_argument("--resume", action="store_true", help="go on with the unfinished run in --out")
    p.add_argument("--results", default=str(HERE / "results"), help="where the figures to keep go")
    p.add_argument("--name", help="of these figures' files (default: semeval_ties_SCALE)")
    return p.parse_args()


def main() -> None:
    a = arguments()
    data = load_lume(a.forget, a.retain, a.members, a.nonmembers, a.model_seed)
    small, work = a.scale == "small", Path(a.work)
    if small:
        base, gold = small_models(work, data, seed=a.model_seed, epochs=a.epochs)
    else:
        base, gold = load_model(a.model, a.dtype), load_model(a.gold, a.dtype) if a.gold else None
    sources = write_sources(data, work, a.forget, a.retain, a.nonmembers, probe=small)
    recipe = load_recipe(a.recipe or {"small": str(HERE / "semeval_ties_small.yml"), "paper": "zjuklab"}[a.scale])
    training = dataclasses.replace(recipe.training, seed=recipe.training.seed + a.seed)
    candidates = tuple(
        dataclasses.replace(c, init_seed=c.init_seed + a.seed, order_seed=c.order_seed + a.seed)
        for c in recipe.candidates
    )  # fmt: skip
    recipe = with_suite(dataclasses.replace(recipe, training=training, candidates=candidates), a.evaluate)
    command = ["python", "experiments/semeval_ties.py", "--scale", a.scale]
    title = f"ZJUKLAB's system on LUME ({a.scale})"
    report = run(base, sources, a.out, recipe, gold=gold, command=command, title=title, resume=a.resume)
    save_results(report, Path(a.results), a.name or f"semeval_ties_{a.scale}")
    print(render_markdown_table(report))


def save_results(report: dict[str, Any], folder: Path, name: str) -> None:
    """The report (numbers cut to five digits) and the plot."""
    save(report, folder / f"{name}.json")
    (folder / f"{name}.svg").write_text(scatter_svg(report), encoding="utf-8")


if __name__ == "__main__":
    main()
