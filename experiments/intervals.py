"""Intervals for a finished run: is one model better than another beyond what rows and seeds leave open?

    python experiments/intervals.py RUN --against NAME --results experiments/results/FILE.json

For every model of the run: task aggregate, membership AUC and the mean of task aggregate and membership score (the
official aggregate without MMLU), each with a 95% interval, and the same for the difference from the model NAME. The
bootstrap draws documents (all models' scores of a document together; forget set, retain set, members and non-members
each by themselves) and, where models are called NAME-seedS, seeds: their scores are means over seeds. A model without a
seed (base, gold) is the same for all. It knows nothing about what other models, trained anew, would give.

The confirmation of semeval_ties.py: with everything chosen on the validation split, one run on LUME's train split, in
which three seeds of each candidate are candidates of one program (hours on 2 CPU cores; the same command goes on after
a stop with --resume added):

    python experiments/semeval_ties.py --forget LUME/forget_train.parquet --retain LUME/retain_train.parquet \\
        --members LUME/mia/member.jsonl --nonmembers LUME/mia/nonmember.jsonl --epochs 30 \\
        --recipe experiments/confirmation.yml --work out/confirmation_models --out out/confirmation \\
        --results out/confirmation_figures
    python experiments/intervals.py out/confirmation --against over --results experiments/results/confirmation.json
"""

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unlearnjax.evaluation.csvs import read_folder
from unlearnjax.evaluation.full.leak import document_of
from unlearnjax.evaluation.semeval import KINDS, row_scores
from unlearnjax.report.schema import read_report

SPLITS = ("forget", "retain")
SCORES = ("task_aggregate", "membership_auc", "aggregate_without_mmlu")
PLANE = ("forgotten", "retained")  # the means of the official terms of either split, the forget split's from 1


class Cells(NamedTuple):
    """One split's row scores of a model, summed by document (rows) and term (columns), and the numbers of rows."""

    sums: np.ndarray
    counts: np.ndarray


class Outcome(NamedTuple):
    """What one model's scores are made of.

    losses: NLL of each member and of each non-member; None without an attack.
    """

    cells: dict[str, Cells]
    losses: tuple[np.ndarray, np.ndarray] | None

    @property
    def wins(self) -> np.ndarray | None:
        """[members, non-members], 1 where the non-member has the higher NLL, 1/2 where both have the same."""
        if self.losses is None:
            return None
        inside, outside = self.losses
        return 0.5 * (1 + np.sign(outside[None] - inside[:, None]))


def to_plain(model: Outcome) -> dict[str, Any]:
    """For JSON, without the counts, which are the data's and the same for all models."""
    sums = {split: cells.sums.round(4).tolist() for split, cells in model.cells.items()}
    return {"sums": sums, "losses": None if model.losses is None else [x.tolist() for x in model.losses]}


def from_plain(plain: dict[str, Any], counts: dict[str, Any]) -> Outcome:
    """What `to_plain` gave, with the counts by split."""
    cells = {s: Cells(np.array(own, float), np.array(counts[s], float)) for s, own in plain["sums"].items()}
    if plain["losses"] is None:
        return Outcome(cells, None)
    inside, outside = plain["losses"]
    return Outcome(cells, (np.array(inside), np.array(outside)))


class Draw(NamedTuple):
    """How often each document counts."""

    rows: dict[str, np.ndarray]
    members: np.ndarray
    nonmembers: np.ndarray


def outcome(generations: Path) -> Outcome:
    """From a model's folder of generations and losses."""
    found = read_folder(generations)
    cells = {}
    for split, files in ((s, getattr(found, s)) for s in SPLITS):
        scored = [(row, KINDS[kind], value) for row, kind, value in row_scores(files) if kind is not None]
        documents = list(dict.fromkeys(document_of(row.id) for file in files for row in file))
        tasks = sorted({row.task for file in files for row in file})
        terms = [(task, kind) for task in tasks for kind in KINDS.values()]
        place = {document: i for i, document in enumerate(documents)}
        sums, counts = (np.zeros((len(documents), len(terms))) for _ in range(2))
        for row, kind, value in scored:
            at = place[document_of(row.id)], terms.index((row.task, kind))
            sums[at] += value
            counts[at] += 1
        cells[split] = Cells(sums, counts)
    if found.members is None or found.nonmembers is None:
        return Outcome(cells, None)
    inside, outside = (np.array([x.nll for x in side]) for side in (found.members, found.nonmembers))
    return Outcome(cells, (inside, outside))


def scores(model: Outcome, draw: Draw) -> dict[str, float]:
    """The official scores and the plane, each document counting as often as drawn; NaN without an attack."""
    means = {}
    for s in SPLITS:
        counts = draw.rows[s] @ model.cells[s].counts
        # A term without rows is none: not in the run, or not in this draw.
        means[s] = (draw.rows[s] @ model.cells[s].sums)[counts > 0] / counts[counts > 0]
    terms = [*(1 - means["forget"]), *means["retain"]]
    aggregate = float(statistics.harmonic_mean([float(min(max(term, 0.0), 1.0)) for term in terms]))
    auc = float("nan")
    if model.wins is not None:
        auc = float(draw.members @ model.wins @ draw.nonmembers / (draw.members.sum() * draw.nonmembers.sum()))
    plane = (1 - float(means["forget"].mean()), float(means["retain"].mean()))
    return dict(zip((*SCORES, *PLANE), (aggregate, auc, (aggregate + 1 - 2 * abs(auc - 0.5)) / 2, *plane)))


def bootstrap(
    models: dict[str, Sequence[Outcome]], against: str, resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Per model each score as {value, interval, difference, difference_interval}; a score that is none is left out.

    Args:
      models: by name, one outcome per seed.
      against: the model that the differences are from.
    """
    draw = np.random.default_rng(seed)
    first = models[against][0]
    sizes = {s: len(first.cells[s].sums) for s in SPLITS}
    attack = (0, 0) if first.wins is None else first.wins.shape
    count = len(models[against])

    def all_scores(weights: Draw, seeds: Sequence[int]) -> np.ndarray:
        known: dict[int, list[float]] = {}  # base and gold are one outcome for every seed

        def of(one: Outcome) -> list[float]:
            if id(one) not in known:
                known[id(one)] = list(scores(one, weights).values())
            return known[id(one)]

        return np.array([np.mean([of(own[i]) for i in seeds], axis=0) for own in models.values()])

    def drawn(n: int) -> np.ndarray:
        return np.bincount(draw.integers(0, n, n), minlength=n).astype(float) if n else np.zeros(0)

    points = all_scores(Draw({s: np.ones(n) for s, n in sizes.items()}, *map(np.ones, attack)), range(count))
    resampled = np.array(
        [
            all_scores(
                Draw({s: drawn(n) for s, n in sizes.items()}, *map(drawn, attack)), draw.integers(0, count, count)
            )
            for _ in range(resamples)
        ]
    )
    reference = list(models).index(against)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    gap_low, gap_high = np.quantile(resampled - resampled[:, [reference]], [0.025, 0.975], axis=0)
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(models):
        found[name] = {
            score: {
                "value": points[i, j], "interval": [low[i, j], high[i, j]],
                "difference": points[i, j] - points[reference, j],
                "difference_interval": [gap_low[i, j], gap_high[i, j]],
            }
            for j, score in enumerate((*SCORES, *PLANE))
            if not np.isnan(points[i, j])
        }  # fmt: skip
    return found


def by_seed(names: Sequence[str]) -> dict[str, list[str]]:
    """The models NAME-seedS by NAME, in the order of their seeds; one without a seed counts for every seed.

    Raises:
      SystemExit: some model lacks a seed that another one has.
    """
    found: dict[str, dict[int, str]] = {}
    for name in names:
        match = re.fullmatch(r"(.+)-seed(\d+)", name)
        if match:
            found.setdefault(match[1], {})[int(match[2])] = name
    seeds = sorted({seed for own in found.values() for seed in own}) or [0]
    for stem, own in found.items():
        if sorted(own) != seeds:
            raise SystemExit(f"{stem} has seeds {sorted(own)} and others have {seeds}; run every seed of every model")
    stems = {name: stem for stem, own in found.items() for name in own.values()}
    return {
        stems.get(name, name): [found[stems[name]][seed] for seed in seeds] if name in stems else [name] * len(seeds)
        for name in names
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("run", help="the folder of a finished run")
    p.add_argument("--against", required=True, help="the model that the differences are from, without its seed")
    p.add_argument("--resamples", type=int, default=2000)
    p.add_argument("--results", required=True, help="the JSON file to write")
    a = p.parse_args()

    report = read_report(Path(a.run))
    models = {m["name"]: m for m in report["models"]}
    groups = by_seed(list(models))
    if a.against not in groups:
        raise SystemExit(f"{a.run} has no model {a.against!r}; it has {', '.join(groups)}")
    outcomes = {name: outcome(Path(a.run) / "generations" / name) for name in models}
    found = bootstrap({g: [outcomes[name] for name in own] for g, own in groups.items()}, a.against, a.resamples, 0)
    for name, own in groups.items():
        each = [models[one]["scores"] for one in dict.fromkeys(own)]
        found[name] |= {
            "kind": models[own[0]]["kind"],
            **{f"{score}_by_seed": [s[score] for s in each] for score in SCORES},
            "degenerate_forget_by_seed": [s["degenerate"]["forget"] for s in each],
            "degenerate_retain_by_seed": [s["degenerate"]["retain"] for s in each],
            "probe_by_seed": [(s["probe"] or {}).get("accuracy") for s in each],
        }
    result = {
        "against": a.against, "seeds": len(groups[a.against]), "resamples": a.resamples, "recipe": report["recipe"],
        "data": report["data"], "hardware": report["hardware"], "models": found,
    }  # fmt: skip
    short = json.loads(json.dumps(result), parse_float=lambda x: float(f"{float(x):.5g}"))
    Path(a.results).parent.mkdir(parents=True, exist_ok=True)
    Path(a.results).write_text(json.dumps(short, indent=1) + "\n", encoding="utf-8")
    print(table(found, a.against))


def table(found: dict[str, dict[str, Any]], against: str) -> str:
    """As Markdown: each score with its interval, and the differences from the reference."""

    def cell(entry: dict[str, Any], value: str, interval: str, sign: str) -> str:
        if not entry:
            return "not measured"
        low, high = entry[interval]
        return f"{entry[value]:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"

    lines = [
        f"| Model | Task aggregate | less {against}'s | Membership AUC | Aggregate without MMLU | less {against}'s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, own in found.items():
        cells = [cell(own.get(score, {}), "value", "interval", "") for score in SCORES]
        gaps = [
            "" if name == against else cell(own.get(score, {}), "difference", "difference_interval", "+")
            for score in SCORES
        ]
        lines.append(f"| {name} | {cells[0]} | {gaps[0]} | {cells[1]} | {cells[2]} | {gaps[2]} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
