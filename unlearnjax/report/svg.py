"""Axes and labels for plots made of text: scales, ticks, and labels that do not lie on each other."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from unlearnjax.report.markup import Markup, element, group

FONT = 12.0  # px, in the units of the viewBox
LETTER = 0.58 * FONT  # a generous mean width of a letter in sans-serif faces
LINE = 14.0


class Scale(NamedTuple):
    """A map from values to pixels, and the ticks to show on it."""

    pixel: Callable[[float], float]
    ticks: list[tuple[float, str]]  # value, label
    name: str  # "linear", "log" or "signed log"


class Box(NamedTuple):
    """A rectangle in pixels; y grows downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def meets(self, other: "Box") -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def inside(self, other: "Box") -> bool:
        across = self.left >= other.left and self.right <= other.right
        return across and self.top >= other.top and self.bottom <= other.bottom


def width(text: str) -> float:
    """An estimate, rather too wide, of a text's width in pixels."""
    return sum(2 * LETTER if ord(letter) > 0x2E7F else LETTER for letter in text)


def shorten(names: Sequence[str], letters: int) -> list[str]:
    """Each name in at most so many letters: cut in the middle, at the end or in front, whichever keeps them apart."""
    middle = (letters - 1) // 2
    cuts = ((letters - 1 - middle, middle), (letters - 1, 0), (0, letters - 1))  # letters kept in front, behind
    ways = [
        [
            name if len(name) <= letters else f"{name[:front]}…{name[len(name) - behind :]}"
            for name in names
        ]
        for front, behind in cuts
    ]  # fmt: skip
    return max(ways, key=lambda way: len(set(way)))


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from below `low` to above `high`."""
    if not high > low:
        pad = abs(low) * 0.1 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Just as many decimals as the ticks need to differ; powers of ten when they are far from 1."""
    largest = max(abs(tick) for tick in ticks)
    if largest >= 1e5 or 0 < largest < 1e-3:
        return [f"{tick:.1e}".replace(".0e", "e").replace("e+0", "e").replace("e-0", "e-") for tick in ticks]
    step = min((abs(b - a) for a, b in itertools.pairwise(ticks)), default=1.0)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return [f"{tick:.{decimals}f}".replace("-", "\u2212") for tick in ticks]


def linear(low: float, high: float, start: float, end: float, ticks: Sequence[float] | None = None) -> Scale:
    """A linear scale whose range grows to round numbers unless the ticks are given."""
    if ticks is None:
        ticks = nice_ticks(low, high)
        low, high = ticks[0], ticks[-1]
    span = (high - low) or 1.0
    return Scale(
        lambda value: start + (value - low) / span * (end - start),
        list(zip(ticks, tick_labels(ticks), strict=True)),
        "linear",
    )


def value_scale(values: Sequence[float], start: float, end: float) -> Scale:
    """Linear; logarithmic where values span more than 300-fold; with its sign kept where a loss runs far below zero."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 300:
        return _powers(range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1), start, end)
    sizes = sorted(abs(value) for value in values)
    unit = sizes[len(sizes) // 4] or 1.0
    if sizes[-1] / unit > 3000:
        return _signed(low, high, start, end)
    return linear(low, high, start, end)


def _powers(exponents: range, start: float, end: float) -> Scale:
    low, high = exponents[0], exponents[-1]
    span = (high - low) or 1
    kept = exponents[:: -(-len(exponents) // 6)]
    ticks = [(10.0**exponent, _power(exponent)) for exponent in kept]
    return Scale(lambda value: start + (math.log10(value) - low) / span * (end - start), ticks, "log")


def _signed(low: float, high: float, start: float, end: float) -> Scale:
    """sign(v) log10(1 + |v|): linear near zero, logarithmic far away, on both sides."""

    def of(value: float) -> float:
        return math.copysign(math.log10(1 + abs(value)), value)

    first, last = of(min(low, 0.0)), of(max(high, 0.0))
    span = (last - first) or 1.0
    largest = math.ceil(max(-first, last))
    every = -(-largest // 4)
    ticks = [(0.0, "0")]
    for exponent in range(every, largest + 1, every):
        for sign, mark in ((1.0, ""), (-1.0, "\u2212")):
            if low <= sign * 10.0**exponent <= high:
                ticks.append((sign * 10.0**exponent, mark + _power(exponent)))
    return Scale(lambda value: start + (of(value) - first) / span * (end - start), ticks, "signed log")


def _power(exponent: int) -> str:
    if -3 <= exponent <= 3:
        return f"{10.0**exponent:g}"
    return "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def axes(frame: Box, x: Scale, y: Scale, x_name: str, y_name: str, *, upright_grid: bool = False) -> Markup:
    """Grid lines (level ones, and upright ones if asked for), tick labels and axis names."""
    parts: list[Markup] = []
    for value, label in y.ticks:
        at = y.pixel(value)
        parts.append(element("line", class_="grid", x1=frame.left, x2=frame.right, y1=at, y2=at))
        parts.append(element("text", label, class_="tick", x=frame.left - 6, y=at + 4, text_anchor="end"))
    for value, label in x.ticks:
        at = x.pixel(value)
        if upright_grid:
            parts.append(element("line", class_="grid", x1=at, x2=at, y1=frame.top, y2=frame.bottom))
        parts.append(element("line", class_="axis", x1=at, x2=at, y1=frame.bottom, y2=frame.bottom + 4))
        parts.append(element("text", label, class_="tick", x=at, y=frame.bottom + 17, text_anchor="middle"))
    parts.append(element("line", class_="axis", x1=frame.left, x2=frame.right, y1=frame.bottom, y2=frame.bottom))
    middle = (frame.left + frame.right) / 2
    parts.append(element("text", x_name, class_="name", x=middle, y=frame.bottom + 34, text_anchor="middle"))
    if y_name:
        parts.append(element("text", y_name, class_="name", x=frame.left - 44, y=frame.top - 12))
    return group(*parts)


def spread(wanted: Sequence[float], low: float, high: float, gap: float = LINE) -> list[float]:
    """Positions as near to the wanted ones as a least gap allows, kept inside [low, high] where they fit."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    # Merge neighbours into blocks of evenly spaced labels until no two blocks overlap.
    blocks: list[tuple[float, list[int]]] = []  # (top of the block, members)
    for index in order:
        members, top = [index], min(max(wanted[index], low), high)
        while blocks and top < blocks[-1][0] + gap * len(blocks[-1][1]):
            members = blocks.pop()[1] + members
            centre = sum(wanted[member] - gap * rank for rank, member in enumerate(members)) / len(members)
            top = max(low, min(centre, high - gap * (len(members) - 1)))
        blocks.append((top, members))
    placed = [0.0] * len(wanted)
    for top, members in blocks:
        for rank, member in enumerate(members):
            placed[member] = top + gap * rank
    return placed


class Label(NamedTuple):
    """Where a label went: its box, and which end of the text is nearest to the point (SVG's text-anchor)."""

    box: Box
    anchor: str

    @property
    def start(self) -> float:
        """x of the text's anchor."""
        return {"start": self.box.left, "end": self.box.right}.get(self.anchor, (self.box.left + self.box.right) / 2)


def place_labels(
    points: Sequence[tuple[float, float]], labels: Sequence[str], frame: Box, important: int = 0
) -> list[Label | None]:
    """A place for each label near its point, off all points and other labels; None where there is no room.

    Earlier labels choose first, and the first `important` ones may always go far from their points. The others may not
    where points are many: a thicket of leader lines is worse than a label less.
    """
    reaches = (8.0, 14.0, 24.0, 36.0, 52.0, 74.0, 100.0, 130.0)  # px
    usual = reaches[:4] if len(points) <= 16 else reaches[:2]
    taken = [Box(x - 7, y - 7, x + 7, y + 7) for x, y in points]
    placed: list[Label | None] = []
    for index, ((x, y), text) in enumerate(zip(points, labels, strict=True)):
        reach = reaches if index < important else usual
        places = (label for label in _around(x, y, width(text), reach) if label.box.inside(frame))
        found = next((label for label in places if not any(label.box.meets(other) for other in taken)), None)
        if found is not None:
            taken.append(found.box)
        placed.append(found)
    return placed


def _around(x: float, y: float, wide: float, reach: Sequence[float]) -> list[Label]:
    """Places near a point: right, left, above, below, the corners, then the same further out."""
    sides = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1), (1, -0.5), (1, 0.5))
    places = []
    for away in reach:
        for right, down in sides:
            anchor = "start" if right > 0 else "end" if right < 0 else "middle"
            start = x + right * away - {"start": 0.0, "end": wide, "middle": wide / 2}[anchor]
            centre = y + down * (away + LINE / 2 - 2)
            places.append(Label(Box(start, centre - LINE / 2, start + wide, centre + LINE / 2), anchor))
    return places
