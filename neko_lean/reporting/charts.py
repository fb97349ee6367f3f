"""Charts as inline SVG: dots with intervals, lines and bars, and a shared legend.

A chart is about as wide as a phone, so that its text keeps its size on any screen. Series differ in color, shape and
dash pattern, any one of which is enough to tell them apart. Everything drawn is also in a table or in the chart's
label, for screen readers. All text goes through Markup.format, which escapes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from neko_lean.reporting.values import format_interval, format_number
from neko_lean.scoring import Interval

SLOTS = 7  # styles: slot 0 is the model before unlearning, the others are used in turn
DASHES = ("2 3", "", "7 3", "1.5 2.5", "9 3 2 3", "4 2", "12 4")
WIDTH, HEIGHT = 360, 226
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 26, 38
MAX_MARKED = 25  # points of a curve; a longer one is drawn without markers


@dataclass(frozen=True)
class Series:
    """The points of one model; `slot` is its style."""

    slot: int
    label: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Dot:
    """One value with its interval, if it has one."""

    slot: int
    label: str
    value: float
    ends: Interval | None = None


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`, with positions and labels of its ticks."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def scale(self, start: float, end: float) -> Callable[[float], float]:
        """A function that maps a value to its position between `start` and `end`."""
        width = (self.high - self.low) or 1.0
        return lambda value: start + (min(max(value, self.low), self.high) - self.low) / width * (end - start)


UNIT_AXIS = Axis(0.0, 1.0, [(0.0, "0"), (0.25, "0.25"), (0.5, "0.5"), (0.75, "0.75"), (1.0, "1")])


def slot(index: int) -> int:
    """The style of the model at `index`, not counting the model before, which has style 0."""
    return index % (SLOTS - 1) + 1


def axis(values: Sequence[float], wanted: int = 4, *, zero: bool = False, room: float = 0.0) -> Axis:
    """An axis with round ticks that covers some values.

    Args:
        values: the values to cover.
        wanted: approximate number of ticks.
        zero: whether to include 0.
        room: share of the length to leave free at either end.
    """
    low, high = min(values, default=0.0), max(values, default=1.0)
    if -0.02 * (high - low) < low < 0:  # a KL divergence of -1e-9 is 0 up to rounding
        low = 0.0
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
    free = room * (high - low)
    low, high = low - (free if low else 0.0), high + free
    rough = (high - low) / wanted
    unit = 10.0 ** math.floor(math.log10(rough))
    factor = next(factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    step = unit * factor
    decimals = max(0, -math.floor(math.log10(step) + 1e-9) + (factor == 2.5))
    inside = range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    labels = [f"{step * n:.{decimals}f}" if decimals < 6 else f"{step * n:.1e}" for n in inside]
    ticks = [(step * n, label.replace("-", "−")) for n, label in zip(inside, labels, strict=True)]  # noqa: RUF001
    return Axis(low, high, ticks)


def named(ticks: Sequence[str]) -> Axis:
    """An axis with a tick for each name, at 0, 1, 2, ..."""
    return Axis(-0.3, len(ticks) - 0.7, [(float(n), label) for n, label in enumerate(ticks)])


def join(parts: Sequence[Markup]) -> Markup:
    """Concatenate markup."""
    return Markup("").join(parts)


def _svg(width: float, height: float, label: str, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(
        width, height, label, join(parts)
    )


def _line(x1: float, y1: float, x2: float, y2: float, name: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(name, x1, y1, x2, y2)


def _text(x: float, y: float, words: str, anchor: str = "middle", name: str = "tick") -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(name, x, y, anchor, words)


def mark(which: int, x: float, y: float, size: float = 4.2) -> Markup:
    """The marker of a series at a position."""
    s = size
    polygons = {
        1: [],
        2: [(-s, -s), (s, -s), (s, s), (-s, s)],
        3: [(0, -1.35 * s), (1.35 * s, 0), (0, 1.35 * s), (-1.35 * s, 0)],
        4: [(0, -1.25 * s), (1.2 * s, s), (-1.2 * s, s)],
        5: [(0, 1.25 * s), (1.2 * s, -s), (-1.2 * s, -s)],
        6: [(-1.5 * s, -0.6 * s), (1.5 * s, -0.6 * s), (1.5 * s, 0.6 * s), (-1.5 * s, 0.6 * s)],
    }
    corners = polygons.get(which, [])
    if not corners:  # a ring for the model before, a disc for the first one after it
        kind = "ring" if which == 0 else "dot"
        return Markup('<circle class="{} c{}" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"/>').format(kind, which, x, y, 1.1 * s)
    around = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return Markup('<polygon class="dot c{}" points="{}"/>').format(which, around)


def key(which: int) -> Markup:
    """A short piece of a series' line with its marker."""
    piece = Markup(
        '<svg class="key" viewBox="0 0 34 14" aria-hidden="true">'
        '<line class="path c{0}" x1="1" y1="7" x2="33" y2="7" stroke-dasharray="{1}"/>{2}</svg>'
    )
    return piece.format(which, DASHES[which], mark(which, 17, 7))


def legend(models: Sequence[tuple[int, str]]) -> Markup:
    """The legend: the style of each model."""
    items = [Markup("<li>{}<bdi>{}</bdi></li>").format(key(which), label) for which, label in models]
    return Markup('<ul class="legend">{}</ul>').format(join(items))


def _dot_title(name: str, dot: Dot) -> str:
    """The tooltip of a value."""
    return f"{name}, {dot.label}: {format_number(dot.value)}"


def _dots_label(groups: Sequence[tuple[str, Sequence[Dot]]]) -> str:
    """The values of all groups as text, for a chart's label."""
    return "; ".join(
        f"{name}: " + ", ".join(f"{dot.label} {format_number(dot.value)}" for dot in group) for name, group in groups
    )


def dots(rows: Sequence[tuple[str, Sequence[Dot]]], about: str, x_label: str, better: str) -> Markup:
    """A chart of values from 0 to 1.

    Args:
        rows: name of each row and a dot for each model.
        about: what the chart shows, for its label.
        x_label: label of the x axis.
        better: the better direction, 'left' or 'right'.
    """
    width, gap, dot_height = 400, 12, 12
    left = max([72, *(8 * len(name) for name, _ in rows)])
    x = UNIT_AXIS.scale(left, width - 14)
    parts: list[Markup] = []
    y = 8.0
    for name, row in rows:
        height = gap + dot_height * max(1, len(row))
        parts += [_line(0, y, width - 4, y, "rule"), _text(0, y + height / 2 + 4, name, "start", "name")]
        for number, dot in enumerate(row):
            middle = y + gap / 2 + dot_height * (number + 0.5)
            words = _dot_title(name, dot) + (f", {format_interval(dot.ends)}" if dot.ends else "")
            bar = [_line(x(dot.ends[0]), middle, x(dot.ends[1]), middle, f"span c{dot.slot}")] if dot.ends else []
            shape = mark(dot.slot, x(dot.value), middle)
            parts.append(Markup("<g><title>{}</title>{}</g>").format(words, join([*bar, shape])))
        y += height
    grid = [_line(x(at), 8, x(at), y, "grid") for at, _ in UNIT_AXIS.ticks]
    ticks = [_text(x(at), y + 16, label) for at, label in UNIT_AXIS.ticks]
    to_left = better == "left"
    ends = [
        _text(0, y + 36, "← better" if to_left else x_label, "start"),
        _text(x(1) + 6, y + 36, x_label if to_left else "better →", "end"),
    ]
    drawn = _dots_label(rows)
    return _svg(width, y + 42, f"{about}. {drawn}.", [*grid, *parts, *ticks, *ends])


def lines(
    series: Sequence[Series],
    about: str,
    x_label: str,
    y_label: str,
    *,
    x: Axis | None = None,
    y: Axis | None = None,
    square: bool = False,
    guides: Sequence[tuple[float, float, float, float]] = (),
) -> Markup:
    """A chart with a line for each model.

    Args:
        series: the lines.
        about: what the chart shows, for its label.
        x_label: label of the x axis.
        y_label: label of the y axis.
        x: the x axis; by default one that covers the points.
        y: the y axis; by default one that covers the points.
        square: whether both axes have the same length.
        guides: reference lines, as (x, y, x, y).
    """
    height = WIDTH - LEFT - RIGHT + TOP + BOTTOM if square else HEIGHT
    points = [point for line in series for point in line.points]
    across = x or axis([px for px, _ in points], zero=True)
    up = y or axis([py for _, py in points], room=0.04)
    to_x, to_y = across.scale(LEFT, WIDTH - RIGHT), up.scale(height - BOTTOM, TOP)
    parts = [_line(LEFT, to_y(at), WIDTH - RIGHT, to_y(at), "grid") for at, _ in up.ticks]
    parts += [_text(LEFT - 6, to_y(at) + 4, label, "end") for at, label in up.ticks]
    parts += [_text(to_x(at), height - BOTTOM + 16, label) for at, label in across.ticks]
    parts += _axis_labels(height, x_label, y_label)
    parts += [_line(to_x(a), to_y(b), to_x(c), to_y(d), "guide") for a, b, c, d in guides]
    for line in series:
        path = "".join(f"{'L' if n else 'M'}{to_x(px):.1f} {to_y(py):.1f}" for n, (px, py) in enumerate(line.points))
        curve = Markup('<path class="path c{}" stroke-dasharray="{}" d="{}"/>')
        is_marked = len(line.points) <= MAX_MARKED  # a single point is visible only by its marker
        shapes = [mark(line.slot, to_x(px), to_y(py), 3.6) for px, py in line.points] if is_marked else []
        drawn = [curve.format(line.slot, DASHES[line.slot], path), *shapes]
        parts.append(Markup("<g><title>{}</title>{}</g>").format(line.label, join(drawn)))
    ends = [
        f"{line.label} from {format_number(line.points[0][1])} to {format_number(line.points[-1][1])}"
        for line in series
        if line.points
    ]
    return _svg(WIDTH, height, f"{about}: {'; '.join(ends)}.", parts)


def _axis_labels(height: float, x_label: str, y_label: str) -> list[Markup]:
    """The labels below the x axis and above the y axis."""
    return [_text((LEFT + WIDTH - RIGHT) / 2, height - 5, x_label), _text(0, 11, y_label, "start")]


def bars(groups: Sequence[tuple[str, Sequence[Dot]]], about: str, x_label: str, y_label: str) -> Markup:
    """A chart of bars in groups, with one bar for each model."""
    highest = max((dot.value for _, group in groups for dot in group), default=1.0)
    up = axis([0.0, highest], room=0.04)
    to_y = up.scale(HEIGHT - BOTTOM, TOP)
    group_width = (WIDTH - LEFT - RIGHT) / max(1, len(groups))
    parts = [_line(LEFT, to_y(at), WIDTH - RIGHT, to_y(at), "grid") for at, _ in up.ticks]
    parts += [_text(LEFT - 6, to_y(at) + 4, label, "end") for at, label in up.ticks]
    for number, (name, group) in enumerate(groups):
        start = LEFT + number * group_width + 0.12 * group_width
        width = 0.76 * group_width / max(1, len(group))
        parts.append(_text(LEFT + (number + 0.5) * group_width, HEIGHT - BOTTOM + 16, name))
        for place, dot in enumerate(group):
            top = to_y(dot.value)
            shape = Markup('<rect class="bar c{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                dot.slot, start + place * width + 0.5, top, max(1.0, width - 1), max(0.0, to_y(0) - top)
            )
            words = _dot_title(name, dot)
            parts.append(Markup("<g><title>{}</title>{}</g>").format(words, shape))
    parts += _axis_labels(HEIGHT, x_label, y_label)
    drawn = _dots_label(groups)
    return _svg(WIDTH, HEIGHT, f"{about}. {drawn}.", parts)
