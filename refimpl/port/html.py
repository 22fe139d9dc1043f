"""A verdict as one page that needs nothing else: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import math
from html import escape

import numpy as np

from ..errors import printable
from .compare import FACTOR, Heat
from .report import (
    COLUMNS,
    HEADER,
    MOST_ROWS,
    TensorResult,
    Verdict,
    beside,
    by_op,
    diagnosed,
    folded,
    follows,
    listed,
    place,
    row,
)

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --line: #d0d0d0; --soft: #666;
  --good: #0a7a33; --bad: #b3261e; --open: #8a5a00; --zero: #eef1f4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --paper: #161618; --line: #3a3a3e;
  --soft: #a0a0a6; --good: #57c97f; --bad: #ff8a80; --open: #f0b860; --zero: #25262a; } }
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif;
  max-width: 70rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
.PASS { color: var(--good); } .FAIL { color: var(--bad); } .INCONCLUSIVE { color: var(--open); }
.soft { color: var(--soft); } .scroll { overflow-x: auto; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; vertical-align: top; }
th, td:not(:first-child):not(:last-child) { white-space: nowrap; }
td:first-child { min-width: 14rem; }
code, pre, td:first-child { font-family: ui-monospace, monospace; font-size: .87em; }
pre { white-space: pre-wrap; margin: 0; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; } .zero { fill: var(--zero); }
.frame { fill: none; stroke: var(--line); }
"""
COLOURS = ("#2b6cb0", "#3f9d8f", "#c9b037", "#dd7a26", "#b3261e")  # from ok to the largest error
CELL = 16  # pixels
LEFT, TOP = 84, 26  # where the cells begin
LABELS = 24  # that an axis shows


def page(verdict: Verdict) -> str:
    """The page, in HTML; everything that comes from a file is escaped."""
    part = verdict.first_wrong
    body = [
        f'<h1 class="{verdict.verdict}">{verdict.verdict}</h1>',
        f"<p>{_text(verdict.reason)}</p>",
        f'<p class="soft"><code>{_text(str(verdict.theirs))}</code> against '
        f"<code>{_text(str(verdict.truth))}</code>, judged as {_text(verdict.dtype)}"
        f"{'' if verdict.only == '*' else f', only <code>{_text(verdict.only)}</code>'}</p>",
    ]
    if part is not None:
        body += ["<h2>First wrong part</h2>", f"<p>{_text(str(part))}</p>"]
        body += [f"<p>{_text(line)}</p>" for line in (place(part.first), beside(part)) if line]
        if verdict.heat is not None:
            body.append(_map(verdict.heat, part.first))
        body += _diagnosis(verdict)
    if wrong := verdict.those("wrong"):
        body += ["<h2>Wrong tensors</h2>", _table(wrong)]
        body += [
            f'<p class="soft">{_text(line)}</p>' for line in (follows(verdict), COLUMNS) if line
        ]
    for title, names in (
        ("Can't be judged", [(x.name, x.what) for x in verdict.those("unjudged")]),
        ("Can't be compared", [(x.name, x.what) for x in verdict.those("unreadable")]),
        ("Routes", [(x.name, x.what) for x in verdict.those("other")]),
        ("Not given", [(x.name, "") for x in verdict.those("missing")]),
        ("Only in the port", [(name, "") for name in verdict.extra]),
        ("Not excluded by these inputs and this type", by_op(verdict.not_excluded)),
        ("Notes", verdict.notes),
    ):
        if lines := listed(title, names):
            shown = "\n".join(_text(line.strip()) for line in lines[1:])
            body += [f"<h2>{title}</h2>", f"<pre>{shown}</pre>"]
    head = f"<title>refimpl check: {verdict.verdict}</title><style>{STYLE}</style>"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{head}</head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _text(text: str) -> str:
    return escape(printable(text))


def _diagnosis(verdict: Verdict) -> list[str]:
    lines = diagnosed(verdict)
    if not lines:
        return []
    return ["<h2>Diagnosis</h2>", *(f"<p>{_text(line)}</p>" for line in lines)]


def _table(wrong: list[TensorResult]) -> str:
    head = "".join(f"<th>{name}</th>" for name in HEADER)
    lines = folded(wrong)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row(x))}</tr>"
        for x in lines[:MOST_ROWS]
    )
    more = len(lines) - MOST_ROWS
    tail = f'<p class="soft">and {more:,} more rows</p>' if more > 0 else ""
    return f'<div class="scroll"><table><tr>{head}</tr>{rows}</table></div>{tail}'


def _map(heat: Heat, x: TensorResult) -> str:
    """The heat map: a cell is coloured by its largest error, on a logarithmic scale from the bound
    to the largest; what is within the bound is pale."""
    cells, (rows, columns) = heat.cells, heat.edges
    bound = FACTOR * x.unit
    finite = cells[np.isfinite(cells)]
    most = float(finite.max(initial=bound))
    width = LEFT + CELL * cells.shape[1] + 10
    height = TOP + CELL * cells.shape[0] + 50
    drawn = []
    for (i, j), error in np.ndenumerate(cells):
        ok = error <= bound
        fill = 'class="zero"' if ok else f'fill="{_colour(error, bound, most)}"'
        drawn.append(
            f'<rect x="{LEFT + CELL * j}" y="{TOP + CELL * i}" width="{CELL - 1}" '
            f'height="{CELL - 1}" {fill}><title>{_range(rows, i)}, {_range(columns, j)}: '
            f"{error:.2e}</title></rect>"
        )
    step = max(1, math.ceil(cells.shape[0] / LABELS))
    for i in range(0, cells.shape[0], step):
        drawn.append(
            f'<text x="{LEFT - 6}" y="{TOP + CELL * i + 12}" text-anchor="end">'
            f"{_range(rows, i)}</text>"
        )
    if heat.axes[1] >= 0:
        step = max(4, math.ceil(cells.shape[1] / LABELS))
        for j in range(0, cells.shape[1], step):
            drawn.append(f'<text x="{LEFT + CELL * j}" y="{TOP - 8}">{columns[j]}</text>')
    drawn.append(_legend(TOP + CELL * cells.shape[0] + 14, bound, most))
    axes = f"axis {heat.axes[0]} down" + (
        f", axis {heat.axes[1]} across" if heat.axes[1] >= 0 else ""
    )
    return (
        f'<h2>Where</h2><p class="soft"><code>{_text(x.name)}</code> {list(x.shape)}, {axes}; '
        "a cell shows its largest error</p>"
        f'<div class="scroll"><svg role="img" aria-label="errors of the first wrong tensor" '
        f'width="{max(width, 460)}" height="{height}">{"".join(drawn)}</svg></div>'
    )


def _legend(top: int, bound: float, most: float) -> str:
    boxes = [f'<rect class="zero" x="{LEFT}" y="{top}" width="28" height="12"/>']
    for n, colour in enumerate(COLOURS):
        boxes.append(
            f'<rect fill="{colour}" x="{LEFT + 32 + 28 * n}" y="{top}" width="28" height="12"/>'
        )
    end = LEFT + 32 + 28 * len(COLOURS)
    return "".join(boxes) + (
        f'<text x="{LEFT}" y="{top + 26}">up to {bound:.1e}: ok</text>'
        f'<text x="{end + 6}" y="{top + 10}">{most:.1e}, the largest error</text>'
    )


def _colour(error: float, bound: float, most: float) -> str:
    if not math.isfinite(error):
        return COLOURS[-1]
    low = math.log(max(bound, most * 1e-12, 1e-300))
    span = math.log(max(most, 1e-300)) - low
    share = (math.log(max(error, 1e-300)) - low) / span if span > 0 else 1.0
    return COLOURS[min(int(max(share, 0.0) * len(COLOURS)), len(COLOURS) - 1)]


def _range(edges: np.ndarray, n: int) -> str:
    """The indices of a cell."""
    first, last = int(edges[n]), int(edges[n + 1]) - 1
    return str(first) if first == last else f"{first}…{last}"
