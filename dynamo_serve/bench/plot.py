"""Charts as SVG in a figure of HTML: axes that start at zero, lines told apart by colour and dash.

Colours come from the page's style sheet, so that light and dark fit. Readouts under the pointer
and lines that can be switched off are `report.js`'s; without it everything can still be read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 74, 18, 14, 50
NUM_COLOURS = 6
SMALLEST = 1e-9  # of what is drawn as more than nothing
DASHES = ("", "7 3", "2 3", "9 3 2 3", "1 4", "12 4")
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Line:
    """`bars` are intervals of y, point by point, where they are known."""

    name: str
    points: Points
    bars: Sequence[tuple[float, float] | None] = ()


@dataclass(frozen=True, slots=True)
class Mark:
    """A point that is named in the chart, on that side of it where its curve is not."""

    x: float
    y: float
    text: str
    is_above: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """`kind`: "line", "dots" (points joined by a line), or "areas" (stacked on each other, at the
    same xs). A chart without points says so."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    kind: str = "line"
    marks: Sequence[Mark] = ()
    note: str = ""
    x_high: float | None = None
    y_high: float | None = None


def ticks(high: float, most: int = 6) -> list[float]:
    """Round numbers from 0 to at least `high`, evenly apart."""
    if not high > SMALLEST:
        return [0.0, 1.0]
    raw = high / (most - 1)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * (1 - 1e-9))
    return [step * n for n in range(math.ceil(high / step * (1 - 1e-9)) + 1)]


def figure(chart: Chart) -> str:
    """The chart with its title, legend and readout."""
    lines = [line for line in chart.lines if line.points]
    title = f"<figcaption>{escape(chart.title)}</figcaption>"
    if not lines:
        return f'<figure class="chart">{title}<p class="none">No data in this run.</p></figure>'
    note = f'<p class="note">{escape(chart.note)}</p>' if chart.note else ""
    scale = _Scale(chart, lines)
    data = {
        "x": [LEFT, scale.x_high, WIDTH - LEFT - RIGHT],
        "y": [TOP, scale.y_high, HEIGHT - TOP - BOTTOM],
        "xLabel": chart.x_label,
        "kind": chart.kind,
        "lines": [{"name": line.name, "points": _rounded(line.points)} for line in lines],
    }
    told = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return (
        f'<figure class="chart">{title}{_legend(chart, lines)}{_svg(chart, lines, scale)}'
        f'<script type="application/json">{told}</script>{note}</figure>'
    )


class _Scale:
    """From values to places in the drawing."""

    def __init__(self, chart: Chart, lines: Sequence[Line]) -> None:
        xs = [x for line in lines for x, _ in line.points]
        # Loads are points, which need air; time and distributions end where they end.
        edge = chart.x_high or (max(xs) if chart.kind != "dots" else 0.0)
        self.x_ticks = ticks(edge or max(xs))
        self.y_ticks = ticks(chart.y_high or _highest(chart, lines))
        self.x_high, self.y_high = self.x_ticks[-1], self.y_ticks[-1]
        if edge > SMALLEST:
            self.x_high = edge
            self.x_ticks = [x for x in self.x_ticks if x <= self.x_high]

    def x(self, value: float) -> float:
        return LEFT + value / self.x_high * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return TOP + (1 - value / self.y_high) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def _highest(chart: Chart, lines: Sequence[Line]) -> float:
    if chart.kind == "areas":
        return max(y for _, y in stacked(lines)[-1])
    ends = [bar[1] for line in lines for bar in line.bars if bar]
    return max([y for line in lines for _, y in line.points] + ends)


def stacked(lines: Sequence[Line]) -> list[list[tuple[float, float]]]:
    """The upper edges of areas, the lowest first."""
    edges: list[list[tuple[float, float]]] = []
    below = [0.0] * len(lines[0].points)
    for line in lines:
        below = [low + y for low, (_, y) in zip(below, line.points, strict=True)]
        edges.append([(x, y) for (x, _), y in zip(line.points, below, strict=True)])
    return edges


def _legend(chart: Chart, lines: Sequence[Line]) -> str:
    """Nothing for one line: the title says what it is."""
    if len(lines) < 2:
        return ""
    keys = [
        f'<button type="button" data-line="{n}" aria-pressed="true">'
        f'<svg width="26" height="12" aria-hidden="true">{_key(chart, n)}</svg>'
        f"{escape(line.name)}</button>"
        for n, line in enumerate(lines)
    ]
    return f'<div class="legend">{"".join(keys)}</div>'


def _key(chart: Chart, n: int) -> str:
    colour = n % NUM_COLOURS
    if chart.kind == "areas":
        return f'<rect class="a{colour}" x="6" width="14" height="12"/>'
    dash = DASHES[n % len(DASHES)]
    return f'<line class="s{colour}" x1="0" y1="6" x2="26" y2="6" stroke-dasharray="{dash}"/>'


def _svg(chart: Chart, lines: Sequence[Line], scale: _Scale) -> str:
    label = f"{chart.title}: {chart.y_label} over {chart.x_label}"
    draw = _areas if chart.kind == "areas" else _lines
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{_axes(chart, scale)}{draw(chart, lines, scale)}{_marks(chart, scale)}"
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
    )


def _axes(chart: Chart, scale: _Scale) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in scale.y_ticks:
        y = f"{scale.y(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y}" x2="{right}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y}" dy="0.35em" text-anchor="end">'
            f"{value:,.6g}</text>"
        )
    for value in scale.x_ticks:
        x = f"{scale.x(value):.1f}"
        parts.append(f'<line class="grid" x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 5}"/>')
        parts.append(
            f'<text class="tick" x="{x}" y="{bottom + 19}" text-anchor="middle">{value:,.6g}</text>'
        )
    middle = f"{(TOP + bottom) / 2:.0f}"
    parts.append(
        f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>'
        f'<text class="label" x="{(LEFT + right) / 2:.0f}" y="{HEIGHT - 7}" text-anchor="middle">'
        f"{escape(chart.x_label)}</text>"
        f'<text class="label" x="14" y="{middle}" text-anchor="middle" '
        f'transform="rotate(-90 14 {middle})">{escape(chart.y_label)}</text>'
    )
    return "".join(parts)


def _lines(chart: Chart, lines: Sequence[Line], scale: _Scale) -> str:
    parts = []
    for n, line in enumerate(lines):
        style = f's{n % NUM_COLOURS}" stroke-dasharray="{DASHES[n % len(DASHES)]}'
        drawn = f'<polyline class="{style}" points="{scale.path(line.points)}"/>'
        for bar, (x, _) in zip(line.bars, line.points, strict=False):
            if bar:
                at, low, high = scale.x(x), scale.y(max(0.0, bar[0])), scale.y(bar[1])
                drawn += (
                    f'<line class="s{n % NUM_COLOURS} bar" x1="{at:.1f}" y1="{low:.1f}" '
                    f'x2="{at:.1f}" y2="{high:.1f}"/>'
                )
        if chart.kind == "dots" or len(line.points) == 1:
            for x, y in line.points:
                centre = f'cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}"'
                drawn += f'<circle class="f{n % NUM_COLOURS}" {centre} r="4"/>'
        parts.append(f'<g data-line="{n}">{drawn}</g>')
    return "".join(parts)


def _areas(chart: Chart, lines: Sequence[Line], scale: _Scale) -> str:
    """From the top down, each over the whole of what is below it: no seams."""
    parts = []
    for n, edge in reversed(list(enumerate(stacked(lines)))):
        ends = [(edge[-1][0], 0.0), (edge[0][0], 0.0)]
        shape = f'<polygon class="a{n % NUM_COLOURS}" points="{scale.path([*edge, *ends])}"/>'
        rim = f'<polyline class="s{n % NUM_COLOURS} rim" points="{scale.path(edge)}"/>'
        parts.append(f'<g data-line="{n}">{shape}{rim}</g>')
    return "".join(parts)


def _marks(chart: Chart, scale: _Scale) -> str:
    parts = []
    for mark in chart.marks:
        if mark.x <= scale.x_high and mark.y <= scale.y_high:
            x, y = scale.x(mark.x), scale.y(mark.y)
            end, aside = ("end", -7) if x > WIDTH * 0.86 else ("start", 7)
            up = -7 if mark.is_above else 14
            parts.append(
                f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
                f'<text class="mark" x="{x + aside:.1f}" y="{y + up:.1f}" '
                f'text-anchor="{end}">{escape(mark.text)}</text>'
            )
    return "".join(parts)


def _rounded(points: Points) -> list[tuple[float, float]]:
    return [(float(f"{x:.5g}"), float(f"{y:.5g}")) for x, y in points]
