"""Differences with their intervals, one below the other, about a line where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from dynamo_serve.bench.compare import Difference
from dynamo_serve.bench.plot import ticks
from dynamo_serve.bench.spread import Estimate

WIDTH, LEFT, RIGHT, ROW, BOTTOM = 900, 190, 20, 22, 48
COLOURS = {"better": 2, "worse": 1}
WIDEST = 1.0  # more than all of A's mean is drawn at the edge


def figure(differences: Sequence[Difference], matters: float) -> str:
    """As shares of A's mean; what has none of these, or no interval, is left out."""
    rows = [(one, one.relative) for one in differences if one.relative]
    if not rows:
        return ""
    edge = ticks(min(WIDEST, max(_reach(effect) for _, effect in rows) or matters))[-1]
    height = ROW * len(rows) + BOTTOM
    drawn = "".join(_row(n, one, effect, edge) for n, (one, effect) in enumerate(rows))
    left, right = _x(-min(matters, edge), edge), _x(min(matters, edge), edge)
    band = (
        f'<rect class="band" x="{left:.1f}" y="0" width="{right - left:.1f}" '
        f'height="{height - BOTTOM}"/>'
    )
    return (
        '<figure class="chart"><figcaption>B − A, with 95 % intervals</figcaption>'
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="Differences of B from A in percent">{band}{_axis(edge, height)}{drawn}</svg>'
        '<p class="note">Shaded: differences that do not matter. Intervals are cut off at the '
        "edges.</p></figure>"
    )


def _reach(effect: Estimate) -> float:
    edges = (effect.value, effect.low, effect.high)
    return max(abs(edge) for edge in edges if edge is not None)


def _x(share: float, edge: float) -> float:
    inside = max(-edge, min(edge, share))
    return LEFT + (inside / edge + 1) / 2 * (WIDTH - LEFT - RIGHT)


def _axis(edge: float, height: int) -> str:
    bottom = height - BOTTOM
    parts = []
    for share in (-edge, -edge / 2, 0.0, edge / 2, edge):
        x = f"{_x(share, edge):.1f}"
        style = "grid" if share else "axis"
        parts.append(f'<line class="{style}" x1="{x}" y1="0" x2="{x}" y2="{bottom + 5}"/>')
        sign = "+" if share > 0 else ""
        parts.append(
            f'<text class="tick" x="{x}" y="{bottom + 20}" text-anchor="middle">'
            f"{sign}{share * 100:.4g} %</text>"
        )
    middle = f"{_x(0.0, edge):.1f}"
    label = "difference, as a share of A's mean"
    parts.append(
        f'<text class="label" x="{middle}" y="{height - 8}" text-anchor="middle">{label}</text>'
    )
    return "".join(parts)


def _row(number: int, one: Difference, effect: Estimate, edge: float) -> str:
    y = ROW * (number + 0.5)
    colour = COLOURS.get(one.verdict, 0)
    bar = ""
    if effect.low is not None and effect.high is not None:
        low, high = _x(effect.low, edge), _x(effect.high, edge)
        bar = f'<line class="s{colour}" x1="{low:.1f}" y1="{y}" x2="{high:.1f}" y2="{y}"/>'
    return (
        f'<text x="{LEFT - 10}" y="{y}" dy="0.35em" text-anchor="end">{escape(one.name)}</text>'
        f'{bar}<circle class="f{colour}" cx="{_x(effect.value, edge):.1f}" cy="{y}" r="4"/>'
    )
