"""The report of a trace: trace.json's schema, and its page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearnjax.errors import UserError
from unlearnjax.report import charts, checks, schema, tables
from unlearnjax.report.heat import heat_map
from unlearnjax.report.markup import Markup, element
from unlearnjax.report.page import header, page, section
from unlearnjax.tracing.effects import SUBJECT, doubt
from unlearnjax.tracing.trace import Traced

FILE, SCHEMA, VERSION = "trace.json", "unlearnjax.trace", 1
SHOWN = 12  # single facts on the page
NAMES = {"hidden": "hidden states", "mlp": "MLP", "attention": "attention"}

_COLUMN = checks.list_of(checks.number)
_REPORT = checks.record(
    {
        "schema": checks.string, "version": checks.integer, "title": checks.string, "created": checks.string,
        "unlearnjax": checks.string, "command": checks.list_of(checks.string), "hardware": schema.HARDWARE,
        "model": checks.string, "layers": checks.integer, "settings": schema.OBJECT,
        "counts": checks.mapping_of(checks.integer),
        "skipped": checks.list_of(checks.record({"id": checks.string, "reason": checks.string})),
        "effects": checks.record(
            {
                "semantics": checks.string, "facts": checks.integer, "subjects": checks.integer,
                "clean": checks.number, "corrupted": checks.number, "total": checks.mapping_of(checks.number),
                "kinds": checks.mapping_of(
                    checks.mapping_of(
                        checks.record({"mean": _COLUMN, "low": _COLUMN, "high": _COLUMN, "facts": checks.integer})
                    )
                ),
            }
        ),
        "recommended": checks.record(
            {
                "kind": checks.string, "place": checks.string, "layers": checks.list_of(checks.integer, length=2),
                "share": checks.number, "stability": checks.or_null(checks.number), "curve": _COLUMN,
            }
        ),
    }
)  # fmt: skip


def complete(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with its schema's name and version, checked, in JSON's own types."""
    full = dict(schema.plain({"schema": SCHEMA, "version": VERSION, **report}))
    _REPORT(full, FILE)
    return full


def read_trace(path: str | Path) -> dict[str, Any]:
    """Read and check a trace.json, given as the file or its folder.

    Raises:
      UserError: no such file, broken JSON, or not such a report.
    """
    place = schema.located(path, FILE)
    found = schema.read_json(place)
    if not isinstance(found, dict) or found.get("schema") != SCHEMA or found.get("version") != VERSION:
        raise UserError(f"{place}: is not a trace of version {VERSION}; give what `unlearnjax trace` wrote")
    _REPORT(found, str(place))
    return dict(found)


def render_trace_html(report: Mapping[str, Any], traces: Sequence[Traced]) -> str:
    """The trace as one self-contained page."""
    body = element(
        "main",
        header(report),
        element("p", _lead(report), class_="lead"),
        section("Average effect by place and layer", element("p", _meaning(report), class_="note"), _averages(report)),
        section("By layer, at the subject's last token", _curves(report)),
        section("Single facts", element("p", _SINGLE, class_="note"), _singles(traces)),
        _skipped(report["skipped"]) if report["skipped"] else None,
        section("Command", element("pre", element("code", " ".join(report["command"]) or "(from Python)"))),
        element("footer", f"Written by unlearnjax {report['unlearnjax']}.", class_="note"),
    )
    return page(report["title"], body)


_SINGLE = (
    f"The first {SHOWN}. A cell is the answer's probability with one token's activation at this layer put back, less "
    "that of the corrupted run. The subject's tokens are in bold, the answer's first token is behind the arrow."
)


def _lead(report: Mapping[str, Any]) -> str:
    best, found = report["recommended"], report["effects"]
    first, last = best["layers"]
    against = doubt(found, best)
    agree = "" if best["stability"] is None else (
        f", and {100 * best['stability']:.0f}% of resamples of the subjects choose the same range"
    )  # fmt: skip
    return (
        f"Of {report['counts']['given']} facts the model knows {report['counts']['known']}; {found['facts']} of them, "
        f"about {found['subjects']} subjects, were traced. "
        f"Noise on the subject lowers the answer's probability from {found['clean']:.2f} to {found['corrupted']:.2f}. "
        f"Layers to unlearn in: {first} to {last}, by {NAMES[best['kind']]}: they hold {100 * best['share']:.0f}% of "
        f"its positive effect{agree}." + ("" if against is None else f" But {against}.")
    )


def _meaning(report: Mapping[str, Any]) -> str:
    if report["effects"]["semantics"] == "rome":
        what = "AIE: the answer's probability with an activation put back, less that of the corrupted run"
    else:
        what = "As Selective Amnesia's figures: the answer's probability itself, at the places as its code takes them"
    window = report["settings"]["window"]
    put = "one layer at a time" if window == 1 else f"in windows of {window} layers"
    return f"{what}; its mean over facts. MLP and attention are put back {put}."


def _averages(report: Mapping[str, Any]) -> Markup:
    maps = []
    for kind, places in report["effects"]["kinds"].items():
        values = [own["mean"] or None for own in places.values()]
        maps.append(heat_map(NAMES[kind], list(places), values, report["layers"]))
    return element("div", *maps, class_="panels")


def _curves(report: Mapping[str, Any]) -> Markup:
    layers = list(range(report["layers"]))
    panels = []
    for kind, places in report["effects"]["kinds"].items():
        own = places[SUBJECT]
        curves = [charts.Curve(name, layers, own[key], False)
                  for name, key in (("mean", "mean"), ("2.5%", "low"), ("97.5%", "high")) if own[key]]  # fmt: skip
        panel = charts.curve_panel(NAMES[kind], curves, "layer")
        if panel is not None:
            panels.append(panel)
    return element("div", *panels, class_="panels")


def _singles(traces: Sequence[Traced]) -> Markup:
    maps = []
    for t in traces[:SHOWN]:
        for kind, scores in t.restored.items():
            title = f"{NAMES[kind]} \u2192 {t.answer.strip()!r}"
            rows = [token.replace("\n", "\u21b5") or " " for token in t.tokens]
            values = (scores - t.corrupted).tolist()
            maps.append(heat_map(title, rows, values, scores.shape[1], range(t.begin, t.end)))
    return element("div", *maps, class_="panels")


def _skipped(skipped: Sequence[Mapping[str, str]]) -> Markup:
    rows = [element("tr", element("th", x["id"], scope="row"), element("td", x["reason"])) for x in skipped]
    return section(f"Not traced ({len(skipped)})", tables.table([[tables.head("Fact"), tables.head("Why")]], rows))
