"""What the page and the tables read out of a report: means, rankings and three-decimal numbers."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

NOT_MEASURED = "not measured"
KINDS = ("base", "gold", "candidate", "merge")
KIND_NAMES = {"base": "Base", "gold": "Gold", "candidate": "Candidate", "merge": "Merge"}


class Ranking(NamedTuple):
    """The score models are compared by, and how to say it."""

    key: str
    name: str
    meaning: str


RANKINGS = (
    Ranking("aggregate", "aggregate with MMLU", "the mean of task aggregate, membership score and MMLU"),
    Ranking(
        "aggregate_without_mmlu",
        "aggregate without MMLU",
        "the mean of task aggregate and membership score; the official aggregate needs MMLU too",
    ),
    Ranking("task_aggregate", "task aggregate", "the harmonic mean of the task terms; membership was not measured"),
)


def fixed(value: float | None, missing: str = NOT_MEASURED) -> str:
    """Three decimals, or `missing` for null."""
    if value is None:
        return missing
    text = f"{value:.3f}"
    return "0.000" if text == "-0.000" else text


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what was measured; null if nothing was."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def known(scores: Mapping[str, Any], split: str) -> float | None:
    """Mean over tasks and both kinds of a split's scores, 1 is all known."""
    return mean(value for task in scores[split].values() for value in task.values())


def retained(scores: Mapping[str, Any]) -> float | None:
    """What is known of the retain set, 1 is all kept."""
    return known(scores, "retain")


def forgotten(scores: Mapping[str, Any]) -> float | None:
    """1 - what is known of the forget set, 1 is all forgotten."""
    left = known(scores, "forget")
    return None if left is None else 1.0 - left


def ordered(models: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Base, gold, candidates, merges; within a kind as the report has them."""
    return sorted(models, key=lambda model: KINDS.index(model["kind"]))


def tasks(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every task that any model was scored on, sorted."""
    return sorted({task for model in models for split in ("forget", "retain") for task in model["scores"][split]})


def ranking(models: Iterable[Mapping[str, Any]]) -> Ranking:
    """The fullest score that every candidate and merge has, so that the comparison is of like with like."""
    compared = [model["scores"] for model in models if model["kind"] in ("candidate", "merge")]
    for choice in RANKINGS:
        if compared and all(scores[choice.key] is not None for scores in compared):
            return choice
    return RANKINGS[-1]


def best(models: Iterable[Mapping[str, Any]], kind: str, by: Ranking) -> Mapping[str, Any] | None:
    """The model of a kind with the highest score; the first one of several; None if none was measured."""
    measured = [model for model in models if model["kind"] == kind and model["scores"][by.key] is not None]
    return max(measured, key=lambda model: model["scores"][by.key], default=None)


def render_markdown_table(report: Mapping[str, Any]) -> str:
    """The score table of a README, in GitHub's Markdown; ends with a newline."""
    header = (
        "Model", "Kind", "Task aggregate", "Membership AUC (0.5 is ideal)", "Membership score", "MMLU",
        "Aggregate with MMLU", "Aggregate without MMLU", "Degenerate forget / retain", "Probe",
    )  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "| --- | --- |" + " ---: |" * (len(header) - 2)]
    for model in ordered(report["models"]):
        scores = model["scores"]
        auc, interval = fixed(scores["membership_auc"]), scores["membership_auc_interval"]
        if interval is not None:
            auc += f" [{fixed(interval[0])}, {fixed(interval[1])}]"
        degenerate, probe = scores["degenerate"] or {}, scores["probe"] or {}
        shares = [degenerate.get(split) for split in ("forget", "retain")]
        cells = (
            _markdown(model["name"]),
            KIND_NAMES[model["kind"]].lower(),
            fixed(scores["task_aggregate"]),
            auc,
            fixed(scores["membership_score"]),
            fixed(scores["mmlu"]),
            fixed(scores["aggregate"]),
            fixed(scores["aggregate_without_mmlu"]),
            NOT_MEASURED if shares == [None, None] else " / ".join(fixed(share) for share in shares),
            fixed(probe.get("accuracy")),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    """A name as plain text inside a table cell."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + letter if letter in r"\`*_[]|~" else letter for letter in text)
