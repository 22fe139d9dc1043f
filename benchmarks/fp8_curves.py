"""Pre-training the preset `mini` in emulated FP8, in bfloat16 and in float32, from the same weights
on the same text: ``python benchmarks/fp8_curves.py`` (two minutes; the whole training of `mini`,
``--tokens 1024000``, takes about seven).

DeepSeek-V3 (2412.19437, appendix B.1) found the loss of FP8 within 0.25 % of bfloat16's, smoothed.
Here each curve is smoothed alike, and beside the difference stands that of float32 with another
order of sums: what chance alone does to one run. Writes benchmarks/results/fp8/curves.json and
curves.svg (matplotlib, extra `plots`).

bfloat16 is emulated: what enters and leaves each op that stores activations is rounded; masters,
gradients of weights and moments are float32.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.bench.run import commit_of_checkout
from refimpl.grads.rounded import nudged, round_bfloat16
from refimpl.ops import REFERENCE, AnyOp, Op, Ops
from refimpl.train.machine import Machine, open_machine
from refimpl.train.pretrain import Pretrain, PretrainSettings
from refimpl.train.run import Guard

FOLDER = Path(__file__).parent / "results" / "fp8"
STORED = ("linear", "embedding", "rms_norm", "swiglu", "rope", "attention")
DECAY = 0.9  # of the smoothing, per step
COLOURS = {"float32": "#777777", "bfloat16": "#0072b2", "fp8": "#d55e00"}  # Okabe and Ito


def in_bfloat16(op: AnyOp) -> AnyOp:
    """``op``, whose inputs, outputs and gradients of activations are bfloat16 numbers."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        y, saved = op.forward(*map(round_bfloat16, args), **kwargs)
        return round_bfloat16(y), saved

    def backward(dy: Any, saved: Any) -> Any:
        found = op.backward(round_bfloat16(dy), saved)
        return (round_bfloat16(found[0]), *found[1:]) if isinstance(found, tuple) else found

    return Op(forward, backward)


def tables() -> dict[str, Ops]:
    narrow = {name: in_bfloat16(REFERENCE[name]) for name in STORED}
    moved = {name: nudged(op, 1) for name, op in REFERENCE.items()}
    return {
        "float32": REFERENCE,
        "float32, other sums": REFERENCE | moved,
        "bfloat16": REFERENCE | narrow,
    }


def machines() -> dict[str, Machine]:
    plain = open_machine("numpy", "reference")
    found = {name: replace(plain, ops=table) for name, table in tables().items()}
    return found | {"fp8": open_machine("numpy", "fp8")}


def losses(machine: Machine, settings: PretrainSettings, name: str) -> tuple[list[float], float]:
    """The loss of each step, and that of held-out text at the end, in float32."""
    stage = Pretrain(settings, machine)
    state, found = stage.start(), list[float]()
    while state.tokens < settings.tokens:
        state, told = stage.step(state, Guard(stage.jump))
        found.append(float(told["loss"]))
        if len(found) % 50 == 0:
            print(
                f"{name}: step {len(found)}, {state.tokens:,} tokens, {found[-1]:.4f}", flush=True
            )
    exact = Pretrain(settings, open_machine("numpy", "reference"))
    return found, float(exact.evaluate(state)["held_out"])


def smoothed(x: list[float]) -> np.ndarray:
    found = [x[0]]
    for value in x[1:]:
        found.append(DECAY * found[-1] + (1 - DECAY) * value)
    return np.array(found)


def differences(runs: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Of smoothed curves in the second half of the steps, relative, in per cent."""
    curves = {name: smoothed(run["loss"]) for name, run in runs.items()}
    pairs = {
        "fp8 / bfloat16": ("fp8", "bfloat16"),
        "fp8 / float32": ("fp8", "float32"),
        "bfloat16 / float32": ("bfloat16", "float32"),
        "float32, other sums / float32": ("float32, other sums", "float32"),
    }
    told = {}
    for name, (a, b) in pairs.items():
        half = len(curves[a]) // 2
        by = 100 * (curves[a] / curves[b] - 1)[half:]
        told[name] = {"mean": float(by.mean()), "largest": float(np.abs(by).max())}
    return told


def draw(runs: Mapping[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "refimpl", "font.size": 9}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.0), layout="constrained")
        base, largest = smoothed(runs["float32"]["loss"]), 0.3
        for name, colour in COLOURS.items():
            curve = smoothed(runs[name]["loss"])
            left.plot(curve, color=colour, label=name, linewidth=1.3)
            if name != "float32":
                away = 100 * (curve / base - 1)
                largest = max(largest, 1.1 * float(np.max(np.abs(away))))
                right.plot(away, color=colour, label=name, linewidth=1.3)
        other = smoothed(runs["float32, other sums"]["loss"])
        right.plot(100 * (other / base - 1), color="#777777", label="float32, other sums")
        right.axhspan(-0.25, 0.25, color="#eeeeee", label="± 0.25 %")
        left.set(xlabel="step", title="loss, smoothed")
        right.set(xlabel="step", title="per cent above float32's", ylim=(-largest, largest))
        for axes in (left, right):
            axes.legend(frameon=False)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--out", type=Path, default=FOLDER)
    given = parser.parse_args()
    settings = PretrainSettings(tokens=given.tokens)
    runs = {}
    for name, machine in machines().items():
        loss, held_out = losses(machine, settings, name)
        runs[name] = {"loss": [round(x, 5) for x in loss], "held_out": round(held_out, 5)}
    told = {"tokens": given.tokens, "commit": commit_of_checkout("refimpl", "benchmarks")}
    told |= {"differences": differences(runs), "runs": runs}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "curves.json").write_text(json.dumps(told, indent=1) + "\n")
    draw(runs, given.out / "curves.svg")
    for name, by in told["differences"].items():
        print(f"{name}: mean {by['mean']:+.2f} %, largest {by['largest']:.2f} %")
    for name, run in runs.items():
        print(f"{name}: held out {run['held_out']:.4f}")


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
