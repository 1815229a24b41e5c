"""The kinds of plot a report has: a curve panel per quantity, and forgotten against retained by model or by scale."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from unlearnjax.report import svg
from unlearnjax.report.markup import Markup, element, group

COLOURS = 8  # in style.py: classes s0 to s7 for strokes, f0 to f7 for text
DASHES = (None, "6 3", "2 2", "8 3 2 3")  # one per round through the colours
LABELLED = 14  # curves named beside a panel; more have no room
SMOOTHED = 80  # longer curves are shown pale, with a moving mean over them


class Curve(NamedTuple):
    """One candidate's values of one quantity."""

    name: str
    updates: Sequence[int]
    values: Sequence[float | None]  # null where not finite
    diverged: bool


class Point(NamedTuple):
    """One model in the scatter plot."""

    name: str
    kind: str
    retained: float
    forgotten: float


class Trace(NamedTuple):
    """One merge's trials in the order of their scales, as (retained, forgotten), and which of them was chosen."""

    name: str
    points: Sequence[tuple[float, float]]
    chosen: int


def curve_panel(title: str, curves: Sequence[Curve], axis: str = "update") -> Markup | None:
    """A figure with a line per candidate, named at its end; None if no value is finite."""
    drawn = [(index, curve, _finite(curve)) for index, curve in enumerate(curves)]
    drawn = [item for item in drawn if item[2]]
    if not drawn:
        return None
    letters = max(6, min(16, max(len(curve.name) + 2 * curve.diverged for _, curve, _ in drawn)))
    view = (460.0, 270.0)
    frame = svg.Box(52, 34, view[0] - letters * svg.LETTER - 20, view[1] - 42)
    xs = [x for _, _, points in drawn for x, _ in points]
    x = svg.linear(min(xs), max(xs), frame.left, frame.right, _whole_ticks(min(xs), max(xs)))
    y = svg.value_scale([value for _, _, points in drawn for _, value in points], frame.bottom, frame.top)
    # The title says what is drawn; a scale that is not linear must be said too.
    heading = title if y.name == "linear" else f"{title} ({y.name} scale)"
    parts = [element("title", f"{heading}, by {axis}"), svg.axes(frame, x, y, axis, "")]
    parts.append(element("text", heading, class_="heading", x=6, y=16))
    ends = []
    for index, curve, points in drawn:
        pixels = [(x.pixel(at), y.pixel(value)) for at, value in points]
        strong = _moving_mean(pixels, len(pixels) // 40, curve.diverged) if len(pixels) > SMOOTHED else pixels
        parts.append(_line(index, curve, pixels, strong))
        ends.append((index, curve, strong[-1]))
    parts.append(_end_labels(ends, frame, letters))
    return element("figure", _picture(view, *parts))


def scatter(points: Sequence[Point]) -> tuple[Markup, int]:
    """Forgotten (up) against retained (right), and how many points had no room for their name.

    A perfect result is in the upper right corner, which is marked.
    """
    view = (460.0, 380.0)
    frame = svg.Box(52, 36, view[0] - 16, view[1] - 46)
    x = _share_scale([point.retained for point in points], frame.left, frame.right)
    y = _share_scale([point.forgotten for point in points], frame.bottom, frame.top)
    # Labels of the few base, gold and merge points come first, should room run out.
    points = sorted(points, key=lambda point: ("merge", "base", "gold", "candidate").index(point.kind))
    at = [(x.pixel(point.retained), y.pixel(point.forgotten)) for point in points]
    names = svg.shorten([point.name for point in points], 24 if len(points) <= 16 else 14)
    important = sum(point.kind != "candidate" for point in points)
    labels = svg.place_labels(at, names, frame._replace(top=frame.top - 14), important)
    parts = [
        element("title", "Mean retained score against mean forgotten score, one point per model"),
        svg.axes(frame, x, y, "retained: mean retain score, right is better",
                 "forgotten: 1 \u2212 mean forget score, up is better", upright_grid=True),
        element("path", class_="ideal", d=f"M{x.pixel(1.0) - 14:.1f} {y.pixel(1.0):.1f}h14v14"),
    ]  # fmt: skip
    leaders, marks, texts = [], [], []
    for point, (px, py), name, label in zip(points, at, names, labels, strict=True):
        full = f"{point.name}: retained {point.retained:.3f}, forgotten {point.forgotten:.3f}"
        marks.append(element("path", element("title", full), class_=f"mark {point.kind}", d=marker(point.kind, px, py)))
        if label is None:
            continue
        near = min(max(px, label.box.left), label.box.right), (label.box.top + label.box.bottom) / 2
        if math.dist(near, (px, py)) > 18:
            leaders.append(element("line", class_="leader", x1=px, y1=py, x2=near[0], y2=near[1]))
        classes = f"label {point.kind}"
        texts.append(element("text", name, class_=classes, x=label.start, y=near[1] + 4, text_anchor=label.anchor))
    figure = element("figure", _picture(view, *parts, *leaders, *marks, *texts), class_="scatter")
    return figure, labels.count(None)


SHARES = ("retained: mean retain score, right is better", "forgotten: 1 \u2212 mean forget score, up is better")


def traces(drawn: Sequence[Trace], floor: float | None, axes: tuple[str, str] = SHARES) -> Markup:
    """Forgotten (up) against retained (right), a line per merge from the base on, its chosen trial marked and named.

    The dashed upright line, if there is one, is the least retained score that was accepted. axes: what they say.
    """
    view = (460.0, 380.0)
    frame = svg.Box(52, 36, view[0] - 16, view[1] - 46)
    lowest = [] if floor is None else [floor]
    x = _share_scale([*lowest, *(right for trace in drawn for right, _ in trace.points)], frame.left, frame.right)
    y = _share_scale([up for trace in drawn for _, up in trace.points], frame.bottom, frame.top)
    at = [[(x.pixel(right), y.pixel(up)) for right, up in trace.points] for trace in drawn]
    ends = [pixels[trace.chosen] for trace, pixels in zip(drawn, at, strict=True)]
    names = svg.shorten([trace.name for trace in drawn], 24)
    labels = svg.place_labels(ends, names, frame._replace(top=frame.top - 14), len(drawn))
    parts = [
        element("title", "Mean retained score against mean forgotten score along the scale, one line per merge"),
        svg.axes(frame, x, y, *axes, upright_grid=True),
    ]
    if floor is not None:
        parts.append(element("line", class_="ideal", x1=x.pixel(floor), x2=x.pixel(floor), y1=frame.top,
                             y2=frame.bottom, stroke_dasharray="4 3"))  # fmt: skip
    marks, texts = [], []
    for index, (trace, pixels, end, name, label) in enumerate(zip(drawn, at, ends, names, labels, strict=True)):
        colour, dash = _colour(index)
        title = element("title", f"{trace.name}: retained {trace.points[trace.chosen][0]:.3f}, "
                                 f"forgotten {trace.points[trace.chosen][1]:.3f}")  # fmt: skip
        parts.append(element("path", class_=f"line s{colour}", d=_path(pixels), stroke_dasharray=dash))
        marks.append(element("circle", title, cx=end[0], cy=end[1], r=4.5, class_=f"mark f{colour}"))
        if label is not None:
            middle = (label.box.top + label.box.bottom) / 2
            texts.append(element("text", name, class_=f"label f{colour}", x=label.start, y=middle + 4,
                                 text_anchor=label.anchor))  # fmt: skip
    return element("figure", _picture(view, *parts, *marks, *texts), class_="scatter")


def marker(kind: str, x: float, y: float, size: float = 5.0) -> str:
    """Path of a kind's mark: base a square, gold a diamond, candidate a circle, merge a triangle."""
    s = size
    if kind == "base":
        return f"M{x - s:.1f} {y - s:.1f}h{2 * s:.1f}v{2 * s:.1f}h{-2 * s:.1f}z"
    if kind == "gold":
        r = 1.3 * s
        return f"M{x:.1f} {y - r:.1f}l{r:.1f} {r:.1f}l{-r:.1f} {r:.1f}l{-r:.1f} {-r:.1f}z"
    if kind == "merge":
        r = 1.25 * s
        return f"M{x:.1f} {y - r:.1f}l{r:.1f} {1.8 * r:.1f}h{-2 * r:.1f}z"
    return f"M{x - s:.1f} {y:.1f}a{s:.1f} {s:.1f} 0 1 0 {2 * s:.1f} 0a{s:.1f} {s:.1f} 0 1 0 {-2 * s:.1f} 0z"


def _picture(view: tuple[float, float], *parts: Markup) -> Markup:
    return element("svg", *parts, viewBox=f"0 0 {view[0]:g} {view[1]:g}", role="img")


def _finite(curve: Curve) -> list[tuple[int, float]]:
    return [(at, value) for at, value in zip(curve.updates, curve.values, strict=True) if value is not None]


def _whole_ticks(low: int, high: int) -> list[float]:
    """Ticks at whole updates inside the range: half an update does not exist."""
    ticks = [tick for tick in svg.nice_ticks(low, high, 5) if low <= tick <= high and tick == round(tick)]
    return ticks or [float(low)]


def _share_scale(values: Sequence[float], start: float, end: float) -> svg.Scale:
    """From a round number below the least value to 1, with a little air at both ends for the marks."""
    low = math.floor(max(0.0, min(values) - 0.02) * 10) / 10
    low = min(low, 0.8)
    air = 0.04 * (1 - low)
    ticks = [tick for tick in svg.nice_ticks(low, 1.0, 5) if low - 1e-9 <= tick <= 1 + 1e-9]
    return svg.linear(low - air, 1 + air, start, end, ticks)


def _colour(index: int) -> tuple[int, str | None]:
    """A line's colour and dashes."""
    return index % COLOURS, DASHES[index // COLOURS % len(DASHES)]


def _line(index: int, curve: Curve, each: list[tuple[float, float]], points: list[tuple[float, float]]) -> Markup:
    """A candidate's line through `points`, with a pale one through `each` update behind it where they differ."""
    colour, dash = _colour(index)
    lines = []
    if each is not points:
        lines.append(element("path", class_=f"raw s{colour}", d=_path(_thin(each))))
    lines.append(element("path", class_=f"line s{colour}", d=_path(_thin(points)), stroke_dasharray=dash))
    if len(points) == 1:
        lines.append(element("circle", cx=points[0][0], cy=points[0][1], r=2.5, class_=f"f{colour}"))
    if curve.diverged:
        end_x, end_y = points[-1]
        cross = f"M{end_x - 4:.1f} {end_y - 4:.1f}l8 8m-8 0l8 -8"
        lines.append(element("path", class_=f"line s{colour}", d=cross))
    return element("g", element("title", curve.name + (" (diverged)" if curve.diverged else "")), *lines)


def _end_labels(ends: list[tuple[int, Curve, tuple[float, float]]], frame: svg.Box, letters: int) -> Markup:
    """Names in the right margin at the height of each line's end, spread where they would overlap."""
    if len(ends) > LABELLED:  # name some, evenly over the heights
        by_height = sorted(ends, key=lambda end: end[2][1])
        ends = [by_height[round(rank * (len(ends) - 1) / (LABELLED - 1))] for rank in range(LABELLED)]
    names = svg.shorten([("✕ " if curve.diverged else "") + curve.name for _, curve, _ in ends], letters)
    heights = svg.spread([y for _, _, (_, y) in ends], frame.top, frame.bottom)
    parts = []
    for (index, curve, (x, y)), name, height in zip(ends, names, heights, strict=True):
        colour = index % COLOURS
        leader = f"M{x + 2:.1f} {y:.1f}L{frame.right + 2:.1f} {y:.1f}L{frame.right + 9:.1f} {height:.1f}"
        parts.append(element("path", class_=f"leader s{colour}", d=leader))
        title = element("title", curve.name)
        parts.append(element("text", title, name, class_=f"label f{colour}", x=frame.right + 12, y=height + 4))
    return group(*parts)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _thin(points: list[tuple[float, float]], buckets: int = 150) -> list[tuple[float, float]]:
    """The highest and the lowest point of each bucket: spikes stay, the page stays small."""
    if len(points) <= 2 * buckets:
        return points
    kept = []
    for bucket in range(buckets):
        own = points[bucket * len(points) // buckets : (bucket + 1) * len(points) // buckets]
        kept += sorted({min(own, key=lambda point: point[1]), max(own, key=lambda point: point[1])})
    return kept if kept[-1] == points[-1] else [*kept, points[-1]]


def _moving_mean(points: list[tuple[float, float]], reach: int, exact_end: bool) -> list[tuple[float, float]]:
    """Mean over `reach` neighbours on each side, in pixels, so that it follows what is seen on any scale.

    With `exact_end` the windows shrink to the last point, so that a line that shoots up ends where the values do.
    """
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smoothed = []
    for index, (x, _) in enumerate(points):
        ahead = len(points) - 1 - index
        behind = min(reach, index, ahead) if exact_end else min(reach, index)
        ahead = min(reach, ahead)
        smoothed.append((x, (sums[index + ahead + 1] - sums[index - behind]) / (ahead + behind + 1)))
    return smoothed
