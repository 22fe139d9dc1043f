"""The pictures of the pages: ``python derivations/pictures.py [FOLDER]`` writes them as SVG.

Every number in them is computed by refimpl. A picture is a white card with text as text, so that it
reads the same on a light and on a dark page. `PICTURES` has them by file name; a test holds that
the committed files are what this script draws.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import pairwise
from math import exp, log, log2
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from refimpl.array import blocks
from refimpl.checkpoint import Checkpoint
from refimpl.config import preset
from refimpl.count import count
from refimpl.generate import Chain, generate
from refimpl.ops import (
    Yarn,
    flash_attention_forward,
    grpo_backward,
    grpo_forward,
    moe_forward,
    mtp_pairs,
    rope_frequencies,
)
from refimpl.ops.attention import visible
from refimpl.parallel.grid import Grid
from refimpl.train.plots import BLUE, GREEN, ORANGE, PINK, SKY

HERE = Path(__file__).parent
INK, PALE, EDGE = "#1f2328", "#57606a", "#d0d7de"
BOX, NOTHING = "#f6f8fa", "#ececec"
TINTS = {BLUE: "#d6e8f5", GREEN: "#d5efe6", ORANGE: "#f9e0d1", PINK: "#f6e4ee", SKY: "#e3f3fc"}
Point = tuple[float, float]


class Picture:
    """Marks on a card of so many pixels, and the words for who does not see it."""

    def __init__(self, width: int, height: int, title: str, description: str) -> None:
        self.size = width, height
        self.words = title, description
        self.marks: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        stroke: str = "none",
        round: float = 0,
    ) -> None:
        self.marks.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" '
            f'rx="{round:g}" fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 13,
        fill: str = INK,
        anchor: str = "start",
        bold: bool = False,
    ) -> None:
        weight = ' font-weight="bold"' if bold else ""
        self.marks.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}" '
            f'text-anchor="{anchor}"{weight}>{escape(words)}</text>'
        )

    def line(
        self,
        points: Iterable[Point],
        colour: str,
        *,
        width: float = 2,
        dashes: str = "",
        arrow: bool = False,
    ) -> None:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        more = f' stroke-dasharray="{dashes}"' if dashes else ""
        more += f' marker-end="url(#{colour[1:]})"' if arrow else ""
        self.marks.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"'
            f"{more}/>"
        )

    def dot(self, x: float, y: float, radius: float, colour: str) -> None:
        self.marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>')

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        words: str,
        *,
        fill: str = BOX,
        stroke: str = EDGE,
        size: float = 13,
    ) -> None:
        """A rectangle with words in its middle."""
        self.rect(x, y, width, height, fill, stroke=stroke, round=4)
        self.text(x + width / 2, y + height / 2 + size * 0.36, words, size=size, anchor="middle")

    def svg(self) -> str:
        width, height = self.size
        title, description = map(escape, self.words)
        arrows = "".join(
            f'<marker id="{colour[1:]}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" '
            f'markerHeight="7" markerUnits="userSpaceOnUse" orient="auto">'
            f'<path d="M0 0 L10 5 L0 10 z" fill="{colour}"/></marker>\n'
            for colour in (BLUE, GREEN, ORANGE, PINK, SKY, PALE)
            if any(f"url(#{colour[1:]})" in mark for mark in self.marks)
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img" aria-labelledby="title desc" '
            "font-family=\"-apple-system, 'Segoe UI', Helvetica, Arial, 'DejaVu Sans', "
            'sans-serif">\n'
            f'<title id="title">{title}</title>\n<desc id="desc">{description}</desc>\n'
            + (f"<defs>\n{arrows}</defs>\n" if arrows else "")
            + f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="12" '
            f'fill="#ffffff" stroke="{EDGE}"/>\n' + "\n".join(self.marks) + "\n</svg>\n"
        )


class Axes:
    """A panel of a picture: a scale each way, with ticks that are given."""

    def __init__(
        self,
        picture: Picture,
        left: float,
        top: float,
        width: float,
        height: float,
        x: tuple[float, float],
        y: tuple[float, float],
    ) -> None:
        self.picture = picture
        self.left = left
        self.top = top
        self.width = width
        self.height = height
        self.x = x
        self.y = y

    def at(self, x: float, y: float) -> Point:
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + self.width * across, self.top + self.height * (1 - up)

    def ticks(self, x: dict[float, str], y: dict[float, str]) -> None:
        """Grid lines at these places, with these words."""
        bottom = self.top + self.height
        for place, words in x.items():
            across, _ = self.at(place, self.y[0])
            self.picture.line([(across, self.top), (across, bottom)], "#e4e4e4", width=1)
            self.picture.text(across, bottom + 17, words, size=12, fill=PALE, anchor="middle")
        for place, words in y.items():
            _, down = self.at(self.x[0], place)
            self.picture.line(
                [(self.left, down), (self.left + self.width, down)], "#e4e4e4", width=1
            )
            self.picture.text(self.left - 7, down + 4, words, size=12, fill=PALE, anchor="end")

    def curve(
        self, xs: Sequence[float], ys: Sequence[float], colour: str, *, dashes: str = ""
    ) -> None:
        """A line, as far as it stays within the panel."""
        inside = [self.at(x, y) for x, y in zip(xs, ys, strict=True) if self.y[0] <= y <= self.y[1]]
        self.picture.line(inside, colour, dashes=dashes)

    def band(self, x: tuple[float, float], fill: str) -> None:
        left, _ = self.at(x[0], 0)
        right, _ = self.at(x[1], 0)
        self.picture.rect(left, self.top, right - left, self.height, fill)


# ---- rope.md


def yarn() -> Picture:
    """Positions per turn of each pair, with YaRN and without, and the ramp between."""
    width, theta, settings = 64, 1e4, Yarn()
    plain = rope_frequencies(width, theta)
    slowed = rope_frequencies(width, theta, settings)
    turn = [(2 * np.pi / f).tolist() for f in (plain, slowed)]  # positions
    # f' = f (1 − ρ) + f ρ / τ, solved for the ramp ρ
    ramp = ((1 - slowed / plain) / (1 - 1 / settings.factor)).tolist()
    ramp = [abs(round(x, 12)) for x in ramp]
    first = max(i for i, x in enumerate(ramp) if x == 0)
    last = min(i for i, x in enumerate(ramp) if x == 1)
    pairs = list(range(width // 2))
    reached = settings.original * settings.factor
    p = Picture(
        760,
        500,
        "YaRN's wavelengths and ramp",
        f"Above: how many positions a pair of RoPE needs for a full turn, on a logarithmic scale, "
        f"for the {width // 2} pairs of V3. Pairs up to {first} turn often within the original "
        f"context of {settings.original:,} positions and are unchanged. From pair {last} on YaRN "
        f"makes them {settings.factor:g} times slower. Below: the ramp between the two, linear "
        "in the pair.",
    )
    p.text(24, 30, "Positions per full turn of each pair (V3: θ = 10,000, R = 64)", bold=True)
    top = Axes(p, 92, 48, 640, 240, (-0.7, 31.7), (log2(4), log2(4e6)))
    low = Axes(p, 92, 330, 640, 96, (-0.7, 31.7), (-0.06, 1.06))
    for axes in (top, low):
        axes.band((first, last), "#fff8c5")
    top.ticks({}, {log2(x): f"{x:,}" for x in (10, 100, 1000, 10_000, 100_000, 1_000_000)})
    fast = settings.beta_fast
    for length, words in (
        (settings.original / fast, f"L / {fast:g}: {fast:g} turns within L"),
        (settings.original / settings.beta_slow, f"L = {settings.original:,}: one turn within L"),
        (reached, f"{settings.factor:g} L = {reached:,.0f}"),
    ):
        _, y = top.at(0, log2(length))
        p.line([(92, y), (732, y)], PALE, width=1, dashes="5 4")
        p.text(98, y - 5, words, size=12, fill=PALE)
    for turns, colour in zip(turn, (ORANGE, BLUE), strict=True):
        heights = [log2(x) for x in turns]
        top.curve(pairs, heights, colour)
        for pair, height in zip(pairs, heights, strict=True):
            p.dot(*top.at(pair, height), 2.6, colour)
    x, y = top.at(25.6, log2(turn[1][25]))
    p.text(x - 12, y - 12, "with YaRN", fill=BLUE, anchor="end", bold=True)
    x, y = top.at(27, log2(turn[0][27]))
    p.text(x + 6, y + 36, "without", fill=ORANGE, bold=True)
    words = f"Ramp ρ: 0 keeps a pair's frequency, 1 divides it by {settings.factor:g}"
    p.text(24, 318, words, bold=True)
    low.ticks({float(i): f"{i}" for i in (0, 5, first, 16, last, 31)}, {0.0: "0", 1.0: "1"})
    low.curve(pairs, ramp, GREEN)
    for pair, height in zip(pairs, ramp, strict=True):
        p.dot(*low.at(pair, height), 2.6, GREEN)
    x, y = low.at(16, ramp[16])
    p.text(x + 12, y + 10, f"pair 16: {ramp[16]:.3f}", size=12, fill=GREEN)
    p.text(412, 464, "pair i", size=12, fill=PALE, anchor="middle")
    x, _ = low.at((first + last) / 2, 0)
    p.text(x, 484, f"slowed in part: pairs {first + 1} to {last - 1}", size=12, anchor="middle")
    p.text(92, 484, f"unchanged: 0 to {first}", size=12)
    p.text(732, 484, f"{settings.factor:g} times slower: {last} to 31", size=12, anchor="end")
    return p


# ---- grpo.md


class Term(NamedTuple):
    """What GRPO's op makes of one token."""

    loss: float
    gradient: float  # of the loss, in the token's log-probability
    unclipped: bool


def term(log_prob: float = -3.0, **given: Any) -> Term:
    """Of an output of one token, with ``kl_weight`` 0 unless given."""
    settings = {"mask": np.ones((1, 1), bool), "kl_weight": 0.0} | given
    out, saved = grpo_forward(np.full((1, 1), log_prob), **settings)
    gradient = grpo_backward((1.0,), saved)
    return Term(float(out.loss), float(gradient[0, 0]), bool(out.unclipped[0, 0]))


def signed(x: float) -> str:
    return f"{x:g}".replace("-", "−")


def clip() -> Picture:
    """The objective of a token by its ratio, and where it has a gradient."""
    bounds, old = (0.2, 0.2), -3.0
    ratios = np.linspace(0.02, 2.0, 100).tolist()
    edges = [0.0, 1 - bounds[0], 1 + bounds[1], 2.0]
    p = Picture(
        760,
        384,
        "The clip's six regions",
        "The objective of a token by the ratio of the policies, for a good output and for a bad "
        f"one. For a good one the line rises with the ratio and is flat above {edges[2]:g}, where "
        f"nothing is learned. For a bad one it is flat below {edges[1]:g} and falls with the ratio "
        "above that, without an end.",
    )
    for left, advantage, title in (
        (56, 1.0, "A good output: A = 1"),
        (426, -1.0, "A bad output: A = −1"),
    ):

        def of(ratio: float, advantage: float = advantage) -> Term:
            given = {"advantages": np.array([advantage]), "old_log_prob": np.full((1, 1), old)}
            return term(old + log(ratio), clip=bounds, **given)

        far = 2.1 * advantage
        axes = Axes(p, left, 62, 310, 220, (0, 2), (min(0, far), max(0, far)))
        for low, high in pairwise(edges):
            middle = of((low + high) / 2)
            assert middle.unclipped == (middle.gradient != 0)
            axes.band((low, high), TINTS[GREEN] if middle.unclipped else NOTHING)
            x, _ = axes.at((low + high) / 2, 0)
            for row, words in enumerate(("ratio", "ρA") if middle.unclipped else ("bound", "0")):
                p.text(x, 322 + 18 * row, words, size=12, anchor="middle")
        axes.ticks({x: f"{x:g}" for x in edges}, {x: signed(x) for x in (0, advantage, far / 1.05)})
        axes.curve(ratios, [advantage * x for x in ratios], ORANGE, dashes="5 4")
        axes.curve(ratios, [-of(x).loss for x in ratios], BLUE)
        p.text(left, 32, title, bold=True)
        p.text(left, 50, "objective of a token, by the ratio ρ", size=12, fill=PALE)
    for row, words in enumerate(("min", "∂/∂z")):
        p.text(50, 322 + 18 * row, words, size=12, fill=PALE, anchor="end")
    p.line([(56, 364), (84, 364)], BLUE)
    p.text(90, 368, "min(ρA, clip(ρ) A)", size=12)
    p.line([(240, 364), (268, 364)], ORANGE, dashes="5 4")
    p.text(274, 368, "ρA", size=12)
    p.rect(330, 356, 16, 16, TINTS[GREEN])
    p.text(352, 368, "has a gradient", size=12)
    p.rect(480, 356, 16, 16, NOTHING)
    p.text(502, 368, "has none: moved far enough already", size=12)
    return p


def kl() -> Picture:
    """The three estimates of the KL, and the gradients that they give."""
    places = np.linspace(-2, 2, 81).tolist()
    p = Picture(
        760,
        372,
        "The estimates k1, k2 and k3 of the KL",
        "Left: their values by u, the logarithm of the reference's probability over the "
        "policy's. k1 is a falling line, k2 a parabola; k3 lies between 0 and the parabola for "
        "negative u and above it for positive u. Right: their derivatives in the policy's "
        "log-probability. That of k1 is constant, that of k2 a line, and that of k3 falls "
        "exponentially for positive u.",
    )
    left = Axes(p, 52, 62, 310, 250, (-2, 2), (-2.1, 4.5))
    right = Axes(p, 424, 62, 310, 250, (-2, 2), (-6.6, 2.4))
    for axes, heights in ((left, (-2, 0, 2, 4)), (right, (-6, -4, -2, 0, 2))):
        axes.ticks({x: signed(x) for x in (-2, -1, 0, 1, 2)}, {y: signed(y) for y in heights})
    for name, colour, on_left, on_right in (
        ("k1", ORANGE, (1.0, -1.55), (0.4, 1.25)),
        ("k2", GREEN, (-1.85, 2.35), (1.05, -0.75)),
        ("k3", BLUE, (1.2, 3.5), (0.72, -3.6)),
    ):
        given = {"advantages": np.zeros(1), "kl": name, "kl_weight": 1.0}
        found = [term(-3.0, reference_log_prob=np.full((1, 1), u - 3.0), **given) for u in places]
        left.curve(places, [x.loss for x in found], colour)
        right.curve(places, [x.gradient for x in found], colour)
        p.text(*left.at(*on_left), name, fill=colour, bold=True)
        p.text(*right.at(*on_right), name, fill=colour, bold=True)
    p.text(52, 32, "Value", bold=True)
    p.text(52, 50, "what the loss adds, at β = 1", size=12, fill=PALE)
    p.text(424, 32, "Derivative in the token's ln π", bold=True)
    p.text(424, 50, "negative: a step makes the token more likely", size=12, fill=PALE)
    for x in (207, 579):
        words = "u: ln of the reference's over the policy's π"
        p.text(x, 354, words, size=12, fill=PALE, anchor="middle")
    return p


# ---- flash_attention.md


def attention_blocks() -> Picture:
    """The blocks of the score matrix that the loops visit, and one row's walk through them."""
    length, block, side = 12, 4, 22
    none = np.empty((1, length))
    seen = visible((0, length), (0, length), none, none, True, None, None)[0, 0]
    p = Picture(
        760,
        400,
        "Attention by blocks",
        "Left: the matrix of scores in blocks of queries and keys; a causal mask hides the blocks "
        "above the diagonal, and the loops leave them out. Right: the three keys of the example, "
        "a block each, with the running maximum, denominator, rescaling factor and output.",
    )
    p.text(24, 32, f"{length} queries, {length} keys, blocks of {block}", bold=True)
    x0, y0 = 76.0, 76.0
    p.text(x0, y0 - 10, "keys s →", size=12, fill=PALE)
    p.text(x0 - 10, y0 + 14, "queries", size=12, fill=PALE, anchor="end")
    p.text(x0 - 10, y0 + 30, "t ↓", size=12, fill=PALE, anchor="end")
    p.rect(x0, y0, length * side, length * side, "#f1f1f1")
    visited = 0
    for t0, t1 in blocks(length, block):
        for s0, s1 in blocks(length, block, t1):
            visited += 1
            for t in range(t0, t1):
                for s in range(s0, s1):
                    fill = TINTS[BLUE] if seen[t, s] else "#ffffff"
                    p.rect(x0 + s * side, y0 + t * side, side, side, fill, stroke="#ffffff")
            p.rect(
                x0 + s0 * side + 1,
                y0 + t0 * side + 1,
                (s1 - s0) * side - 2,
                (t1 - t0) * side - 2,
                "none",
                stroke=BLUE,
                round=3,
            )
        middle = y0 + (t0 + t1) / 2 * side
        end = x0 + t1 * side
        p.line([(x0 + side / 2, middle), (end - side / 2, middle)], ORANGE, arrow=True)
    total = (length // block) ** 2
    p.text(x0 + 8 * side, y0 + 2.2 * side, "left out", size=12, fill=PALE, anchor="middle")
    p.text(x0, y0 + length * side + 22, f"{visited} of {total} blocks are visited", size=12)
    p.text(x0, y0 + length * side + 40, "outside: queries; inside, along the arrow: keys", size=12)

    # what the running sums are after each block: the whole op on the keys so far
    odds, values = (1, 2, 5), (8, 4, 0)  # those of the page's example
    k = np.log(np.array(odds, np.float64)).reshape(1, 3, 1, 1)
    v = np.array(values, np.float64).reshape(1, 3, 1, 1)
    left = 392
    p.text(left, 32, "One query, three blocks of one key", bold=True)
    scores = ", ".join(f"ln {x}" for x in odds)
    words = f"scores {scores}; values {', '.join(map(str, values))}"
    p.text(left, 50, words, size=12, fill=PALE)
    columns = (left + 62, left + 146, left + 230, left + 314)
    for x, words in zip(columns, ("largest m", "factor α", "sum ℓ", "output n/ℓ"), strict=True):
        p.text(x, 92, words, size=12, fill=PALE, anchor="middle")
    before = -np.inf
    for keys in (1, 2, 3):
        o, saved = flash_attention_forward(
            np.ones((1, 1, 1, 1)), k[:, :keys], v[:, :keys], scale=1.0, block=1, causal=False
        )
        largest, lse = float(k[0, :keys].max()), float(saved.lse.item())
        y = 104 + 76 * (keys - 1)
        p.rect(left, y, 348, 50, TINTS[BLUE], stroke=BLUE, round=5)
        p.text(left + 10, y + 30, f"{keys}", bold=True)
        numbers = (largest, exp(before - largest), exp(lse - largest), float(o.item()))
        for x, number in zip(columns, numbers, strict=True):
            p.text(x, y + 30, f"{number:.3f}", anchor="middle")
        if keys < 3:
            p.line([(left + 146, y + 52), (left + 146, y + 74)], ORANGE, arrow=True)
            p.text(left + 156, y + 67, "ℓ, n times α, plus the new key", size=12, fill=PALE)
        before = largest
    words = f"End: output {float(o.item()):g}, log-sum-exp m + ln ℓ = {lse:.3f} = ln {exp(lse):.0f}"
    p.text(left, 334, words)
    p.text(left, 354, "The backward gets p again from that number.", size=12, fill=PALE)
    return p


# ---- moe.md


def dispatch() -> Picture:
    """Tokens to slots, slots to blocks of an expert's rows, and back."""
    indices = np.array([[2, 0], [0, 3], [2, 3], [0, 2]])
    tokens, top_k = indices.shape
    experts, rng = 4, np.random.default_rng(0)
    weights = [rng.normal(size=shape) for shape in ((experts, 1, 1),) * 3]
    given = np.ones((tokens, 1)), np.ones((tokens, top_k))
    _, saved = moe_forward(*given, *weights, None, None, None, indices=indices)
    order = saved.order.tolist()
    colours = (BLUE, GREEN, ORANGE, PINK)
    p = Picture(
        760,
        500,
        "Who talks to whom in dispatch",
        "Four tokens with two slots each. The slots are sorted by expert, so that each expert has "
        "its rows together; expert 1 has none. Afterwards every row goes back to its slot, and a "
        "token adds up its two. The backward takes the same ways in the other direction.",
    )
    pitch, top = 45.0, 96.0

    def centre(slot: float) -> float:
        return top + pitch * (slot + 0.5)

    heads = ((64, "tokens"), (196, "slots"), (366, "rows by expert"), (570, "slots"), (702, "sums"))
    for x, words in heads:
        p.text(x, 62, words, bold=True, anchor="middle")
    for x, words in ((276, "gather by π"), (468, "gather by π⁻¹")):
        p.text(x, 84, words, size=12, fill=PALE, anchor="middle")
    p.text(24, 30, f"{tokens} tokens, {top_k} experts each, {experts} experts", fill=PALE)
    for token, colour in enumerate(colours):
        tint = TINTS[colour]
        slots = range(token * top_k, (token + 1) * top_k)
        middle = sum(map(centre, slots)) / top_k
        p.box(34, middle - 17, 60, 34, f"x{token}", fill=tint, stroke=colour)
        p.box(672, middle - 17, 60, 34, f"y{token}", fill=tint, stroke=colour)
        for slot in slots:
            y, expert = centre(slot), indices.reshape(-1)[slot]
            p.box(162, y - 15, 68, 30, f"{slot} → e{expert}", fill=tint, stroke=colour, size=12)
            p.box(536, y - 15, 68, 30, f"o of {slot}", fill=tint, stroke=colour, size=12)
            p.line([(94, middle), (160, y)], colour, width=1.5, arrow=True)
            p.line([(604, y), (670, middle)], colour, width=1.5, arrow=True)
    y = top
    for expert, rows, _ in saved.experts:
        high = 34.0 * (rows.stop - rows.start) + 22
        p.rect(322, y, 88, high, BOX, stroke=PALE, round=5)
        p.text(366, y + 16, f"expert {expert}", size=12, anchor="middle", bold=True)
        for place, slot in enumerate(order[rows]):
            colour = colours[slot // top_k]
            row = y + 36 + 34 * place
            p.box(332, row - 13, 68, 26, f"slot {slot}", fill=TINTS[colour], stroke=colour, size=12)
            p.line([(230, centre(slot)), (330, row)], colour, width=1.5, arrow=True)
            p.line([(400, row), (534, centre(slot))], colour, width=1.5, arrow=True)
        y += high + 10
    (empty,) = set(range(experts)) - {x.expert for x in saved.experts}
    p.text(24, 482, f"Expert {empty} has no rows; nothing is padded, nothing dropped.", size=12)
    p.text(736, 482, "Backward: the same arrows, turned round.", size=12, anchor="end")
    return p


# ---- mla.md


def cache() -> Picture:
    """What a token leaves behind in one layer: every head's key and value, or one latent."""
    config = preset("v3")
    lines = {line.name: line for section in count(config) for line in section.lines}
    latent = int(lines["MLA, a layer: latent + rotated key"].value)
    heads = int(lines["MHA, a layer: keys N, values V wide"].value)
    bytes_of = {"MHA": int(lines["MHA of the same model"].value), "MLA": int(lines["MLA"].value)}
    scale, context = 1.3, 131_072  # pixels of a number's side; tokens
    side = latent**0.5
    p = Picture(
        760,
        350,
        "The cache of one token in one layer, MHA against MLA",
        f"Areas to scale. Multi-head attention keeps {heads:,} numbers, a key and a value for each "
        f"of {config.heads} heads. MLA keeps {latent}: the latent, and one rotated key for all "
        f"heads, {100 * latent / heads:.2f} per cent of it.",
    )
    p.text(24, 32, "One token, one layer of V3: areas to scale", bold=True)
    x, y = 96.0, 86.0
    high = config.heads * scale
    p.text(24, y + 14, f"{config.heads}", size=12, fill=PALE)
    p.text(24, y + 30, "heads", size=12, fill=PALE)
    for words, width, colour in (("keys", config.nope, BLUE), ("values", config.value, GREEN)):
        p.rect(x, y, width * scale, high, TINTS[colour], stroke=colour)
        p.text(x + width * scale / 2, y + high / 2 + 5, words, anchor="middle")
        p.text(x + width * scale / 2, y - 8, f"{width}", size=12, fill=PALE, anchor="middle")
        x += width * scale
    p.text(96, 62, "Multi-head attention", size=13, bold=True)
    p.text(96, y + high + 22, f"{heads:,} numbers", size=13)
    left, top = 500.0, 86.0
    share = config.kv_latent / latent
    p.text(left, 62, "MLA", bold=True)
    p.rect(left, top, side * scale, side * share * scale, TINTS[ORANGE], stroke=ORANGE)
    p.rect(
        left,
        top + side * share * scale,
        side * scale,
        side * (1 - share) * scale,
        PINK,
        stroke=PINK,
    )
    p.text(left + side * scale + 12, top + 16, f"latent c: {config.kv_latent}", size=12)
    p.text(left + side * scale + 12, top + 34, f"rotated key: {config.rope}", size=12)
    p.text(
        left, top + side * scale + 26, f"{latent} numbers, for all {config.heads} heads", size=13
    )
    p.text(left, top + side * scale + 46, f"{100 * latent / heads:.2f} % of the other", size=13)
    for row, words in enumerate(("expanded when it is needed (naive)", "or never (absorbed)")):
        p.text(left, top + side * scale + 74 + 17 * row, words, size=12, fill=PALE)
    p.line([(24, 298), (736, 298)], EDGE, width=1)
    for place, (name, amount) in enumerate(bytes_of.items()):
        whole = amount * context / 2**30
        words = f"{name}: {amount:,} bytes per token, {whole:,.1f} GiB for {context:,} tokens"
        p.text(24, 320 + 18 * place, words, size=12)
    p.text(736, 338, f"{config.layers} layers, bfloat16", size=12, fill=PALE, anchor="end")
    return p


# ---- mtp.md


class Pass(NamedTuple):
    """One forward of the main model behind the prompt."""

    start: int  # of its first new token
    drafts: list[int]
    accepted: int


def passes(prompt: bytes, tokens: int) -> tuple[list[Pass], bytes]:
    """What a small trained model drafts and accepts, and what it writes."""
    checkpoint = Checkpoint.open(HERE.parent / "tests" / "golden" / "trained")
    drafted: list[tuple[int, list[int]]] = []
    draft = Chain.draft

    def noted(self: Chain, state: object, known: Sequence[int], count: int) -> object:
        found = draft(self, state, known, count)
        drafted.append((len(known) - len(prompt), found[0]))
        return found

    Chain.draft = noted  # type: ignore[method-assign]
    try:
        (said,) = generate(
            checkpoint.load(), checkpoint.config, [[*prompt]], max_tokens=tokens, speculate=2
        )
    finally:
        Chain.draft = draft  # type: ignore[method-assign]
    ends = [start for start, _ in drafted[1:]] + [len(said.tokens)]
    found = [
        Pass(start, drafts, min(end - start - 1, len(drafts)))
        for (start, drafts), end in zip(drafted, ends, strict=True)
    ]
    assert sum(x.accepted for x in found) == said.accepted
    return found, bytes(said.tokens)


def shown(text: str) -> str:
    """With its spaces to be seen."""
    return text.replace(" ", "␣")


def speculation() -> Picture:
    """The chain of modules over positions, and drafts that the main model accepts or not."""
    length, depths = 6, 2
    tokens = np.arange(length)[None]
    targets = np.arange(1, length + 1)[None]
    mask = targets < length
    p = Picture(
        760,
        592,
        "The chain of MTP modules, and speculation with it",
        "Above: rows of positions. The main model reads a token and predicts the next. Module 1 "
        "reads the main model's state and the next token and predicts the one after; module 2 goes "
        "one further. Below: a trained small model writes with two drafts per forward; most drafts "
        "are accepted, and a rejected one is replaced by the main model's own token.",
    )
    p.text(24, 30, "The chain: what each position reads and predicts", bold=True)
    rows = [(tokens[0].tolist(), targets[0].tolist(), mask[0].tolist())]
    for depth in range(1, depths + 1):
        ids, later, counts, _ = mtp_pairs(tokens, targets, mask, depth)
        rows.append((ids[0].tolist(), later[0].tolist(), counts[0].tolist()))
    colours = (BLUE, GREEN, ORANGE)
    names = ("main model", "module 1", "module 2")
    step, wide = 102.0, 78.0

    def corner(depth: int, place: int) -> Point:
        return 132 + step * place, 212 - 76 * depth

    for depth, (ids, later, counts) in enumerate(rows):
        colour = colours[depth]
        _, y = corner(depth, 0)
        p.text(24, y + 18, names[depth], fill=colour, bold=True)
        p.text(24, y + 34, "reads → predicts", size=11, fill=PALE)
        for place, (read, says, counted) in enumerate(zip(ids, later, counts, strict=True)):
            x, y = corner(depth, place)
            target = f"t{says}" if counted else "–"
            p.box(x, y, wide, 40, f"t{read} → {target}", fill=TINTS[colour], stroke=colour, size=12)
            if depth < depths and place < len(rows[depth + 1][0]):
                p.line([(x + wide / 2, y - 2), (x + wide / 2, y - 34)], colour, arrow=True)
    for place in range(length):
        x, y = corner(0, place)
        p.text(x + wide / 2, y + 58, f"position {place}", size=12, fill=PALE, anchor="middle")
    x, y = corner(0, 0)
    p.text(x + wide / 2 + 8, y - 14, "state s⁰", size=12, fill=PALE)
    x, y = corner(1, 0)
    p.text(x + wide / 2 + 8, y - 14, "state s¹", size=12, fill=PALE)

    prompt = b"An assignment "
    found, text = passes(prompt, 20)
    p.line([(24, 292), (736, 292)], EDGE, width=1)
    words = f"Speculation: two drafts per forward, behind “{shown(prompt.decode())}”"
    p.text(24, 318, words, bold=True)
    cell, top = 27.0, 340.0
    left = 132.0
    for place, letter in enumerate(text.decode()):
        p.box(left + cell * place, top, cell - 3, 22, shown(letter), size=12)
    p.text(24, top + 16, "the text", size=12, fill=PALE)
    for row, (start, drafts, accepted) in enumerate(found):
        y = top + 30 + 25 * row
        p.text(24, y + 16, f"forward {row + 1}", size=12, fill=PALE)
        for place, token in enumerate([text[start - 1], *drafts]):
            right = place <= accepted
            colour = BLUE if not place else GREEN if right else ORANGE
            x = left + cell * (start - 1 + place)
            p.box(x, y, cell - 3, 22, shown(chr(token)), fill=TINTS[colour], stroke=colour, size=12)
    total, drafted = sum(x.accepted for x in found), sum(len(x.drafts) for x in found)
    y = 562.0
    for x, colour, words in (
        (24, BLUE, "the main model's own token"),
        (236, GREEN, "draft, accepted"),
        (372, ORANGE, "draft, rejected: the next forward has another"),
    ):
        p.rect(x, y - 12, 14, 14, TINTS[colour], stroke=colour)
        p.text(x + 20, y, words, size=12)
    words = (
        f"{len(text)} tokens: the prompt's forward gave the first, {len(found)} more the others; "
    )
    p.text(24, y + 20, f"{words}{total} of {drafted} drafts accepted", size=12, fill=PALE)
    return p


# ---- parallel.md


def ranks() -> Picture:
    """What each of four ranks has, and who sends what to whom."""
    grid, config, batch, length = Grid(data=2, context=2, expert=2), preset("tiny"), 6, 32
    p = Picture(
        760,
        400,
        "Four ranks: what each has, and who sends what to whom",
        f"A grid of {grid.data} rows and {grid.context} columns of ranks. A row has the same "
        "sequences, a column the same piece of their positions; the two ranks of a row hold all "
        "experts between them. Within a row keys and values go around a ring, and tokens go to "
        "their experts and back. Gradients are added up over all ranks, those of experts over "
        "the ranks of a column.",
    )
    boxes = {}
    for rank in range(grid.ranks):
        x, y = 40 + 420 * grid.piece(rank), 30 + 230 * grid.row(rank)
        rows, positions = grid.place(rank, batch, length)
        experts = grid.experts(rank, config)
        boxes[rank] = x, y
        p.rect(x, y, 260, 116, BOX, stroke=EDGE, round=4)
        p.text(x + 14, y + 24, f"rank {rank}", bold=True)
        for line, (name, own) in enumerate(
            (("sequences", rows), ("positions", positions), ("experts", experts))
        ):
            words = f"{name} {own.start} to {own.stop - 1}"
            p.text(x + 14, y + 48 + 20 * line, words, fill=(BLUE, ORANGE, GREEN)[line])
        p.text(x + 14, y + 108, "all other weights", size=12, fill=PALE)
    for rank in range(0, grid.ranks, grid.context):
        (x, y), (end, _) = boxes[rank], boxes[rank + 1]
        for row, (words, colour) in enumerate((("keys, values", ORANGE), ("tokens", GREEN))):
            down = y + 38 + 48 * row
            p.line([(x + 266, down), (end - 6, down)], colour, arrow=True)
            p.line([(end - 6, down + 9), (x + 266, down + 9)], colour, arrow=True)
            p.text((x + 260 + end) / 2, down - 7, words, size=12, fill=colour, anchor="middle")
    for rank in range(grid.context):
        (x, y), (_, end) = boxes[rank], boxes[rank + grid.context]
        p.line([(x + 60, y + 122), (x + 60, end - 6)], GREEN, arrow=True)
        p.line([(x + 69, end - 6), (x + 69, y + 122)], GREEN, arrow=True)
        p.text(x + 80, (y + 116 + end) / 2 - 4, "gradients of", size=12, fill=GREEN)
        p.text(x + 80, (y + 116 + end) / 2 + 12, "the same experts", size=12, fill=GREEN)
    p.text(380, 196, "gradients of all other weights:", size=12, fill=BLUE, anchor="middle")
    p.text(380, 212, "over all four ranks", size=12, fill=BLUE, anchor="middle")
    return p


PICTURES: dict[str, Callable[[], Picture]] = {
    "rope.svg": yarn,
    "grpo_clip.svg": clip,
    "grpo_kl.svg": kl,
    "flash_attention.svg": attention_blocks,
    "moe.svg": dispatch,
    "mla.svg": cache,
    "mtp.svg": speculation,
    "parallel.svg": ranks,
}


def main(folder: Path = HERE) -> None:
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw().svg())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
