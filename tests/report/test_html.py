"""The page: self-contained, well-formed, escaped, and right about what it says."""

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from unlearnjax.errors import UserError
from unlearnjax.report import charts
from unlearnjax.report.html import render_html
from unlearnjax.report.schema import read_report, write_report

VOID = {"meta", "br", "hr", "col"}


class Page(HTMLParser):
    """Elements with their attributes and text; refuses tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        node = {"tag": tag, "text": "", **dict(attrs)}
        self.found.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop()["tag"] == tag

    def handle_data(self, data):
        for node in self.open:
            node["text"] += data
        self.text.append(data)

    def all(self, tag, class_=""):
        return [node for node in self.found if node["tag"] == tag and class_ in ("", *node.get("class", "").split())]


@pytest.fixture
def page(tmp_path):
    def make(report):
        write_report(tmp_path, report)
        return render_html(read_report(tmp_path))

    return make


def table(page, heading):
    """Rows of cell texts of the table in a section."""
    section = page.split(f"<h2>{heading}</h2>")[1].split("</section>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.S)
    strip = lambda cell: re.sub(r"<[^>]*>", "", re.sub(r"<span.*?</span>", "", cell))  # noqa: E731
    return [[strip(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)] for row in rows]


def test_well_formed_and_self_contained(page, report):
    text = page(report)
    parsed = Page(text)
    assert text.startswith("<!doctype html>") and parsed.found[0] == {**parsed.found[0], "tag": "html", "lang": "en"}
    assert not {"script", "link", "img", "iframe", "object", "a", "image", "use"} & {n["tag"] for n in parsed.found}
    assert not re.search(r"https?:|url\(|@import|src=|href=|\son\w+=", text)
    assert [node["text"] for node in parsed.all("h1")] == ["unlearnjax demo"]
    assert [node["text"] for node in parsed.all("h2")] == [
        "Scores", "Forgotten against retained", "Scores by task", "Loss curves", "Candidates", "Merges", "Data",
        "Recipe", "Run",
    ]  # fmt: skip
    # Valid XML as well, so that the plots can be taken out as files.
    pictures = re.findall(r"<svg.*?</svg>", text, re.S)
    assert all(ET.fromstring(picture) is not None for picture in pictures)
    assert "None" not in "".join(parsed.text) and "nan" not in text


def test_the_style_sheet_is_the_one_the_policy_allows(page, report):
    import base64
    import hashlib

    text = page(report)
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"style-src &#x27;sha256-{digest}&#x27;" in text and "default-src &#x27;none&#x27;" in text
    assert not re.search(r"\sstyle=", text)  # the policy would refuse it
    used = set(" ".join(re.findall(r'class="([^"]*)"', text)).split())
    defined = set(re.findall(r"\.([a-z][a-z0-9]*)", style))
    assert not used - defined, used - defined


def test_scores_table(page, report):
    rows = table(page(report), "Scores")
    assert [row[0] for row in rows[1:]] == [model["name"] for model in report["models"]]
    assert rows[1][1:4] == ["0.000", "1.000", "0.000"] and rows[1][4:6] == ["not measured"] * 2
    for row, model in zip(rows[1:], report["models"]):
        expected = model["scores"]
        assert row[1] == f"{expected['task_aggregate']:.3f}" and row[6] == f"{expected['aggregate_without_mmlu']:.3f}"
        assert row[7:9] == [f"{expected['degenerate'][split]:.3f}" for split in ("forget", "retain")]
    text = page(report)
    numbers = re.findall(r'<td class="([^"]*)">(-?\d+\.\d{3})', text)
    assert len(numbers) > 150 and all("r" in classes.split() for classes, _ in numbers)
    # Bold: only the best of candidates and merges, in columns that rank.
    bold = re.findall(r'<td class="r best">([\d.]+)', text)
    tops = [max(m["scores"][name] for m in report["models"][2:])
            for name in ("task_aggregate", "membership_score", "aggregate_without_mmlu")]  # fmt: skip
    assert sorted(bold) == sorted(f"{top:.3f}" for top in tops)


def test_task_table(page, report):
    rows = table(page(report), "Scores by task")
    scored = report["models"][3]["scores"]
    expected = []
    for split in ("forget", "retain"):
        for task in ("Task1", "Task2", "Task3"):
            expected += [scored[split][task]["regurgitation"], scored[split][task]["knowledge"]]
        expected.append(scored["nll"][split])
    row = next(row for row in rows if row[0] == "balanced")
    assert row[1:] == [f"{value:.3f}" for value in expected]


def test_summary_names_the_score_and_the_gap(page, report):
    lead = Page(page(report)).all("p", "lead")[0]["text"]
    scores = {model["name"]: model["scores"]["aggregate_without_mmlu"] for model in report["models"]}
    gap = scores["ties (delta)"] - scores["balanced"]
    assert lead == (
        f"5 candidates trained in 1 min 23 s; 1 diverged. The best merge, ties (delta), has an aggregate without MMLU "
        f"of {scores['ties (delta)']:.3f}, {gap:.3f} above the best candidate, balanced ({scores['balanced']:.3f}); "
        f"the model before unlearning has 0.000."
    )
    assert "the official aggregate needs MMLU too" in page(report)


def test_with_mmlu_the_official_aggregate_is_used(page, report, scores):
    for model in report["models"]:
        model["scores"] = scores(0.3, 0.8, auc=0.6, mmlu=0.25)
    text = page(report)
    assert "an aggregate with MMLU of" in text and "equal to the best candidate" in text
    assert table(text, "Scores")[1][4] == "0.250"


def test_hostile_names(page, report):
    hostile = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;</title></style>"
    report["title"] = report["created"] = report["unlearnjax"] = hostile
    report["command"] = report["warnings"] = [hostile]
    report["hardware"] |= {"platform": hostile, "device": hostile, "jax": hostile}
    report["recipe"] = {hostile: [hostile]}
    for source in report["data"].values():
        if isinstance(source, dict):
            source |= {"source": hostile, "sha256": hostile}
    for candidate in report["candidates"]:
        candidate["name"] = hostile + candidate["name"]
        candidate["hyperparameters"] = {hostile: candidate["name"], "list": [hostile]}
        candidate["curves"][hostile] = candidate["curves"].pop("npo")
    for merge in report["merges"]:
        merge |= {"name": hostile, "method": hostile, "space": hostile, "semantics": hostile, "candidates": [hostile]}
        merge["hyperparameters"] = {hostile: hostile}
    for model in report["models"]:
        model["name"] = hostile + model["name"]
        model["scores"]["semantics"] = hostile
        for split in ("forget", "retain"):
            model["scores"][split][hostile] = {"regurgitation": 0.5, "knowledge": None}
    text = page(report)
    parsed = Page(text)
    tags = {node["tag"] for node in parsed.found}
    assert not tags & {"script", "img"} and parsed.all("title")[0]["text"] == hostile
    assert not [node for node in parsed.found if any(name.startswith("on") for name in node)]
    assert "".join(parsed.text).count("<script>alert(1)</script>") > 40
    assert len(parsed.all("style")) == 1


def test_a_diverged_candidate(page, report):
    text = page(report)
    assert table(text, "Candidates")[5][:3] == ["reckless", "diverged at update 96", "96"]
    assert "✕ reckless" in text and "✕ marks the last finite value" in text
    assert "1 diverged" in text and "(log scale)" in text
    # One that never had a finite value has no line, and breaks nothing.
    for name in ("loss", "npo", "gdr", "klr", "gradient_norm"):
        values = report["candidates"][4]["curves"][name]
        report["candidates"][4]["curves"][name] = [float("nan")] * len(values)
    report["candidates"][4] |= {"diverged_at": 0, "updates": 0}
    text = page(report)
    assert "diverged at update 0" in text and "✕ reckless" not in text
    report["candidates"] = report["candidates"][4:]
    assert "<h2>Loss curves</h2>" not in page(report)


def test_one_candidate_and_nothing_measured(page, report):
    report["candidates"], report["merges"], report["warnings"] = report["candidates"][:1], [], []
    report["models"] = [report["models"][0], report["models"][2]]
    for model in report["models"]:
        for name in ("membership_auc", "membership_auc_interval", "membership_score", "mmlu", "aggregate",
                     "aggregate_without_mmlu", "degenerate", "nll", "probe"):  # fmt: skip
            model["scores"][name] = None
    for name in ("members", "nonmembers", "padding_share"):
        del report["data"][name]
    text = page(report)
    Page(text)
    assert "1 candidate trained" in text and "has a task aggregate of" in text and "<h2>Merges</h2>" not in text
    assert table(text, "Scores")[2][2:] == ["not measured"] * 8
    assert table(text, "Scores by task")[-1][7] == "not measured"
    report["models"] = []
    assert "No model was scored." in page(report)
    report["candidates"] = []
    Page(page(report))


def test_one_update_and_zero_updates(page, report, candidate):
    report["candidates"] = [candidate("one", 1), candidate("none", 0)]
    text = page(report)
    Page(text)
    assert "<circle" in text


def test_many_candidates(page, report, candidate, scores):
    report["candidates"] = [candidate(f"candidate-{number}-of-a-long-name", 20) for number in range(32)]
    report["models"] += [
        {"name": f"c{number}", "kind": "candidate", "scores": scores(0.3, 0.7)} for number in range(32)
    ]
    text = page(report)
    Page(text)
    assert f"{charts.LABELLED} of 32 lines are named" in text and "crowded points are not named" in text


def test_curves_of_a_term_only_some_candidates_have(page, report):
    del report["candidates"][0]["curves"]["klr"]
    panel = next(part for part in page(report).split("<figure") if ">klr</text>" in part)
    assert "careful" not in panel and "balanced" in panel


def test_searched_scales(page, report):
    """A line per merge that was searched, and of the merges of each candidate the chosen one's."""
    assert "<h2>Scales</h2>" not in page(report)
    trial = lambda scale, **more: {"scale": scale, "forget": 0.9 - 0.5 * scale, "retain": 0.9 - 0.1 * scale, **more}  # noqa: E731
    first, second, _ = report["merges"]
    first |= {"negated": True, "scale": 1.0, "search": {"floor": 0.8, "trials": [trial(x) for x in (1.0, 0.0, 0.5)]}}
    each = [trial(x, candidate=name) for name in ("careful", "eager") for x in (0.0, 0.25)]
    second |= {"candidates": ["eager"], "scale": 0.25, "search": {"floor": 0.8, "trials": each}}
    text = page(report)
    Page(text)
    part = text.split("<h2>Scales</h2>")[1].split("</section>")[0]
    paths = re.findall(r'<path class="line[^>]* d="(M[^"]*)"', part)
    assert [path.count("L") for path in paths] == [2, 1] and part.count('<line class="ideal"') == 1
    assert "linear: retained 0.800, forgotten 0.600" in part and "ties (delta): retained 0.875" in part
    assert [row[4] for row in table(text, "Merges")[1:3]] == ["scale 1, subtracted", "density 0.8, scale 0.25"]
    second["scale"] = 0.3
    with pytest.raises(UserError, match=r"merges\[1\]\.scale: is not among the search's trials"):
        page(report)


def test_a_wrong_report_is_refused(report):
    report["models"][0]["kind"] = "best"
    with pytest.raises(UserError, match=r"report.json.candidates\[4\]|models\[0\]\.kind"):
        render_html(report)
