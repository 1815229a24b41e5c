"""Heat maps: a grid of numbers by row and layer."""

from collections.abc import Sequence

from unlearnjax.report import svg
from unlearnjax.report.markup import Markup, element


def heat_map(
    title: str, rows: Sequence[str], values: Sequence[Sequence[float] | None], layers: int, marked: range = range(0)
) -> Markup:
    """A figure with a cell per row and layer. Its depth is the number's size against the largest one; numbers below
    zero have another colour. The largest is said in the title.

    Args:
      values: None where a row has none. marked: rows whose names stand out.
    """
    letters = min(26, max(map(len, rows)))
    left, cell = letters * svg.LETTER + 14, 17.0
    view = (460.0, 34 + len(rows) * cell + 42)  # as wide as the report's other figures, for letters of one size
    wide = min(26.0, (view[0] - left - 12) / layers)
    largest = max((abs(v) for row in values if row for v in row), default=0.0)
    parts = [element("title", title), element("text", f"{title}, up to {largest:.3f}", class_="heading", x=6, y=16)]
    for i, (name, own) in enumerate(zip(svg.shorten(rows, letters), values, strict=True)):
        top = 28 + i * cell
        weight = {"font_weight": "700"} if i in marked else {}
        parts.append(element("text", name, class_="tick", x=left - 6, y=top + 12, text_anchor="end", **weight))
        for layer, value in enumerate(own or []):
            said = element("title", f"{rows[i]}, layer {layer}: {value:.4f}")
            colour, depth = ("f1", value) if value >= 0 else ("f0", -value)
            parts.append(element("rect", said, class_=colour, x=left + layer * wide, y=top, width=wide - 1,
                                 height=cell - 1, fill_opacity=depth / largest if largest else 0.0))  # fmt: skip
        if not own:
            parts.append(element("text", "no fact has one", class_="tick", x=left + 4, y=top + 12))
    bottom = 28 + len(rows) * cell
    every = -(-layers // 16)
    for layer in range(0, layers, every):
        middle = left + (layer + 0.5) * wide
        parts.append(element("text", str(layer), class_="tick", x=middle, y=bottom + 14, text_anchor="middle"))
    parts.append(element("text", "layer", class_="name", x=left + layers * wide / 2, y=bottom + 31,
                         text_anchor="middle"))  # fmt: skip
    return element("figure", element("svg", *parts, viewBox=f"0 0 {view[0]:g} {view[1]:g}", role="img"))
