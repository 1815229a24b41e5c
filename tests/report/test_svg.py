"""Scales, ticks and labels: the arithmetic under the plots."""

import itertools
import math
import random

import pytest

from unlearnjax.report import charts, svg


@pytest.mark.parametrize("low, high", [(0, 1), (0.013, 0.97), (-3, 240), (1e-9, 2e-9), (5, 5), (0, 0), (-7e6, -6.99e6)])
def test_nice_ticks_cover_the_range_evenly(low, high):
    ticks = svg.nice_ticks(low, high)
    assert ticks[0] <= low + 1e-12 * abs(low) and ticks[-1] >= high - 1e-12 * abs(high) and 3 <= len(ticks) <= 9
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) - min(steps) < 1e-6 * steps[0]
    assert round(steps[0] / 10 ** math.floor(math.log10(steps[0] * 1.0001)), 6) in (1, 2, 5)
    labels = svg.tick_labels(ticks)
    assert len(set(labels)) == len(ticks) or max(abs(low), abs(high)) > 1e5


def test_tick_labels():
    assert svg.tick_labels([0.0, 0.5, 1.0]) == ["0.0", "0.5", "1.0"]
    assert svg.tick_labels([-20.0, 0.0, 20.0]) == ["\u221220", "0", "20"]
    assert svg.tick_labels([0.0, 0.05]) == ["0.00", "0.05"]


def test_value_scale_picks_its_kind_and_keeps_order():
    for values, name in (
        ([0.1, 0.5, 0.9], "linear"),
        ([1e-3, 1.0, 1e4], "log"),
        ([0.2, 0.3, -0.1, -5e6], "signed log"),
        ([0.0, 0.0], "linear"),
        ([0.0, 1.0, 2.0, 900.0], "linear"),
    ):
        scale = svg.value_scale(values, 200.0, 10.0)
        assert scale.name == name
        pixels = [scale.pixel(value) for value in sorted(values)]
        assert pixels == sorted(pixels, reverse=True) and pixels[-1] >= 10 - 1e-6 and pixels[0] <= 200 + 1e-6
        assert len(scale.ticks) >= 2 and all(9 <= scale.pixel(value) <= 201 for value, _ in scale.ticks)


def test_spread_keeps_a_gap_and_moves_no_more_than_needed():
    draw = random.Random(0)
    for _ in range(200):
        wanted = [draw.choice((draw.uniform(0, 200), 100.0)) for _ in range(draw.randrange(1, 15))]
        placed = svg.spread(wanted, 0.0, 200.0, 14.0)
        ordered = sorted(placed)
        assert all(b - a >= 14.0 - 1e-9 for a, b in itertools.pairwise(ordered))
        assert ordered[0] >= -1e-9 and ordered[-1] <= 200 + 1e-9
        # Order is kept, and labels that have room do not move.
        assert sorted(range(len(wanted)), key=lambda i: (wanted[i], placed[i])) == sorted(
            range(len(wanted)), key=lambda i: placed[i]
        )
    assert svg.spread([10.0, 100.0], 0.0, 200.0) == [10.0, 100.0]
    assert svg.spread([100.0, 100.0], 0.0, 200.0, 14.0) == [93.0, 107.0]


@pytest.mark.parametrize("count", [2, 9, 16, 60])
def test_labels_lie_on_nothing(count):
    draw = random.Random(count)
    frame = svg.Box(50, 20, 440, 340)
    for _ in range(20):
        points = [(draw.gauss(250, 60), draw.gauss(180, 50)) for _ in range(count)]
        points = [(min(max(x, 60), 430), min(max(y, 30), 330)) for x, y in points]
        labels = svg.place_labels(points, ["candidate " + "x" * draw.randrange(5)] * count, frame, 3)
        boxes = [label.box for label in labels if label is not None]
        # Few points are all named; in a crowd the important ones are.
        assert None not in (labels if count <= 9 else labels[:3]) and (count > 16 or len(boxes) >= 0.7 * count)
        assert not any(a.meets(b) for a, b in itertools.combinations(boxes, 2))
        assert not any(svg.Box(x - 5, y - 5, x + 5, y + 5).meets(box) for x, y in points for box in boxes)
        assert all(box.inside(frame) for box in boxes)


def test_shorten_keeps_names_apart():
    assert svg.shorten(["short", "abcdefghij"], 7) == ["short", "abc…hij"]
    same_ends = [f"lr-{number}-and-a-long-tail" for number in range(3)]
    assert len(set(svg.shorten(same_ends, 9))) == 3 and all(len(name) <= 9 for name in svg.shorten(same_ends, 9))
    same_front = [f"a-long-prefix-{number}" for number in range(3)]
    assert len(set(svg.shorten(same_front, 9))) == 3


def test_thinning_keeps_spikes_and_the_ends():
    points = [(float(x), 0.0) for x in range(5000)]
    points[1234] = (1234.0, 50.0)
    points[3210] = (3210.0, -50.0)
    thin = charts._thin(points)
    assert len(thin) <= 301 and points[1234] in thin and points[3210] in thin and thin[-1] == points[-1]
    assert thin == sorted(thin)


def test_moving_mean_by_hand():
    points = [(0.0, 0.0), (1.0, 3.0), (2.0, 0.0), (3.0, 9.0)]
    assert charts._moving_mean(points, 1, False) == [(0.0, 1.5), (1.0, 1.0), (2.0, 4.0), (3.0, 4.5)]
    assert charts._moving_mean(points, 1, True)[-1] == (3.0, 9.0)
