"""Does merging beat the best single candidate? Chosen on the validation split, measured on LUME's train split.

First the run, in which the seeds are candidates of one program (hours on 2 CPU cores; the same command goes on after a
stop with --resume added):

    python experiments/semeval_ties.py --forget LUME/forget_train.parquet --retain LUME/retain_train.parquet \\
        --members LUME/mia/member.jsonl --nonmembers LUME/mia/nonmember.jsonl --epochs 30 \\
        --recipe experiments/confirmation.yml --work out/confirmation_models --out out/confirmation \\
        --results out/confirmation_figures

Then, with the merge and the candidate named that were best on the validation split:

    python experiments/confirmation.py --merge NAME --candidate NAME out/confirmation

The recipe's candidates and merges are called NAME-SEED; the seeds differ in the candidates' initialisation, dropout and
order of rows, and base and gold model are the same. The interval is that of a bootstrap over documents (all models'
scores of a document together, each split apart) and over seeds. Writes experiments/results/confirmation.json.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unlearnjax.evaluation.csvs import read_generations
from unlearnjax.evaluation.full.leak import document_of
from unlearnjax.evaluation.semeval import KINDS, row_scores
from unlearnjax.report.schema import read_report

HERE = Path(__file__).parent
SPLITS = ("forget", "retain")


class Cells(NamedTuple):
    """One model's row scores in one run, summed by document (rows) and term (columns), and the numbers of rows."""

    sums: np.ndarray
    counts: np.ndarray


def cells(run: Path, model: str, split: str, documents: Sequence[str], terms: Sequence[tuple[str, str]]) -> Cells:
    place = {document: i for i, document in enumerate(documents)}
    sums, counts = (np.zeros((len(documents), len(terms))) for _ in range(2))
    for row, kind, value in row_scores([read_generations(run / "generations" / model / f"{split}_0.csv")]):
        if kind is not None:
            at = place[document_of(row.id)], terms.index((row.task, KINDS[kind]))
            sums[at] += value
            counts[at] += 1
    return Cells(sums, counts)


def task_aggregate(parts: dict[str, Cells], weights: dict[str, np.ndarray]) -> float:
    """The official harmonic mean, each document counting `weights` times."""
    means = {s: (weights[s] @ parts[s].sums) / np.maximum(weights[s] @ parts[s].counts, 1e-12) for s in SPLITS}
    terms = [*(1 - means["forget"]), *means["retain"]]
    return float(statistics.harmonic_mean([float(min(max(term, 0.0), 1.0)) for term in terms]))


def bootstrap(
    runs: Sequence[dict[str, dict[str, Cells]]], models: Sequence[str], resamples: int, seed: int
) -> dict[str, Any]:
    """Mean over seeds of each model's task aggregate, with 95% intervals, and of the first two models' difference."""
    draw = np.random.default_rng(seed)
    sizes = {s: len(runs[0][models[0]][s].sums) for s in SPLITS}

    def value(model: str, weights: dict[str, np.ndarray], seeds: Sequence[int]) -> float:
        return float(np.mean([task_aggregate(runs[i][model], weights) for i in seeds]))

    ones, every = {s: np.ones(n) for s, n in sizes.items()}, range(len(runs))
    points = {model: value(model, ones, every) for model in models}
    drawn = []
    for _ in range(resamples):
        weights = {s: np.bincount(draw.integers(0, n, n), minlength=n).astype(float) for s, n in sizes.items()}
        seeds = draw.integers(0, len(runs), len(runs))
        drawn.append([value(model, weights, seeds) for model in models])
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    gap = np.array(drawn)[:, 0] - np.array(drawn)[:, 1]
    return {
        "models": {m: {"task_aggregate": points[m], "interval": [low[i], high[i]]} for i, m in enumerate(models)},
        "difference": {
            "of": list(models[:2]), "value": points[models[0]] - points[models[1]],
            "interval": np.quantile(gap, [0.025, 0.975]).tolist(),
        },
    }  # fmt: skip


def by_seed(names: Sequence[str]) -> dict[str, list[str]]:
    """The models NAME-SEED by NAME, in the order of their seeds; one without a seed (base, gold) counts for every seed.

    Raises:
      SystemExit: some model lacks a seed that another one has.
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        stem, _, seed = name.rpartition("-")
        if stem and seed.isdecimal():
            found.setdefault(stem, {})[int(seed)] = name
    seeds = sorted({seed for own in found.values() for seed in own}) or [0]
    for stem, own in found.items():
        if sorted(own) != seeds:
            raise SystemExit(f"{stem} has seeds {sorted(own)} and others have {seeds}; run every seed of every model")
    seeded = {name for own in found.values() for name in own.values()}
    groups: dict[str, list[str]] = {}
    for name in names:
        if name not in seeded:
            groups[name] = [name] * len(seeds)
        else:
            stem = name.rpartition("-")[0]
            groups[stem] = [found[stem][seed] for seed in seeds]
    return groups


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", help="the folder of the finished run")
    p.add_argument("--merge", required=True, help="the merge that was best on the validation split, without its seed")
    p.add_argument("--candidate", required=True, help="the candidate that was best there, without its seed")
    p.add_argument("--resamples", type=int, default=2000)
    p.add_argument("--results", default=str(HERE / "results" / "confirmation.json"))
    a = p.parse_args()

    folder = Path(a.run)
    report = read_report(folder)
    models = {m["name"]: m for m in report["models"]}
    groups = by_seed(list(models))
    for wanted in (a.merge, a.candidate):
        if wanted not in groups:
            raise SystemExit(f"{folder} has no model {wanted!r}; it has {', '.join(groups)}")
    order = [a.merge, a.candidate, *(n for n in groups if n not in (a.merge, a.candidate))]
    documents, terms = {}, {}
    for split in SPLITS:
        rows = read_generations(folder / "generations" / next(iter(models)) / f"{split}_0.csv")
        documents[split] = list(dict.fromkeys(document_of(row.id) for row in rows))
        terms[split] = [(task, kind) for task in sorted({row.task for row in rows}) for kind in KINDS.values()]
    each = {n: {s: cells(folder, n, s, documents[s], terms[s]) for s in SPLITS} for n in models}
    seeds = len(groups[a.merge])
    runs = [{name: each[groups[name][i]] for name in order} for i in range(seeds)]
    found = bootstrap(runs, order, a.resamples, 0)
    gold = next((m["scores"]["membership_auc"] for m in report["models"] if m["kind"] == "gold"), None)
    for name in order:
        own = [models[one]["scores"] for one in dict.fromkeys(groups[name])]
        aucs = [s["membership_auc"] for s in own]
        found["models"][name] |= {
            "kind": models[groups[name][0]]["kind"],
            "task_aggregate_by_seed": [s["task_aggregate"] for s in own],
            "membership_auc_by_seed": aucs,
            "membership_auc_interval_by_seed": [s["membership_auc_interval"] for s in own],
            "membership_auc_minus_gold_by_seed": [None if gold is None or x is None else x - gold for x in aucs],
            "degenerate_forget_by_seed": [s["degenerate"]["forget"] for s in own],
            "degenerate_retain_by_seed": [s["degenerate"]["retain"] for s in own],
            "probe_by_seed": [(s["probe"] or {}).get("accuracy") for s in own],
        }
    result = {"seeds": seeds, "resamples": a.resamples, "recipe": report["recipe"], "data": report["data"],
              "hardware": report["hardware"], **found}  # fmt: skip
    Path(a.results).parent.mkdir(parents=True, exist_ok=True)
    short = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.5g}"))
    Path(a.results).write_text(json.dumps(short, indent=1) + "\n", encoding="utf-8")
    print("| model | task aggregate | membership AUC by seed | minus gold's |\n|---|---|---|---|")
    for name, entry in found["models"].items():
        low, high = entry["interval"]
        aucs, gaps = (
            " ".join("-" if x is None else f"{x:.3f}" for x in entry[key])
            for key in ("membership_auc_by_seed", "membership_auc_minus_gold_by_seed")
        )
        print(f"| {name} | {entry['task_aggregate']:.3f} [{low:.3f}, {high:.3f}] | {aucs} | {gaps} |")
    gap = found["difference"]
    print(f"{a.merge} - {a.candidate}: {gap['value']:+.3f} [{gap['interval'][0]:+.3f}, {gap['interval'][1]:+.3f}]")


if __name__ == "__main__":
    main()
