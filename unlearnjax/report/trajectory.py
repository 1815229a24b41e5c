"""The page's part about the way: scores at training's waypoints, and angles around the turning point."""

from collections.abc import Mapping, Sequence
from typing import Any

from unlearnjax.report import charts
from unlearnjax.report.markup import Markup, element
from unlearnjax.report.tables import head, number, number_head, table

Candidate = Mapping[str, Any]
KINDS = {"regurgitation": "ROUGE\u2011L", "knowledge": "exact match"}
ANGLES = {"d1_d2": "d1 and d2", "d1_d3": "d1 and d3", "d2_d3": "d2 and d3"}


def sections(candidates: Sequence[Candidate]) -> list[Markup]:
    """What candidates know on the way, and the angles of their paths; nothing without waypoints."""
    there = [candidate for candidate in candidates if candidate.get("trajectory")]
    if not there:
        return []
    panels = []
    for split in ("forget", "retain"):
        tasks = list(dict.fromkeys(task for c in there for task in c["trajectory"][split]))
        for kind, title in KINDS.items():
            panels += [_panel(there, split, task, kind, f"{split}, {task}: {title}") for task in tasks]
    note = (
        "A sample of each split's rows at waypoints of the training; 0 is the model before it. On the forget split low "
        "is good, on the retain split high."
    )
    drawn = [panel for panel in panels if panel is not None]
    found = [
        element(
            "section",
            element("h2", "On the way"),
            element("div", *drawn, class_="panels"),
            element("p", note, class_="note"),
        )
    ]
    turned = [candidate for candidate in there if candidate["trajectory"]["angles"]]
    return [*found, _angles(turned)] if turned else found


def _panel(candidates: Sequence[Candidate], split: str, task: str, kind: str, title: str) -> Markup | None:
    curves = []
    for candidate in candidates:
        way = candidate["trajectory"]
        values = way[split].get(task, {}).get(kind, [None] * len(way["updates"]))
        curves.append(charts.Curve(candidate["name"], way["updates"], values, candidate["status"] == "diverged"))
    return charts.curve_panel(title, curves)


def _angles(candidates: Sequence[Candidate]) -> Markup:
    """One row per candidate for the whole vector, and one per linear (the mean over its layers)."""
    rows = []
    for candidate in candidates:
        way = candidate["trajectory"]
        linears: dict[str, list[Mapping[str, float | None]]] = {}
        for module, angles in way["angles"]["by_module"].items():
            linears.setdefault(module.rpartition(".")[0], []).append(angles)
        means = {name: {key: _mean([one[key] for one in own]) for key in ANGLES} for name, own in linears.items()}
        for part, angles in {"whole": way["angles"]["whole"], **means}.items():
            whole = part == "whole"
            rows.append(
                element(
                    "tr",
                    element("th", candidate["name"] if whole else "", scope="row"),
                    element("td", part),
                    element("td", way["turning_point"] if whole else "", class_="r"),
                    *(number(angles[key]) for key in ANGLES),
                )
            )
    header = [head("Candidate"), head("Part"), number_head("Turning point (update)")]
    header += [number_head(f"{name} (°)") for name in ANGLES.values()]
    note = (
        "Angles between steps of the merged weights' change B·A: d1 from the start to the turning point, d2 from there "
        "to the end, d3 from the start to the end. The turning point is the waypoint with the lowest mean of all "
        "terms. For a linear: the mean over its layers."
    )
    return element("section", element("h2", "Angles"), table([header], rows), element("p", note, class_="note"))


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if there else None
