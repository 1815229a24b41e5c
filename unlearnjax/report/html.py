"""report.json as one self-contained page: no script, no font, image or style from anywhere else."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from unlearnjax.report import charts, hidden, schema, search, tables, trajectory
from unlearnjax.report.markup import Markup, element, group
from unlearnjax.report.page import header, page, section, warnings_box, yaml_text
from unlearnjax.report.scores import KIND_NAMES, KINDS, Ranking, best, fixed, forgotten, ordered, ranking, retained
from unlearnjax.report.scores import render_markdown_table as render_markdown_table  # part of this module's interface

CURVES_FIRST = ("loss",)
CURVES_LAST = ("gradient_norm",)
CURVE_TITLES = {"loss": "total loss", "gradient_norm": "gradient norm"}


def render_html(report: Mapping[str, Any]) -> str:
    """The report as a page to open in any browser.

    Args:
      report: what `read_report` returns. It is validated again, so that a page is never made of half a report.

    Raises:
      UserError: the report does not follow the schema.
    """
    schema.validate(dict(report))
    body = element(
        "main",
        header(report),
        _summary(report),
        warnings_box(report["warnings"]),
        section("Scores", tables.scores_table(report["models"]), *_score_notes(report["models"])),
        _plane(report["models"]),
        hidden.section(report["models"]),
        section("Scores by task", tables.task_table(report["models"]), _TASK_NOTE),
        _curves(report["candidates"]),
        *trajectory.sections(report["candidates"]),
        section("Candidates", *tables.candidate_table(report["candidates"])),
        section("Merges", tables.merge_table(report["merges"]), _MERGE_NOTE) if report["merges"] else None,
        search.section(report["merges"]),
        section("Data", tables.data_table(report["data"]), _padding(report["data"].get("padding_share"))),
        section("Recipe", element("pre", element("code", yaml_text(report["recipe"])))),
        section("Run", _run(report)),
        element("footer", f"Written by unlearnjax {report['unlearnjax']}.", class_="note"),
    )
    return page(report["title"], body)


def _summary(report: Mapping[str, Any]) -> Markup:
    """What happened in two sentences, and the models that matter side by side."""
    models = report["models"]
    by = ranking(models)
    chosen = [(kind, best(models, kind, by) or _first(models, kind)) for kind in KINDS]
    cards = [
        _card(("Best " + kind) if kind in ("candidate", "merge") else KIND_NAMES[kind], model, by)
        for kind, model in chosen
        if model is not None
    ]
    return group(
        element("p", _sentence(report, by), class_="lead"),
        element("div", *cards, class_="cards") if cards else None,
        element("p", f"The large number is the {by.name}: {by.meaning}.", class_="note") if cards else None,
    )


def _first(models: Iterable[Mapping[str, Any]], kind: str) -> Mapping[str, Any] | None:
    return next((model for model in models if model["kind"] == kind), None)


def _sentence(report: Mapping[str, Any], by: Ranking) -> str:
    candidates, models = report["candidates"], report["models"]
    diverged = sum(candidate["status"] == "diverged" for candidate in candidates)
    text = f"{len(candidates)} candidate{'s' if len(candidates) != 1 else ''} trained in "
    text += _duration(report["training"]["seconds"]) + (f"; {diverged} diverged. " if diverged else ". ")
    alone, merged, base = (best(models, kind, by) for kind in ("candidate", "merge", "base"))
    if alone is None and merged is None:
        return text + "No model was scored."

    def value(model: Mapping[str, Any]) -> float:
        return float(model["scores"][by.key])

    parts = []
    if merged is not None:
        parts.append(f"The best merge, {merged['name']}, has {_article(by.name)} of {fixed(value(merged))}")
        if alone is not None:
            gap = merged["scores"][by.key] - alone["scores"][by.key]
            relation = f"{abs(gap):.3f} {'above' if gap > 0 else 'below'}" if abs(gap) >= 5e-4 else "equal to"
            parts.append(f"{relation} the best candidate, {alone['name']} ({fixed(value(alone))})")
    elif alone is not None:
        parts.append(f"The best candidate, {alone['name']}, has {_article(by.name)} of {fixed(value(alone))}")
    text += ", ".join(parts)
    if base is not None:
        text += f"; the model before unlearning has {fixed(value(base))}"
    return text + "."


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _card(what: str, model: Mapping[str, Any], by: Ranking) -> Markup:
    scores = model["scores"]
    value = scores[by.key]
    facts = (
        ("forgotten", forgotten(scores)),
        ("retained", retained(scores)),
        ("membership AUC", scores["membership_auc"]),
        ("MMLU", scores["mmlu"]),
        ("probe", (scores["probe"] or {}).get("accuracy")),
    )
    rows = [cell for name, number in facts if number is not None for cell in
            (element("dt", name), element("dd", fixed(number)))]  # fmt: skip
    return element(
        "div",
        element("div", what, class_="what"),
        element("div", model["name"], class_="who"),
        element("div", fixed(value), class_="big num" if value is not None else "big none"),
        element("dl", *rows),
        class_=f"card {model['kind']}",
    )


def _score_notes(models: Sequence[Mapping[str, Any]]) -> list[Markup]:
    semantics = sorted({model["scores"]["semantics"] for model in models})
    notes = [
        "Task aggregate: harmonic mean of the task terms, forget terms as 1 \u2212 score; 0 as soon as one term is 0. "
        "Membership AUC: how well a loss threshold tells forgotten documents from unseen ones; 0.5 is ideal, near 1 "
        "is under-forgotten, near 0 over-forgotten; in brackets its bootstrap interval. "
        "Membership score: 1\u00a0\u2212\u00a02\u00a0|AUC\u00a0\u2212\u00a00.5|.",
        "Aggregate with MMLU: mean of task aggregate, membership score and MMLU, the official number. Without MMLU: "
        "mean of the first two only; it is not comparable with published aggregates.",
        "Degenerate: share of generations that are empty or repeat themselves; forgetting by collapse shows here. "
        "Probe: accuracy on general questions that were neither forgotten nor retained.",
    ]
    if semantics:
        notes.append(f"Semantics: {', '.join(semantics)}.")
    return [element("p", note, class_="note") for note in notes]


_TASK_NOTE = element(
    "p",
    "ROUGE-L: recall, stemmed, of sentence completions (regurgitation). Exact: exact match of answers (knowledge). "
    "NLL: mean negative log-likelihood per token, in nats. Forget columns are the scores themselves, so low is good.",
    class_="note",
)
_MERGE_NOTE = element(
    "p",
    "Space: delta merges B·A, factors merges A and B apart. Length: the merged delta's Frobenius norm over the mean of "
    "its candidates'. Truncation error: the part of the merged delta, relative "
    "in Frobenius norm, that an adapter of the exported rank cannot hold.",
    class_="note",
)


def _plane(models: Sequence[Mapping[str, Any]]) -> Markup | None:
    points = []
    for model in ordered(models):
        right, up = retained(model["scores"]), forgotten(model["scores"])
        if right is not None and up is not None:
            points.append(charts.Point(model["name"], model["kind"], right, up))
    if not points:
        return None
    figure, unnamed = charts.scatter(points)
    present = [kind for kind in KINDS if any(point.kind == kind for point in points)]
    key = [element("span", tables.kind_mark(kind), KIND_NAMES[kind].lower()) for kind in present]
    note = f"{unnamed} crowded points are not named; hover over one for its name." if unnamed else None
    return section(
        "Forgotten against retained",
        element("div", *key, class_="key"),
        figure,
        element("p", "The marked corner is perfect: all forgotten, all retained.", note and " " + note, class_="note"),
    )


def _curves(candidates: Sequence[Mapping[str, Any]]) -> Markup | None:
    names = {name: None for candidate in candidates for name in candidate["curves"] if name != "update"}
    terms = [name for name in names if name not in CURVES_FIRST + CURVES_LAST]
    panels = []
    for name in (*CURVES_FIRST, *terms, *CURVES_LAST):
        curves = [
            charts.Curve(
                candidate["name"],
                candidate["curves"]["update"],
                candidate["curves"].get(name, [None] * len(candidate["curves"]["update"])),
                candidate["status"] == "diverged",
            )
            for candidate in candidates
        ]
        panel = charts.curve_panel(CURVE_TITLES.get(name, name), curves)
        if panel is not None:
            panels.append(panel)
    if not panels:
        return None
    note = "One panel per term, one line per candidate"
    if any(len(candidate["curves"]["update"]) > charts.SMOOTHED for candidate in candidates):
        note += "; pale: each update, strong: moving mean"
    if any(candidate["status"] == "diverged" for candidate in candidates):
        note += "; ✕ marks the last finite value of a candidate that diverged"
    if len(candidates) > charts.LABELLED:
        note += f"; {charts.LABELLED} of {len(candidates)} lines are named, hover over the others"
    return section("Loss curves", element("div", *panels, class_="panels"), element("p", note + ".", class_="note"))


def _padding(share: float | None) -> Markup | None:
    return None if share is None else element("p", f"Padding: {100 * share:.1f}% of the tokens.", class_="note")


def _run(report: Mapping[str, Any]) -> Markup:
    hardware, training = report["hardware"], report["training"]
    speed = training["candidate_steps_per_second"]
    facts = (
        ("Command", element("code", " ".join(report["command"]) or "(from Python)")),
        ("Hardware", f"{hardware['platform']}: {hardware['device_count']} \u00d7 {hardware['device']}, "
                     f"{hardware['cpu_count']} CPU cores"),
        ("JAX", hardware["jax"]),
        ("Training", f"{_duration(training['seconds'])}, {training['candidate_steps']:,} candidate-steps"
                     + ("" if speed is None else f", {speed:,.2f} per second")),
    )  # fmt: skip
    rows = [element("tr", element("th", name, scope="row"), element("td", value)) for name, value in facts]
    return element("div", element("table", element("tbody", *rows)), class_="scroll")


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
