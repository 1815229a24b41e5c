"""One figure of the report as a file of its own, for a README or a results folder."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from unlearnjax.report import charts
from unlearnjax.report.images import SWEPT, sweep_traces
from unlearnjax.report.markup import Markup
from unlearnjax.report.scores import forgotten, ordered, retained
from unlearnjax.report.style import STYLE


def scatter_svg(report: Mapping[str, Any]) -> str:
    """Forgotten against retained, one point per model, as a stand-alone SVG file with its colours inside.

    Raises:
      ValueError: no model of the report has both scores.
    """
    points = []
    for model in ordered(report["models"]):
        right, up = retained(model["scores"]), forgotten(model["scores"])
        if right is not None and up is not None:
            points.append(charts.Point(model["name"], model["kind"], right, up))
    if not points:
        raise ValueError("no model of the report has both a retain and a forget score")
    return points_svg(points)


def points_svg(points: Sequence[charts.Point]) -> str:
    """Forgotten against retained of any models, as a stand-alone SVG file."""
    return _alone(charts.scatter(points)[0])


def sweeps_svg(report: Mapping[str, Any], names: Sequence[str]) -> str:
    """Forget against retain accuracy along lambda, a line per merge of these names, of an image report; a stand-alone
    SVG file.

    Raises:
      ValueError: no merge of these names was searched.
    """
    drawn = [trace for trace in sweep_traces(report) if trace.name in names]
    if not drawn:
        raise ValueError("none of these merges has a curve along lambda")
    return _alone(charts.traces(drawn, None, SWEPT))


def _alone(figure: Markup) -> str:
    """A figure's drawing as a file, with its colours inside."""
    drawing = re.search(r"<svg (.*)</svg>", str(figure.text), re.DOTALL)
    assert drawing is not None
    attributes, _, body = drawing.group(1).partition(">")
    # Only the light palette and the drawing's own rules: a file shown as an image has no page around it.
    root = STYLE[STYLE.index(":root") : STYLE.index("@media")].replace("color-scheme: light dark;", "")
    rules = "\n".join(line for line in STYLE.splitlines() if line.startswith("svg "))
    style = f"<style>{root}\n{rules}\nsvg {{ font-family: Helvetica, Arial, sans-serif; }}</style>"
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {attributes}>{style}{ground}{body}</svg>\n'
