"""The scatter plot as a file: well-formed XML with its own colours and a mark per model."""

import xml.etree.ElementTree as ElementTree

import pytest

from unlearnjax.report.figure import scatter_svg


def test_the_plot_stands_alone(report):
    root = ElementTree.fromstring(scatter_svg(report))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    marks = [e for e in root.iter() if "mark" in e.get("class", "").split()]
    assert len(marks) == sum(m["scores"]["task_aggregate"] is not None for m in report["models"])
    assert "--merge:" in "".join(root.itertext())


def test_nothing_to_draw(report):
    with pytest.raises(ValueError, match="no model"):
        scatter_svg({**report, "models": []})
