"""Small charts as SVG text that takes its colours from the page around it: classes c0 to c7, and the page's text colour."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
COLOURS = 8
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 260, 58, 40, 10, 12


def line_chart(series: Iterable[tuple[int, Points]], x_label: str, y_label: str, marks: bool = False) -> str:
    """Draw lines over common axes.

    Args:
        series: for each line the number of its colour and its points; at least one point in all. Points that are not finite
            are left out.
        marks: draw a dot at each point.
    """
    lines = [(colour, [p for p in points if all(map(math.isfinite, p))]) for colour, points in series]
    xs, ys = ([p[axis] for _, points in lines for p in points] for axis in (0, 1))
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x0, y0 = min(*xs, x_ticks[0]), min(*ys, y_ticks[0])
    x_scale = (_WIDTH - _LEFT - _RIGHT) / ((max(*xs, x_ticks[-1]) - x0) or 1)
    y_scale = (_HEIGHT - _TOP - _BOTTOM) / ((max(*ys, y_ticks[-1]) - y0) or 1)

    def place(x: float, y: float) -> tuple[str, str]:
        return f"{_LEFT + (x - x0) * x_scale:.1f}", f"{_HEIGHT - _BOTTOM - (y - y0) * y_scale:.1f}"

    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"><title>{escape(y_label)} over {escape(x_label)}</title>'
    ]
    for tick in y_ticks:
        _, y = place(x0, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y}" dy="0.35em" text-anchor="end">{tick:,.10g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y0)
        parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{tick:,.10g}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x_label)}</text>')
    for colour, points in lines:
        placed = [place(*point) for point in points]
        kind = f"c{colour % COLOURS}"
        parts.append(f'<polyline class="{kind}" points="{" ".join(map(",".join, placed))}"/>')
        if marks:
            parts += [f'<circle class="{kind}" cx="{x}" cy="{y}" r="3"/>' for x, y in placed]
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Return 1 to `most` round numbers at equal distances in [low, high]; if there is none, `low` in four digits."""
    if high <= low:
        return [float(f"{low:.4g}")]
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (size * factor) <= most - 1)
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [float(f"{number * step:.10g}") for number in numbers] or [float(f"{low:.4g}")]


def thinned(points: Points, most: int = 200) -> Points:
    """Replace neighbouring points by their mean, so that at most `most` are left."""
    size = -(-len(points) // most)
    groups = [points[start : start + size] for start in range(0, len(points), size or 1)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]
