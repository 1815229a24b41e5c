"""The scatter plot as a file: well-formed XML with its own colours and a mark per model."""

import xml.etree.ElementTree as ElementTree

import pytest

from unlearnjax.report.figure import scatter_svg, sweeps_svg


def test_the_plot_stands_alone(report):
    root = ElementTree.fromstring(scatter_svg(report))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    marks = [e for e in root.iter() if "mark" in e.get("class", "").split()]
    assert len(marks) == sum(m["scores"]["task_aggregate"] is not None for m in report["models"])
    assert "--merge:" in "".join(root.itertext())


def test_nothing_to_draw(report):
    with pytest.raises(ValueError, match="no model"):
        scatter_svg({**report, "models": []})


def test_a_line_per_merge_that_was_searched():
    sweep = {"lambda": [0.0, 0.5, 1.0], "retain": [90.0, 85.0, 60.0], "forget": [90.0, 50.0, 20.0]}
    merges = [{"name": name, "lambda": 0.5, "sweep": sweep} for name in ("consensus", "uniform", "other")]
    drawing = sweeps_svg({"merges": [*merges, {"name": "ties", "lambda": None}]}, ["consensus", "uniform", "ties"])
    root = ElementTree.fromstring(drawing)
    assert sum("line" in e.get("class", "").split() for e in root.iter()) == 2
    with pytest.raises(ValueError, match="none of these merges"):
        sweeps_svg({"merges": merges}, ["magmax"])
