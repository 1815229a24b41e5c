"""What every page is made of: the frame, without a script or anything from elsewhere, and parts that all have."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from unlearnjax.report.markup import Child, Markup, element
from unlearnjax.report.style import STYLE


def page(title: str, body: Markup) -> str:
    """A whole HTML document."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        # Whatever a name in the report may try, the page runs nothing and fetches nothing.
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    return f"<!doctype html>\n{element('html', head, element('body', body), lang='en').text}\n"


def section(title: str, *children: Child) -> Markup:
    return element("section", element("h2", title), *children)


def header(report: Mapping[str, Any]) -> Markup:
    hardware = report["hardware"]
    count = f"{hardware['device_count']} \u00d7 " if hardware["device_count"] != 1 else ""
    return element(
        "header",
        element("h1", report["title"]),
        element("p", f"{report['created']} · {count}{hardware['device']} · JAX {hardware['jax']}", class_="muted"),
    )


def warnings_box(warnings: Sequence[str]) -> Markup | None:
    if not warnings:
        return None
    title = element("strong", "Warning" if len(warnings) == 1 else "Warnings")
    return element("div", title, element("ul", *(element("li", text) for text in warnings)), class_="warnings")


def yaml_text(recipe: Mapping[str, Any]) -> str:
    """The recipe as the YAML it can be written in."""
    import yaml

    # Through JSON, so that anything in a report can be shown.
    plain = json.loads(json.dumps(recipe))
    text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
    return str(text).strip()
