"""Pictures of a recipe's results, as SVG with text as text: the same bytes from the same results
and the same matplotlib (extra ``plots``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CouldNotRun
from ..files import replacing

__all__ = ["PICTURES", "SHOWN", "Picture", "draw"]

# Told apart also by who sees few colours (Okabe and Ito)
BLUE, SKY = "#0072b2", "#56b4e9"
GREEN, ORANGE = "#009e73", "#d55e00"
PINK, GREY = "#cc79a7", "#777777"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "refimpl",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "lines.linewidth": 1.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
}
SHOWN = {  # how jobs are called in pictures and tables
    "base": "pre-training",
    "unbalanced": "pre-training without balancing",
    "long": "extension by YaRN",
    "sft": "SFT",
    "grpo-0": "GRPO, seed 0",
    "grpo-1": "GRPO, seed 1",
    "grpo-2": "GRPO, seed 2",
    "permuted": "GRPO, permuted rewards",
    "one-update": "GRPO, one update a step",
    "continued": "continued SFT",
    "sft-hard": "SFT, harder task",
    "grpo-hard": "GRPO, harder task",
    "reward-model": "reward model",
    "second-sft": "second SFT",
    "last": "last stage",
    "distilled": "student, distilled",
    "student-gold": "student, gold solutions",
    "student-answers": "student, answers alone",
    "student-grpo": "student, its own GRPO",
}
GRPO = {  # colours and strokes
    "grpo-0": (BLUE, "-"),
    "grpo-1": (SKY, "-"),
    "grpo-2": (GREEN, "-"),
    "one-update": ("black", ":"),
    "permuted": (ORANGE, "--"),
}
Jobs = Mapping[str, Any]


class Picture(NamedTuple):
    """A picture of the report, and what it needs."""

    name: str
    title: str
    says: str  # what to look at
    needs: tuple[str, ...]  # jobs, all of them
    draw: Callable[[Any, Jobs, Mapping[str, Any]], None]  # on a figure
    size: tuple[float, float] = (7.6, 3.2)  # inches


def draw(results: Mapping[str, Any], folder: Path, *, kind: str = "svg") -> list[Picture]:
    """Draw every picture whose jobs have run into ``folder``; those that were drawn.

    CouldNotRun without matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise CouldNotRun(
            "pictures need matplotlib, which is not installed: pip install "
            "'deepseek-refimpl[plots]'"
        )
    matplotlib: Any = import_module("matplotlib")
    figure_of = import_module("matplotlib.figure").Figure
    folder.mkdir(exist_ok=True)
    jobs = results["jobs"]
    drawn = [x for x in PICTURES if all(name in jobs for name in x.needs)]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user has set
        matplotlib.rcParams.update(STYLE)
        for picture in drawn:
            figure = figure_of(figsize=picture.size, layout="constrained")
            picture.draw(figure, jobs, results)
            file = BytesIO()
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(file, format=kind, metadata=metadata, dpi=110)
            data = file.getvalue()
            if kind == "svg":  # two decimals of a point are enough
                data = re.sub(rb"(?<=\d\.\d\d)\d+", b"", data)
            with replacing(folder / f"{picture.name}.{kind}") as target:
                target.write(data)
    return drawn


def pretraining(figure: Any, jobs: Jobs, results: Mapping[str, Any]) -> None:
    base = jobs["base"]
    curves, seen = base["curves"], base["evaluations"]
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.plot(curves["step"], curves["main"], color=BLUE, label="next token")
    depths = [name for name in curves if name.startswith("mtp ")]
    for name, colour in zip(depths, (SKY, GREEN, PINK), strict=False):
        ahead = int(name.removeprefix("mtp ")) + 1
        left.plot(curves["step"], curves[name], color=colour, label=f"MTP, {ahead} tokens ahead")
    left.plot(seen["step"], seen["held_out"], "o", color=ORANGE, ms=4.5, label="held-out text")
    if results["bigram"]:
        left.axhline(results["bigram"], color=GREY, ls="--", lw=1.2, label="bigram, held-out text")
    left.set(title="loss", xlabel="step", ylabel="nats per token")
    left.legend()
    if "accepted" in seen:
        right.plot(seen["step"], seen["accepted"], "o-", color=BLUE, ms=4.5)
        right.set(title="drafts of MTP that the model accepts", xlabel="step", ylabel="share")
        right.set_ylim(0, 1)


def load(figure: Any, jobs: Jobs, results: Mapping[str, Any]) -> None:
    """The first layer that has experts: maps over the steps, and the violation of the worst."""
    names = {"unbalanced": "without balancing", "base": "with bias balancing"}
    grid = figure.subplot_mosaic([[*names], ["violation"] * 2], height_ratios=(3, 2))
    layer = next(name for name in jobs["base"]["loads"] if name != "step")
    for name, title in names.items():
        loads, panel = jobs[name]["loads"], grid[name]
        rows = [list(x) for x in zip(*loads[layer], strict=True)]
        extent = (0, loads["step"][-1], len(rows) - 0.5, -0.5)
        shades = panel.imshow(
            rows,
            aspect="auto",
            extent=extent,
            cmap="cividis",
            vmin=0,
            vmax=2.5,
            interpolation="nearest",
        )
        panel.grid(visible=False)
        panel.set(title=title, xlabel="step", ylabel="expert", yticks=range(0, len(rows), 2))
    bar = figure.colorbar(shades, ax=[grid[name] for name in names], extend="max")
    bar.set_label("load, 1 is the mean")
    panel = grid["violation"]
    for name, colour in zip(names, (ORANGE, BLUE), strict=True):
        curves = jobs[name]["curves"]
        panel.plot(curves["step"], curves["violation"], color=colour, label=names[name])
    panel.set(title="max violation: max load / mean load − 1", xlabel="step", ylabel="share")
    panel.set_ylim(bottom=0)
    panel.legend()


def positions(figure: Any, jobs: Jobs, results: Mapping[str, Any]) -> None:
    last = jobs["long"]
    phases = [*last.get("phases", []), last]
    original = last["lengths"]["original"]
    panel = figure.subplots()

    def line(run: Any, when: str, name: str, label: str, **style: Any) -> None:
        found = run["positions"][when][name]
        panel.plot(found["position"], found["loss"], label=label, **style)

    line(phases[0], "first", "by_position_plain", "pre-trained, without YaRN", color=ORANGE)
    line(phases[0], "first", "by_position", "with YaRN, before training", color=ORANGE, ls=":")
    for run, colour in zip(phases, (SKY, BLUE), strict=False):
        factor = run["lengths"]["reached"] // original
        line(run, "last", "by_position", f"after the phase ×{factor}", color=colour)
    plain = f"after ×{last['lengths']['reached'] // original}, YaRN switched off"
    line(last, "last", "by_position_plain", plain, color=GREY, ls="--", lw=1.2)
    panel.set_xscale("log", base=2)
    for length in (original, *(run["lengths"]["reached"] for run in phases)):
        panel.axvline(length, color=GREY, lw=0.8)
        place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "bottom"}
        panel.annotate(f"{length:,}", (length, 1.01), color=GREY, **place)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.set(xlabel="position of the token", ylabel="loss, nats per token")
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def fine_tuning(figure: Any, jobs: Jobs, results: Mapping[str, Any]) -> None:
    seen = jobs["sft"]["evaluations"]
    panel = figure.subplots()
    stop = jobs["sft"]["settings"].get("stop")
    if stop:
        panel.axhspan(*stop, color=SKY, alpha=0.25, lw=0, label="where sampled accuracy stops it")
    for name, label, style in (
        ("format_sampled", "format, sampled", {"color": GREEN, "ls": ":"}),
        ("greedy", "accuracy, greedy", {"color": ORANGE, "ls": "--"}),
        ("sampled", "accuracy, sampled", {"color": BLUE}),
    ):
        panel.plot(seen["step"], seen[name], label=label, **style)
    panel.set(xlabel="step", ylabel="share of problems", ylim=(0, 1.02))
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def reinforcement(figure: Any, jobs: Jobs, results: Mapping[str, Any]) -> None:
    panels = figure.subplots(2, 3, sharex=True)
    titles = {
        "accuracy": ("reward for accuracy", "mean"),
        "format": ("reward for the format", "mean"),
        "length": ("length of an answer", "tokens"),
        "kl": ("KL to the start", "nats per token"),
        "clipped": ("clip fraction", "share of tokens"),
        "entropy": ("entropy", "nats per token"),
    }
    for panel, (name, (title, unit)) in zip(panels.flat, titles.items(), strict=True):
        for job, (colour, style) in GRPO.items():
            if job in jobs and name in (curves := jobs[job]["curves"]):
                panel.plot(curves["step"], curves[name], style, color=colour, label=SHOWN[job])
        panel.set(title=title, ylabel=unit)
        if name in ("kl", "clipped", "entropy"):
            drawn = [y for line in panel.get_lines() for y in line.get_ydata()]
            panel.set_ylim(0, None if any(drawn) else 0.01)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    handles, labels = panels.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)


def last_stage(figure: Any, jobs: Jobs, results: Mapping[str, Any]) -> None:
    left, right = figure.subplots(1, 2)
    seen = jobs["reward-model"]["evaluations"]
    left.plot(seen["step"], seen["ordered"], "o-", color=BLUE, ms=4.5)
    left.set(title="reward model: held-out pairs in order", xlabel="step", ylabel="share")
    left.set_ylim(top=1.02)
    curves = jobs["last"]["curves"]
    for name, label, style in (
        ("model", "reward model", {"color": BLUE}),
        ("accuracy", "accuracy, by rule", {"color": ORANGE, "ls": "--"}),
        ("format", "format, by rule", {"color": GREEN, "ls": ":"}),
    ):
        right.plot(curves["step"], curves[name], label=label, **style)
    right.set(title="last stage: mean reward by part", xlabel="step", ylabel="reward")
    right.legend()


def accuracies(figure: Any, jobs: Jobs, results: Mapping[str, Any]) -> None:
    """A bar per job, for the kind of problems that it was asked."""
    rows = [
        (name, kind, found)
        for name in SHOWN
        if name in jobs
        for kind, found in jobs[name].get("held_out", {}).items()
    ]
    figure.set_size_inches(figure.get_figwidth(), 0.7 + 0.3 * len(rows))
    panel = figure.subplots()
    places = list(range(len(rows)))
    for how, colour, shift in (("greedy", ORANGE, 0.2), ("sampled", BLUE, -0.2)):
        found = [x[how] for _, _, x in rows]
        right = [x["accuracy"] for x in found]
        error = [
            [x["accuracy"] - x["low"] for x in found],
            [x["high"] - x["accuracy"] for x in found],
        ]
        panel.barh(
            [place - shift for place in places],
            right,
            0.38,
            xerr=error,
            color=colour,
            label=how,
            error_kw={"lw": 1, "capsize": 2, "ecolor": "#222222"},
        )
    labels = [f"{SHOWN[name]} ({kind})" for name, kind, _ in rows]
    panel.set(yticks=places, yticklabels=labels, xlim=(0, 1), xlabel="share of right answers")
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


PICTURES: Sequence[Picture] = (  # in the order of the report
    Picture(
        "pretraining",
        "Pre-training",
        "Losses of training and of held-out text, beside a bigram model of the training text. The "
        "MTP module reads the token between, and its loss leaves out a row's first tokens, which "
        "are the hardest. Right: the share of its drafts that the model chooses too, greedily.",
        ("base",),
        pretraining,
    ),
    Picture(
        "load",
        "Expert load",
        "Tokens per expert over the steps, as a share of the mean, and the max violation: without "
        "balancing some experts take most of the tokens.",
        ("base", "unbalanced"),
        load,
        (7.6, 4.6),
    ),
    Picture(
        "positions",
        "Loss by position before and after YaRN",
        "Held-out text; vertical lines at the original length and at those of the two phases. "
        "Without YaRN the loss rises behind the original length.",
        ("long",),
        positions,
    ),
    Picture(
        "sft",
        "Fine-tuning",
        "On problems of the training split. It stops at the first evaluation whose sampled "
        "accuracy leaves GRPO something to do.",
        ("sft",),
        fine_tuning,
        (7.6, 2.8),
    ),
    Picture(
        "grpo",
        "GRPO",
        "Three seeds; a run with one update a step in the place of four; and a control whose "
        "rewards change places within each group. Where a step has one update, ratios are 1 and "
        "nothing is clipped.",
        ("grpo-0",),
        reinforcement,
        (7.6, 4.6),
    ),
    Picture(
        "last",
        "Reward model and last stage",
        "The reward model prefers the tidier of two right solutions; in the last stage it speaks "
        "beside the rules, which show whether it is exploited.",
        ("reward-model", "last"),
        last_stage,
    ),
    Picture(
        "accuracies",
        "Accuracy on held-out problems",
        "Exact match, with 95 % intervals.",
        ("sft",),
        accuracies,
    ),
)
