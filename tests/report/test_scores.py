"""Means, rankings and the Markdown table."""

import re

from unlearnjax.report.html import render_markdown_table
from unlearnjax.report.scores import best, fixed, forgotten, ranking, retained, tasks


def test_means_by_hand():
    second = {"regurgitation": None, "knowledge": 0.0}
    scores = {
        "forget": {"Task1": {"regurgitation": 0.5, "knowledge": 0.25}, "Task2": second},
        "retain": {"Task1": {"regurgitation": 1.0, "knowledge": 0.5}},
    }
    assert forgotten(scores) == 0.75 and retained(scores) == 0.75
    assert forgotten({"forget": {}}) is None and retained({"retain": {"T": {"knowledge": None}}}) is None
    assert tasks([{"scores": scores}]) == ["Task1", "Task2"]


def test_fixed():
    assert fixed(0.12349) == "0.123" and fixed(None) == "not measured" and fixed(-0.0001) == "0.000"
    assert fixed(1) == "1.000" and fixed(-0.5) == "-0.500"


def test_ranking_compares_like_with_like(report, scores):
    models = report["models"]
    assert ranking(models).key == "aggregate_without_mmlu"
    assert best(models, "candidate", ranking(models))["name"] == "balanced"
    assert best(models, "merge", ranking(models))["name"] == "ties (delta)"
    # MMLU for one candidate only must not decide.
    models[2]["scores"] = scores(0.66, 0.93, auc=0.97, mmlu=0.99)
    assert ranking(models).key == "aggregate_without_mmlu"
    for model in models[2:]:
        model["scores"] = scores(0.5, 0.9, auc=0.6, mmlu=0.4)
    assert ranking(models).key == "aggregate"
    models[3]["scores"]["membership_score"] = models[3]["scores"]["aggregate"] = None
    models[3]["scores"]["aggregate_without_mmlu"] = None
    assert ranking(models).key == "task_aggregate"
    assert ranking([]).key == "task_aggregate" and best([], "merge", ranking([])) is None


def test_markdown_table(report):
    report["models"][2]["name"] = "a|b <script>\n`x` *y*"
    lines = render_markdown_table(report).splitlines()
    assert len(lines) == 2 + 9
    cells = [re.split(r"(?<!\\)\|", line) for line in lines]
    assert {len(row) for row in cells} == {12}
    base = [cell.strip() for cell in cells[2][1:-1]]
    assert base[:2] == ["base", "base"] and base[3] == "1.000 [0.880, 1.000]" and base[4] == "0.000"
    assert base[5:7] == ["not measured", "not measured"] and base[8] == "0.000 / 0.000" and base[9] == "1.000"
    assert cells[4][1].strip() == r"a\|b &lt;script&gt; \`x\` \*y\*"
    assert all(set(cell.strip()) <= set("-:") for cell in cells[1][1:-1])
    report["models"][0]["scores"] |= {"degenerate": None, "probe": None}
    assert render_markdown_table(report).splitlines()[2].endswith("| not measured | not measured |")
