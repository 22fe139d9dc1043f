"""A group's curves as SVG: time and memory along it, both axes logarithmic, a line per column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from math import ceil, floor, log10

from ..words import amount, seconds
from .columns import COLUMNS
from .results import Measured
from .rows import GROUPS

__all__ = ["svg_of"]

WIDTH, HEIGHT = 420, 300  # of one panel
LEFT, RIGHT = 70, 10  # around it
TOP, BOTTOM = 46, 40
LEGEND = 18  # pixels per line
# Told apart also by who sees few colours; ours are the strong ones
COLOURS = {
    "reference": "#0072b2",
    "flash": "#56b4e9",
    "numba_cpu": "#d55e00",
    "torch": "#555555",
    "hf-eager": "#bbbbbb",
    "hf-grouped_mm": "#555555",
    "hf-batched_mm": "#999999",
    "torch-compile": "#009e73",
    "hf-compile": "#009e73",
    "jax": "#cc79a7",
}
Points = dict[str, list[tuple[float, float]]]  # by column


def svg_of(group: str, rows: Sequence[Measured], subtitle: str) -> str:
    """The picture: two panels and a legend."""
    times: Points = {}
    peaks: Points = {}
    for row in rows:
        for name, cell in row.columns.items():
            times.setdefault(name, []).append((row.x, cell.times.median))
            if cell.peak:
                peaks.setdefault(name, []).append((row.x, cell.peak))
    panels = [panel("time", times, GROUPS[group].along, seconds, 0)]
    panels.append(panel("memory", peaks, GROUPS[group].along, amount, LEFT + WIDTH + RIGHT))
    wide, high = 2 * (LEFT + WIDTH + RIGHT), TOP + HEIGHT + BOTTOM
    names = [name for name in COLUMNS if name in times]
    legend = "".join(_legend(i, name, high) for i, name in enumerate(names))
    high += LEGEND * ceil(len(names) / 4) + 6
    title = f"{GROUPS[group].title}: forward and backward"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" '
        f'viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{wide}" height="{high}" fill="white"/>\n'
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>\n'
        f'<text x="{LEFT}" y="34" fill="#666">{escape(subtitle)}</text>\n'
        f"{''.join(panels)}{legend}</svg>\n"
    )


def panel(what: str, points: Points, along: str, unit: Callable[[float], str], left: int) -> str:
    every = [point for line in points.values() for point in line]
    if not every:
        return ""
    xs = sorted({x for x, _ in every})
    low, high = (f(log10(g(y for _, y in every))) for f, g in ((floor, min), (ceil, max)))
    high = max(high, low + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = log10(x / xs[0]) / (log10(xs[-1] / xs[0]) or 1)
        up = (log10(y) - low) / (high - low)
        return left + LEFT + WIDTH * across, TOP + HEIGHT * (1 - up)

    parts = []
    for power in range(low, high + 1):
        _, y = place(xs[0], 10.0**power)
        parts.append(_line(left + LEFT, y, left + LEFT + WIDTH, y))
        parts.append(_text(left + LEFT - 6, y + 4, _round(unit(10.0**power)), "end"))
    for x in xs:
        across, _ = place(x, 10.0**low)
        parts.append(_line(across, TOP, across, TOP + HEIGHT))
        parts.append(_text(across, TOP + HEIGHT + 16, f"{x:,}", "middle"))
    parts.append(_text(left + LEFT + WIDTH / 2, TOP + HEIGHT + 34, f"{what} by {along}", "middle"))
    for name, line in points.items():
        spots = [place(*point) for point in line]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2"'
            f"{_dashes(name)}/>\n"
        )
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[name]}"/>\n' for x, y in spots
        ]
    return "".join(parts)


def _dashes(name: str) -> str:
    """Other people's lines are dashed."""
    return "" if COLUMNS[name].file is None else ' stroke-dasharray="6 3"'


def _legend(place: int, name: str, top: int) -> str:
    x, y = LEFT + 230 * (place % 4), top + LEGEND * (place // 4) + 8
    return (
        f'<line x1="{x}" y1="{y - 4}" x2="{x + 26}" y2="{y - 4}" stroke="{COLOURS[name]}" '
        f'stroke-width="2"{_dashes(name)}/>\n' + _text(x + 32, y, name, "start")
    )


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#e4e4e4"/>\n'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>\n'


def _round(text: str) -> str:
    """A power of ten without its zeros behind the point."""
    number, unit = text.split()
    return f"{float(number):g} {unit}"
