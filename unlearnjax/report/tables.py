"""The page's tables. Numbers stand on the right, to three decimals; what was not measured says so."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from unlearnjax.report import charts
from unlearnjax.report.markup import Child, Markup, element
from unlearnjax.report.scores import KIND_NAMES, NOT_MEASURED, fixed, ordered, tasks

Model = Mapping[str, Any]
NONE = "\u2013"


def kind_mark(kind: str) -> Markup:
    """The kind's mark of the scatter plot, small enough for a line of text."""
    path = element("path", class_=f"mark {kind}", d=charts.marker(kind, 8.0, 8.0, 5.0))
    return element("svg", path, viewBox="0 0 16 16", role="img", aria_label=KIND_NAMES[kind].lower())


def scores_table(models: Sequence[Model]) -> Markup:
    """One row per model; the best of candidates and merges is bold in the columns that rank them."""
    ranked = ("task_aggregate", "membership_score", "mmlu", "aggregate", "aggregate_without_mmlu")
    tops = {name: _top(models, name) for name in ranked}
    header = [
        head("Model"),
        *map(
            number_head,
            (
                "Task aggregate ↑", "Membership AUC → 0.5", "Membership score ↑", "MMLU ↑", "Aggregate with MMLU ↑",
                "Aggregate without MMLU ↑", "Degenerate, forget ↓", "Degenerate, retain ↓", "Probe ↑",
            ),
        ),
    ]  # fmt: skip
    rows = []
    for model in ordered(models):
        scores = model["scores"]
        rank = {
            name: number(scores[name], best=model["kind"] in ("candidate", "merge") and scores[name] == tops[name])
            for name in ranked
        }
        degenerate, probe = scores["degenerate"] or {}, scores["probe"] or {}
        rows.append(
            element(
                "tr",
                name_cell(model),
                rank["task_aggregate"],
                number(scores["membership_auc"], scores["membership_auc_interval"]),
                rank["membership_score"],
                rank["mmlu"],
                rank["aggregate"],
                rank["aggregate_without_mmlu"],
                number(degenerate.get("forget")),
                number(degenerate.get("retain")),
                number(probe.get("accuracy"), probe.get("interval")),
            )
        )
    return table([header], rows)


def task_table(models: Sequence[Model]) -> Markup:
    """Every score the aggregate is made of, as it was measured."""
    names = tasks(models)
    kinds = (("regurgitation", "ROUGE\u2011L"), ("knowledge", "exact"))
    splits = (("forget", "Forget ↓"), ("retain", "Retain ↑"))
    wide = len(kinds) * len(names) + 1
    upper, middle, lower = [head("")], [head("")], [head("Model")]
    for _, title in splits:
        upper.append(element("th", title, colspan=wide, scope="colgroup", class_="group"))
        for place, task in enumerate(names):
            edge = "group" if place == 0 else "task"
            middle.append(element("th", task, colspan=len(kinds), scope="colgroup", class_=edge))
            lower += [number_head(short, first=place == 0 and kind == kinds[0][0]) for kind, short in kinds]
        middle.append(head("") if names else element("th", class_="group"))
        lower.append(number_head("NLL", first=not names))
    rows = []
    for model in ordered(models):
        cells = [name_cell(model)]
        for split, _ in splits:
            scored = model["scores"][split]
            values = [scored.get(task, {}).get(kind) for task in names for kind, _ in kinds]
            values.append((model["scores"]["nll"] or {}).get(split))
            cells += [number(value, first=place == 0) for place, value in enumerate(values)]
        rows.append(element("tr", *cells))
    return table([upper, middle, lower], rows)


def candidate_table(candidates: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Status and the hyperparameters that differ; below it those that all share."""
    names = list(dict.fromkeys(name for candidate in candidates for name in candidate["hyperparameters"]))
    own = [name for name in names if len({_value(c["hyperparameters"].get(name)) for c in candidates}) > 1]
    header = [head("Candidate"), head("Status"), number_head("Updates"), *map(number_head, own)]
    rows = []
    for candidate in candidates:
        status = candidate["status"]
        if status == "diverged" and candidate["diverged_at"] is not None:
            status += f" at update {candidate['diverged_at']}"
        if "kept_after" in candidate:
            status += f", kept as after update {candidate['kept_after']:,}"
        rows.append(
            element(
                "tr",
                element("th", candidate["name"], scope="row"),
                element("td", status),
                element("td", f"{candidate['updates']:,}", class_="r"),
                *(element("td", _value(candidate["hyperparameters"].get(name)), class_="r") for name in own),
            )
        )
    shared = [f"{name} {_value(candidates[0]['hyperparameters'].get(name))}" for name in names if name not in own]
    note = element("p", f"The same for all: {', '.join(shared)}.", class_="note") if shared else None
    return [part for part in (table([header], rows), note) if part is not None]


def merge_table(merges: Sequence[Mapping[str, Any]]) -> Markup:
    """How each merge was made, and what its export as an adapter lost."""
    header = [head(title) for title in ("Merge", "Method", "Space", "Semantics", "Hyperparameters", "Of")]
    header += [number_head("Length"), number_head("Exported rank"), number_head("Truncation error")]
    rows = []
    for merge in merges:
        named = [f"{name} {_value(value)}" for name, value in merge["hyperparameters"].items()]
        named += [f"scale {_value(merge['scale'])}"] if "scale" in merge else []
        named += ["subtracted"] if merge.get("negated") else []
        rank = merge["exported_rank"]
        rows.append(
            element(
                "tr",
                element("th", merge["name"], scope="row"),
                element("td", merge["method"]),
                element("td", merge["space"]),
                element("td", merge["semantics"] or NONE),
                element("td", ", ".join(named) or NONE),
                element("td", f"{len(merge['candidates'])} candidates", title=", ".join(merge["candidates"])),
                number(merge.get("length")),
                element("td", NONE if rank is None else rank, class_="r"),
                number(merge["truncation_error"]),
            )
        )
    return table([header], rows)


def data_table(data: Mapping[str, Any]) -> Markup:
    """Where each set came from, and the start of its digest."""
    rows = []
    for name in ("forget", "retain", "members", "nonmembers"):
        source = data.get(name)
        if source is not None:
            digest = element("code", source["sha256"][:16], title=source["sha256"])
            rows.append(
                element("tr", element("th", name, scope="row"), element("td", element("code", source["source"])),
                        element("td", f"{source['rows']:,}", class_="r"), element("td", digest))
            )  # fmt: skip
    return table([[head("Set"), head("Source"), number_head("Rows"), head("SHA-256 starts with")]], rows)


def table(headers: Sequence[Sequence[Markup]], rows: Iterable[Markup]) -> Markup:
    head = element("thead", *(element("tr", *cells) for cells in headers))
    # Focusable, so that the keyboard can scroll a table that is wider than the screen.
    return element("div", element("table", head, element("tbody", *rows)), class_="scroll", tabindex="0")


def head(title: str) -> Markup:
    return element("th", title, scope="col")


def number_head(title: str, first: bool = False) -> Markup:
    # An arrow stays with the word before it.
    title = title.replace(" ↑", "\u00a0↑").replace(" ↓", "\u00a0↓")
    return element("th", title, scope="col", class_="r first" if first else "r")


def name_cell(model: Model) -> Markup:
    return element("th", kind_mark(model["kind"]), model["name"], scope="row", class_="model")


def number(
    value: float | None, interval: Sequence[float] | None = None, *, best: bool = False, first: bool = False
) -> Markup:
    edge = " first" if first else ""
    if value is None:
        return element("td", NOT_MEASURED, class_=f"r none{edge}")
    below: Child = None
    if interval is not None:
        below = element("span", f"[{fixed(interval[0])}, {fixed(interval[1])}]", class_="sub")
    return element("td", fixed(value), below, class_=f"r{' best' if best else ''}{edge}")


def _top(models: Sequence[Model], name: str) -> float | None:
    values = [model["scores"][name] for model in models if model["kind"] in ("candidate", "merge")]
    return max((value for value in values if value is not None), default=None)


def _value(value: Any) -> str:
    """A hyperparameter as short as it can be said without loss that matters: at most six digits."""
    shown: Callable[[Any], str] = json.dumps
    if value is None:
        return NONE
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else shown(value)
