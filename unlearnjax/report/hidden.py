"""The page's part about what the score hides: a table of the models, and curves of relearning and of sampled leaks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from unlearnjax.report import charts
from unlearnjax.report.markup import Markup, element
from unlearnjax.report.scores import mean, ordered
from unlearnjax.report.tables import head, name_cell, number, number_head, table

Model = Mapping[str, Any]


def _at(model: Model, *path: str | int) -> Any:
    """What is at a path in a model's `full`, or None where it ends early."""
    found: Any = model["full"]
    for key in path:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            return None
    return found


def _fair(model: Model) -> float | None:
    tasks = _at(model, "rouge", "forget") or {}
    return mean(kinds["regurgitation"]["fair"] for kinds in tasks.values() if "regurgitation" in kinds)


def _attack(model: Model, key: str) -> float | None:
    attacks = _at(model, "membership", "attacks") or {}
    values = [attack[key] for attack in attacks.values() if attack is not None and attack[key] is not None]
    return max(values, default=None)


COLUMNS: tuple[tuple[str, Callable[[Model], float | None]], ...] = (
    ("Gap to gold ↓", lambda m: _at(m, "gold_gap", "mean_absolute")),
    ("Fair ROUGE\u2011L ↓", _fair),
    ("Personal values ↓", lambda m: _at(m, "personal", "forget", "leaked")),
    ("leak@1 ↓", lambda m: _at(m, "sampled", "leak_at", 0, "leak")),
    ("leak@most ↓", lambda m: _at(m, "sampled", "leak_at", -1, "leak")),
    ("Best probe ↓", lambda m: _at(m, "probes", "largest")),
    ("Relearnt ↓", lambda m: _at(m, "relearning", "others", "area")),
    ("bf16 gap ↓", lambda m: _at(m, "quantisation", "gap", "bfloat16", "leak")),
    ("int8 gap ↓", lambda m: _at(m, "quantisation", "gap", "int8", "leak")),
    ("int4 gap ↓", lambda m: _at(m, "quantisation", "gap", "int4", "leak")),
    ("Furthest AUC from 0.5 ↓", lambda m: _at(m, "membership", "largest_distance")),
    ("TPR at 1% FPR ↓", lambda m: _attack(m, "tpr_at_fpr_1")),
    ("Entropy, forget", lambda m: _at(m, "outputs", "forget", "entropy")),
)

NOTE = (
    "All on the forget split. Gap to gold: mean distance of the task terms to the gold model's. Fair ROUGE-L: of as"
    " many words as the gold answer has, above chance. Personal values: share found anywhere in the outputs, those "
    "the prompt gives away set aside. leak@k: the best score of k draws at temperature 1. Best probe: the best "
    "score over rewordings and begun answers. Relearnt: share of what was forgotten that some steps on a few other "
    "documents bring back, mean over the steps. Gaps: score after rounding the weights, less the score before. AUC "
    "and TPR: of the strongest of six membership attacks. Entropy: mean of the next token's along the outputs, in "
    "nats; near 0 or far above the others' is collapse. report.json has the rest: intervals, tasks, kinds of "
    "values, every probe and attack."
)


def section(models: Sequence[Model]) -> Markup | None:
    """None where no model has been measured that way."""
    there = [model for model in ordered(models) if model.get("full")]
    if not there:
        return None
    columns = [(title, read) for title, read in COLUMNS if any(read(model) is not None for model in there)]
    rows = [element("tr", name_cell(model), *(number(read(model)) for _, read in columns)) for model in there]
    header = [head("Model"), *(number_head(title) for title, _ in columns)]
    panels = [
        _panel(there, "Relearning: score of other documents", "step", ("relearning", "others", "leak"),
               lambda model: _at(model, "relearning", "steps")),
        _panel(there, "leak@k", "k", ("sampled", "leak_at"), lambda model: _ks(model)),
    ]  # fmt: skip
    return element(
        "section",
        element("h2", "What the score hides"),
        table([header], rows),
        element("p", NOTE, class_="note"),
        element("div", *(panel for panel in panels if panel is not None), class_="panels"),
    )


def _ks(model: Model) -> list[int] | None:
    curve = _at(model, "sampled", "leak_at")
    return None if curve is None else [point["k"] for point in curve]


def _panel(
    models: Sequence[Model], title: str, axis: str, path: tuple[str, ...], places: Callable[[Model], Any]
) -> Markup | None:
    curves = []
    for model in models:
        at, values = places(model), _at(model, *path)
        if at is None or values is None:
            continue
        values = [value["leak"] if isinstance(value, dict) else value for value in values]
        curves.append(charts.Curve(model["name"], at, values, False))
    return charts.curve_panel(title, curves, axis)
