"""Lines and bars over time as one SVG, written by hand: a benchmark needs no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

WIDTH, LEFT, RIGHT, TOP, HEIGHT, GAP = 1000, 150, 20, 30, 130, 40
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
SHADE, GRID, BAR = "#f3f3f3", "#dddddd", ("#ffd37f", "#f08a24")
ROW = 18

Points = Sequence[tuple[float, float]]


class Lines(NamedTuple):
    """One panel: lines by name; `top` is the end of the scale (None: the largest value)."""

    title: str
    lines: Mapping[str, Points]
    top: float | None = None


class Bars(NamedTuple):
    """One panel: for each row, (begin, end, level) of every bar."""

    title: str
    rows: Mapping[str, Sequence[tuple[float, float, int]]]


def svg(
    title: str, panels: Sequence[Lines | Bars], seconds: float, shade: tuple[float, float]
) -> str:
    """A picture of all panels, one above the other; `shade` marks a stretch of time."""
    parts: list[str] = [_text(LEFT, 18, title, size=14)]
    y = float(TOP)
    for panel in panels:
        height = len(panel.rows) * ROW if isinstance(panel, Bars) else HEIGHT
        parts += [_text(LEFT, y + 12, panel.title), *_frame(y + 20, height, seconds, shade)]
        if isinstance(panel, Bars):
            parts += _bars(panel, y + 20, seconds)
        else:
            parts += _lines(panel, y + 20, seconds)
        y += height + 20 + GAP
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y:.0f}" '
    style = 'font-family="sans-serif" font-size="11">'
    ground = f'<rect width="{WIDTH}" height="{y:.0f}" fill="white"/>'
    return head + style + ground + "".join(parts) + "</svg>\n"


def _x(at: float, seconds: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * min(max(at, 0.0), seconds) / seconds


def _text(x: float, y: float, text: str, *, end: bool = False, size: int = 11) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{anchor}>{escape(text)}</text>'


def _frame(y: float, height: float, seconds: float, shade: tuple[float, float]) -> list[str]:
    begin, end = _x(shade[0], seconds), _x(shade[1], seconds)
    parts = [_rect(begin, y, end - begin, height, SHADE)]
    step = next(s for s in (5, 10, 30, 60, 120, 300, 600, 1800, 3600) if seconds / s <= 12)
    for at in range(0, int(seconds) + 1, step):
        x = _x(at, seconds)
        parts.append(f'<path d="M{x:.1f} {y:.1f}v{height:.1f}" stroke="{GRID}"/>')
        parts.append(_text(x - 6, y + height + 12, f"{at} s"))
    return parts


def _rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'
    )


def _lines(panel: Lines, y: float, seconds: float) -> list[str]:
    top = panel.top or max((v for points in panel.lines.values() for _, v in points), default=1.0)
    top = top or 1.0
    parts = [
        _text(LEFT - 8, y + 8, f"{top:g}", end=True),
        _text(LEFT - 8, y + HEIGHT, "0", end=True),
    ]
    for i, (name, points) in enumerate(panel.lines.items()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(
            f"{_x(at, seconds):.1f},{y + HEIGHT * (1 - min(value, top) / top):.1f}"
            for at, value in points
        )
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        parts.append(f'<g fill="{colour}">{_text(10, y + 30 + 16 * i, name)}</g>')
    return parts


def _bars(panel: Bars, y: float, seconds: float) -> list[str]:
    parts = []
    for i, (name, bars) in enumerate(panel.rows.items()):
        at = y + ROW * i
        parts.append(_text(LEFT - 8, at + 13, name, end=True))
        for begin, end, level in bars:
            x = _x(begin, seconds)
            fill = BAR[min(level, len(BAR)) - 1]
            parts.append(_rect(x, at + 2, max(1.0, _x(end, seconds) - x), ROW - 4, fill))
    return parts
