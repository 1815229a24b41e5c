"""HTML and SVG elements as a function call. Text is escaped always; only what `element` made passes as markup."""

import html
from typing import NamedTuple


class Markup(NamedTuple):
    """Markup that is safe to put into a page as it is."""

    text: str


Child = Markup | str | int | float | None

_VOID = frozenset({"br", "col", "hr", "meta"})


def element(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """`element("a", "text", href="#x")`. `class_` and `stroke_width` become `class` and `stroke-width`.

    Attributes that are None or False are left out, True is written without a value; children that are None are skipped.
    Numbers are written with at most two decimals, enough for a coordinate.
    """
    pairs = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        # SVG spells a few attributes in camel case (viewBox) and the rest with hyphens; neither has underscores.
        name = name.rstrip("_").replace("_", "-")
        pairs.append(f" {name}" if value is True else f' {name}="{html.escape(_text(value), quote=True)}"')
    inside = "".join(_child(child) for child in children)
    closing = "" if tag in _VOID else f"{inside}</{tag}>"
    return Markup(f"<{tag}{''.join(pairs)}>{closing}")


def group(*children: Child) -> Markup:
    """Several pieces one after the other, without an element around them."""
    return Markup("".join(_child(child) for child in children))


def _child(child: Child) -> str:
    if child is None:
        return ""
    return child.text if isinstance(child, Markup) else html.escape(_text(child), quote=False)


def _text(value: str | int | float) -> str:
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".")
    return str(value)
