"""The report of a run on an image model: its schema, its page, and its table."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearnjax.errors import UserError
from unlearnjax.report import charts, checks, schema, tables
from unlearnjax.report.markup import Markup, element
from unlearnjax.report.page import header, page, section, warnings_box, yaml_text

SCHEMA, VERSION = "unlearnjax.images-report", 1
COLUMNS = (("retain", "Retain"), ("forget", "Forget"), ("test", "Test"), ("mia", "MIA-efficacy"), ("gap", "Avg. Gap"))
KINDS = ("base", "retrained", "baseline", "merge")
MARKS = {"retrained": "gold", "baseline": "candidate"}  # the page's marks are those of language models' reports

_MAYBE = checks.or_null(checks.number)
_SCORES = checks.record(dict.fromkeys(("retain", "forget", "test", "mia"), _MAYBE))
_COLUMN = checks.list_of(_MAYBE)
_REPORT = checks.record(
    {
        "schema": checks.string, "version": checks.integer, "title": checks.string, "created": checks.string,
        "unlearnjax": checks.string, "command": checks.list_of(checks.string),
        "hardware": schema.HARDWARE, "recipe": schema.OBJECT,
        "data": checks.mapping_of(checks.record({"rows": checks.integer, "sha256": checks.string})),
        "rule": checks.record(
            {"name": checks.one_of("keep", "closest"), "floor": _MAYBE, "target": checks.or_null(_SCORES)}
        ),
        "weights": checks.record({"trained": checks.integer, "all": checks.integer}),
        "candidates": checks.list_of(
            checks.record(
                {
                    "name": checks.string, "settings": schema.OBJECT, "status": checks.one_of("finished", "diverged"),
                    "diverged_at": checks.or_null(checks.integer), "curves": checks.curves,
                }
            )
        ),
        "merges": checks.list_of(
            checks.record(
                {
                    "name": checks.string, "method": checks.string, "semantics": checks.or_null(checks.string),
                    "hyperparameters": schema.OBJECT, "candidates": checks.list_of(checks.string), "lambda": _MAYBE,
                },
                optional={
                    "members": checks.list_of(checks.string), "cost": checks.number,
                    "sparsity": checks.record({"trained": checks.number, "all": checks.number}),
                    "sweep": checks.record(dict.fromkeys(("lambda", "retain", "forget", "test", "mia"), _COLUMN)),
                },
            )
        ),
        "models": checks.list_of(
            checks.record(
                {"name": checks.string, "kind": checks.one_of(*KINDS), "scores": _SCORES, "gap": _MAYBE},
                optional={"data": checks.string},
            )
        ),
        "warnings": checks.list_of(checks.string),
    },
    optional={"exported": checks.string},
)  # fmt: skip


def validate(report: Mapping[str, Any], where: str = schema.FILE) -> None:
    """Check a report against the schema.

    Raises:
      UserError: another schema or version, or the path of the first wrong, missing or unknown key.
    """
    if not isinstance(report, dict) or report.get("schema") != SCHEMA:
        raise UserError(f"{where}: not a report on an image model")
    if report.get("version") != VERSION:
        raise UserError(f"{where}: version {report.get('version')!r}; this unlearnjax reads {VERSION}")
    _REPORT(report, where)


def complete(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with its schema's name and version, in JSON's own types."""
    return dict(schema.plain({"schema": SCHEMA, "version": VERSION, **report}))


def write_images_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Validate and write `report.json`, whole or not at all."""
    full = complete(report)
    validate(full)
    schema.write_json(folder / schema.FILE, full)


def read_images_report(path: str | Path) -> dict[str, Any]:
    """Read and validate a report, given as the file or its folder.

    Raises:
      UserError: no such file, broken JSON, or not such a report.
    """
    path = schema.located(path)
    found = schema.read_json(path)
    validate(found, str(path))
    return dict(found)


def render_images_markdown(report: Mapping[str, Any]) -> str:
    """The models' scores as a Markdown table, in percent."""
    used = _used(report["models"])
    lines = ["| model | " + " | ".join(title for _, title in used) + " | lambda |", "|---" * (len(used) + 2) + "|"]
    for model in _ordered(report["models"]):
        cells = [_percent(_value(model, key)) for key, _ in used]
        lines.append(f"| {model['name']} | " + " | ".join([*cells, _lambda(report, model["name"])]) + " |")
    return "\n".join(lines)


def render_images_html(report: Mapping[str, Any]) -> str:
    """The report as one self-contained page."""
    report = complete(report)
    validate(report)
    body = element(
        "main",
        header(report),
        element("p", _lead(report), class_="lead"),
        warnings_box(report["warnings"]),
        section("Scores", _scores(report), element("p", _SCORES_NOTE, class_="note")),
        _sweeps(report),
        section("Merges", _merges(report)) if report["merges"] else None,
        _losses(report["candidates"]),
        section("Data", _data(report["data"])),
        section("Recipe", element("pre", element("code", yaml_text(report["recipe"])))),
        section("Command", element("pre", element("code", " ".join(report["command"]) or "(from Python)"))),
        element("footer", f"Written by unlearnjax {report['unlearnjax']}.", class_="note"),
    )
    return page(report["title"], body)


_SCORES_NOTE = (
    "In percent. Retain, Forget, Test: accuracy. MIA-efficacy: the share of forget images that SalUn's attack takes "
    "for unseen ones. What is right is what the retrained model has; Avg. Gap is the mean absolute difference from it."
)


def _lead(report: Mapping[str, Any]) -> str:
    rule = report["rule"]
    by = ("closeness to the retrained model" if rule["name"] == "closest"
          else f"the lowest forget accuracy at a retain accuracy of at least {rule['floor']:.2f}")  # fmt: skip
    text = f"{len(report['candidates'])} candidates fine-tuned on the forget images; lambda chosen by {by}, on "
    exported = f"; exported: {report['exported']}" if "exported" in report else ""
    return f"{text}validation images{exported}."


def _ordered(models: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(models, key=lambda model: KINDS.index(model["kind"]))


def _value(model: Mapping[str, Any], key: str) -> float | None:
    found: float | None = model["gap"] if key == "gap" else model["scores"][key]
    return found


def _used(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    return [(key, title) for key, title in COLUMNS if any(_value(m, key) is not None for m in models)]


def _percent(value: float | None) -> str:
    return tables.NONE if value is None else f"{value:.2f}"


def _lambda(report: Mapping[str, Any], name: str) -> str:
    found = next((m["lambda"] for m in report["merges"] if m["name"] == name), None)
    return tables.NONE if found is None else f"{found:g}"


def _cell(text: str) -> Markup:
    return element("td", text, class_="r")


def _scores(report: Mapping[str, Any]) -> Markup:
    used = _used(report["models"])
    heads = [tables.head("Model"), *(tables.number_head(title) for _, title in used), tables.number_head("lambda")]
    rows = []
    for model in _ordered(report["models"]):
        name = tables.name_cell({"name": model["name"], "kind": MARKS.get(model["kind"], model["kind"])})
        cells = [_cell(_percent(_value(model, key))) for key, _ in used]
        rows.append(element("tr", name, *cells, _cell(_lambda(report, model["name"]))))
    return tables.table([heads], rows)


SWEPT = ("retained: retain accuracy, right is better", "forgotten: 1 \u2212 forget accuracy, up is more")


def sweep_traces(report: Mapping[str, Any]) -> list[charts.Trace]:
    """Each merge's way along lambda, where one was chosen."""
    drawn = []
    for merge in report["merges"]:
        sweep = merge.get("sweep")
        if sweep is not None and merge["lambda"] is not None:
            points = [(r / 100, 1 - f / 100) for r, f in zip(sweep["retain"], sweep["forget"], strict=True)]
            drawn.append(charts.Trace(merge["name"], points, sweep["lambda"].index(merge["lambda"])))
    return drawn


def _sweeps(report: Mapping[str, Any]) -> Markup | None:
    """Forget against retain accuracy along lambda, a line per merge."""
    floor, drawn = report["rule"]["floor"], sweep_traces(report)
    if not drawn:
        return None
    return section(
        "Forgotten against retained along lambda",
        charts.traces(drawn, None if floor is None else floor / 100, SWEPT),
        element("p", "On validation images; the circle is the lambda that the rule chose.", class_="note"),
    )


def _merges(report: Mapping[str, Any]) -> Markup:
    titles = ("lambda", "Zeros of trained weights", "Zeros of all weights")
    heads = [tables.head("Merge"), tables.head("Method"), *map(tables.number_head, titles), tables.head("Members")]
    rows = []
    for merge in report["merges"]:
        zeros = merge.get("sparsity")
        shares = [tables.NONE if zeros is None else f"{100 * zeros[key]:.2f}%" for key in ("trained", "all")]
        settings = ", ".join(f"{key}={value}" for key, value in merge["hyperparameters"].items())
        text = merge["method"] + (f" ({settings})" if settings else "")
        members = ", ".join(merge["members"]) if "members" in merge else f"{len(merge['candidates'])} candidates"
        cells = [_cell(_lambda(report, merge["name"])), *map(_cell, shares), element("td", members)]
        rows.append(element("tr", element("th", merge["name"], scope="row"), element("td", text), *cells))
    return tables.table([heads], rows)


def _losses(candidates: Sequence[Mapping[str, Any]]) -> Markup | None:
    curves = [charts.Curve(c["name"], c["curves"]["update"], c["curves"]["loss"], c["status"] == "diverged")
              for c in candidates]  # fmt: skip
    panel = charts.curve_panel("loss on the forget images", curves)
    return None if panel is None else section("Loss curves", element("div", panel, class_="panels"))


def _data(data: Mapping[str, Any]) -> Markup:
    rows = [element("tr", element("th", name, scope="row"), _cell(f"{found['rows']:,}"),
                    element("td", element("code", found["sha256"][:16])))
            for name, found in data.items()]  # fmt: skip
    return tables.table([[tables.head("Images"), tables.number_head("Rows"), tables.head("SHA-256")]], rows)
