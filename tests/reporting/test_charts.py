"""Charts: round ticks, every point inside the frame, and escaped text."""

import re
from xml.etree import ElementTree

import pytest

from neko_lean.reporting.charts import MAX_MARKED, SLOTS, Dot, Series, axis, bars, dots, key, legend, lines, slot

HOSTILE = "</text><script>alert(1)</script>&\"'"


@pytest.mark.parametrize(
    "values", [[0, 1], [-24.3, -0.1], [3, 3], [0, 0], [], [-2, -2], [1e-9, 2e-9], [-1e15, 1e15], [-1e-9, 0.4]]
)
def test_ticks_are_few_and_inside_the_axis(values):
    for room in (0.0, 0.04):
        found = axis(values, room=room)
        assert found.low < found.high
        assert 1 <= len(found.ticks) <= 8
        assert all(found.low - 1e-9 <= at <= found.high + 1e-9 * abs(found.high) for at, _ in found.ticks)


def test_ticks_are_round():
    assert [label for _, label in axis([0, 500]).ticks] == ["0", "200", "400"]
    assert [label for _, label in axis([-24.3, -0.1]).ticks] == ["−20", "−10"]  # noqa: RUF001
    assert axis([-1e-9, 0.4], room=0.04).low == 0.0
    assert axis([5, 6], zero=True).low == 0.0


def test_styles_repeat_without_that_of_the_model_before():
    assert [slot(n) for n in range(SLOTS)] == [1, 2, 3, 4, 5, 6, 1]
    assert len({key(n) for n in range(SLOTS)}) == SLOTS


def test_charts_are_well_formed_labeled_and_escaped():
    dot = Dot(1, HOSTILE, 0.3, (0.2, 0.4))
    drawn = [
        dots([(HOSTILE, [dot, Dot(2, "b", 1.7)])], HOSTILE, HOSTILE, "left"),
        lines([Series(1, HOSTILE, [(0, 1), (5, 2)])], HOSTILE, HOSTILE, HOSTILE),
        lines([Series(1, "one point", [(3, 3)])], "a", "x", "y", square=True),
        bars([(HOSTILE, [dot])], HOSTILE, HOSTILE, HOSTILE),
        bars([], "nothing", "", ""),
    ]
    for svg in drawn:
        root = ElementTree.fromstring(str(svg))
        assert root.get("role") == "img" and root.get("aria-label")
        assert "<script" not in svg
        width, height = map(float, root.get("viewBox").split()[2:])
        for name, limit in (
            ("x1", width),
            ("x2", width),
            ("y1", height),
            ("y2", height),
            ("cx", width),
            ("cy", height),
        ):
            assert all(-1 <= float(at) <= limit + 1 for at in re.findall(rf'\b{name}="([^"]+)"', svg)), name
    assert "<script" not in legend([(0, HOSTILE)])


def test_short_curves_have_markers_and_long_ones_do_not():
    short = Series(1, "one", [(3, 3)])
    long = Series(2, "many", [(float(n), 1.0) for n in range(MAX_MARKED + 1)])
    svg = lines([short, long], "loss", "step", "nats per token")
    assert svg.count('class="dot c1"') == 1 and 'class="dot c2"' not in svg
    assert ">step<" in svg and ">nats per token<" in svg
