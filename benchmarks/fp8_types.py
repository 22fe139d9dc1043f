"""Which tensor of V3's FP8 training has which type: ``python benchmarks/fp8_types.py`` draws
benchmarks/results/fp8/types.svg (matplotlib, extra `plots`).

A row per product of a linear map, forward and backward; below it what is in no product. The
background is white, so that the picture can be read on a dark page too.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FILE = Path(__file__).parent / "results" / "fp8" / "types.svg"
COLOURS = {"FP8": "#ffd9b3", "bfloat16": "#cfe8fa", "float32": "#e4e4e4"}
WIDTH, HEIGHT = 1.75, 0.62  # of a box
Place = tuple[float, float]  # of a box's middle
BOXES: tuple[tuple[str, str, str, Place], ...] = (  # what, its type, how it is told, where
    ("x", "bfloat16", "activation\n(ours: float32)", (1.0, 6.3)),
    ("W", "float32", "weight\nfloat32", (1.0, 5.4)),
    ("x̂", "FP8", "x: E4M3\n1 × 128", (3.5, 6.3)),
    ("Ŵ", "FP8", "W: E4M3\n128 × 128", (3.5, 5.4)),
    ("y", "bfloat16", "y\n(ours: float32)", (8.5, 5.85)),
    ("dy", "bfloat16", "gradient of y\n(ours: float32)", (1.0, 3.0)),
    ("dŷ", "FP8", "dy: E4M3\n1 × 128", (3.5, 4.0)),
    ("dx", "bfloat16", "gradient of x\n(ours: float32)", (8.5, 4.0)),
    ("dŷ'", "FP8", "dy: E4M3\n128 tokens × 1", (3.5, 3.0)),
    ("x̂'", "FP8", "x̂, read, then E4M3\n128 tokens × 1", (3.5, 2.1)),
    ("dW", "float32", "gradient of W\nfloat32", (8.5, 2.55)),
)
PRODUCTS: tuple[tuple[str, str, Place, tuple[str, ...], str], ...] = (
    ("forward", "x Wᵀ", (6.1, 5.85), ("x̂", "Ŵ"), "y"),
    ("gradient of x", "dy W", (6.1, 4.0), ("dŷ", "Ŵ"), "dx"),
    ("gradient of W", "dyᵀ x", (6.1, 2.55), ("dŷ'", "x̂'"), "dW"),
)
ROUNDINGS = (("x", "x̂"), ("W", "Ŵ"), ("dy", "dŷ"), ("dy", "dŷ'"))
OTHERS: tuple[tuple[str, str], ...] = (
    ("FP8", "kept for the backward: SwiGLU's two inputs, E4M3; input of attention's output, E5M6"),
    (
        "bfloat16",
        "in no FP8: embedding, head, gate, norms, attention; bfloat16 or float32 (ours: float32)",
    ),
    ("bfloat16", "AdamW's two moments"),
    ("float32", "parameters (master) and their gradients; the sums of every 128 terms"),
)


def box(axes: Any, text: str, kind: str, place: Place, width: float = WIDTH) -> None:
    from matplotlib.patches import FancyBboxPatch

    x, y = place
    corner = (x - width / 2, y - HEIGHT / 2)
    style = {"boxstyle": "round,pad=0,rounding_size=0.08", "linewidth": 0.8}
    axes.add_patch(
        FancyBboxPatch(corner, width, HEIGHT, facecolor=COLOURS[kind], edgecolor="#333333", **style)
    )
    axes.text(x, y, text, ha="center", va="center")


def arrow(axes: Any, start: Place, end: Place) -> None:
    style = {"arrowstyle": "-|>", "color": "#333333", "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=end, xytext=start, arrowprops=style)


def draw(path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "refimpl", "font.size": 8.5}):
        figure, axes = plt.subplots(figsize=(8.2, 6.2), layout="constrained", facecolor="white")
        axes.set(xlim=(0, 9.5), ylim=(-1.7, 7.2))
        axes.set_axis_off()
        where = {name: place for name, *_, place in BOXES}
        for _, kind, text, place in BOXES:
            box(axes, text, kind, place)
        half = WIDTH / 2
        for a, b in ROUNDINGS:
            (x0, y0), (x1, y1) = where[a], where[b]
            arrow(axes, (x0 + half, y0), (x1 - half, y1))
        for title, formula, (x, y), inputs, output in PRODUCTS:
            box(axes, formula, "FP8", (x, y), 0.9)
            axes.text(x, y + 0.55, title, ha="center", va="center", weight="bold")
            for name in inputs:
                x0, y0 = where[name]
                arrow(axes, (x0 + half, y0), (x - 0.45, y + 0.16 * (y0 > y) - 0.16 * (y0 < y)))
            x1, y1 = where[output]
            arrow(axes, (x + 0.45, y), (x1 - half, y1))
        kept = [(2.35, 6.0), (2.35, 2.1), (2.625, 2.1)]
        axes.plot([2.625, kept[0][0], kept[1][0]], [6.0, 6.0, 2.1], color="#333333", linewidth=0.9)
        arrow(axes, kept[1], kept[2])
        axes.text(2.28, 4.7, "kept in FP8", rotation=90, ha="right", va="center")
        for number, (kind, text) in enumerate(OTHERS):
            box(axes, text, kind, (4.75, 1.05 - 0.78 * number), 9.2)
        axes.text(0.15, 6.95, "FP8", bbox={"facecolor": COLOURS["FP8"]})
        axes.text(0.95, 6.95, "bfloat16", bbox={"facecolor": COLOURS["bfloat16"]})
        axes.text(2.2, 6.95, "float32", bbox={"facecolor": COLOURS["float32"]})
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=FILE)
    draw(parser.parse_args().out)


if __name__ == "__main__":
    main()
