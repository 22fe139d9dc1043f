"""``refimpl memory``."""

from __future__ import annotations

import shutil
import sys
import tempfile
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer

from ..checkpoint import load_config, write_random
from ..errors import CouldNotRun
from ..files import read_json, write_json
from ..memory import attention_memory, head_memory, model_memory, process_memory
from .app import app, console

GRADS_BOUND = 6e9  # bytes, of V2-Lite's shape at 256 tokens in float32, however many layers

CHECK_BOUND = 0.2e9  # bytes, of `refimpl check` on any shape: what it reads is mapped


@app.command()
def memory(
    grads: Annotated[
        bool,
        typer.Option(
            "--grads",
            help="Measure `refimpl grads`, and `refimpl check` of its result, on a random "
            "checkpoint instead.",
        ),
    ] = False,
    model: Annotated[
        str, typer.Option(help="With --grads: preset or config.json with the shapes.")
    ] = "v2-lite",
    layers: Annotated[int, typer.Option(help="With --grads: number of layers to use.")] = 4,
    tokens: Annotated[int, typer.Option(help="With --grads: number of tokens.")] = 256,
    folder: Annotated[
        Path | None, typer.Option(help="With --grads: folder for temporary files.")
    ] = None,
) -> None:
    """Measure the peak memory of ops, a model, or `refimpl grads`.

    The ops are flash attention, and the output head fused with cross-entropy. Each line has the
    peak at T tokens, its ratio to the peak at T = 1024, and its share of the array that the op
    avoids. The model runs once with everything saved, and once with recompute: the backward
    computes each block's forward again. Each line has both peaks, and the time of the second run
    over that of the first. The last line says whether the bounds hold.
    """
    if grads:
        raise typer.Exit(_grads(model, layers, tokens, folder))
    out, holds = console(), True
    out.print(
        "flash attention, forward + backward, above the inputs (4 heads, widths 48/32, block "
        "128, float32)"
    )
    first = 0
    for a in attention_memory():
        first = first or a.peak
        share = a.peak / a.probabilities
        out.print(
            f"  T {a.length:>5}: {a.peak / 2**20:7.2f} MiB, {a.peak / first:5.2f} x T 1024, "
            f"{100 * share:6.2f} % of the probabilities' {a.probabilities / 2**20:.0f} MiB"
        )
        holds &= a.peak / first <= 4.6 and (a.length < 4096 or share <= 1 / 8)
    out.print("  bounds: 4.6 x from T 1024 to 4096; 12.5 % at T 4096")
    out.print(
        "output head + cross-entropy, forward + backward, beyond h, W, dh, dW (vocabulary "
        "129280, float32)"
    )
    first = 0
    for h in head_memory():
        first = first or h.peak
        out.print(
            f"  T {h.length:>5}: {h.peak / 2**20:7.2f} MiB, {h.peak / first:5.2f} x T 1024, "
            f"{100 * h.peak / h.logits:6.2f} % of the logits' {h.logits / 2**20:.0f} MiB"
        )
        holds &= h.peak <= 0.1 * h.logits and h.peak <= 1.05 * first
    out.print("  bounds: 10 % of the logits; flat in T (within 5 %)")
    out.print(
        "model, forward + backward, beyond parameters and gradients (512 tokens, width 128, 16 "
        "experts, float32)"
    )
    runs = list(model_memory())
    for kept, again in zip(runs[::2], runs[1::2], strict=True):
        out.print(
            f"  layers {kept.layers}: {kept.peak / 2**20:6.2f} MiB, with recompute "
            f"{again.peak / 2**20:6.2f} MiB, {again.seconds / kept.seconds:4.2f} x the time"
        )
    grown, inputs = (getattr(runs[-1], key) - getattr(runs[1], key) for key in ("peak", "inputs"))
    holds &= grown <= 2 * inputs
    out.print(
        f"  each further layer with recompute: {grown / inputs:.2f} x its input [B, T, D]; bound 2"
    )
    out.print("holds" if holds else "DOES NOT HOLD")
    raise typer.Exit(int(not holds))


class GradsMemory(NamedTuple):
    peak: int  # bytes that no file backs (RssAnon), the interpreter's included
    seconds: float
    numbers: int  # of all gradients


# `refimpl grads` in a process where nothing is written through to the disk
WITHOUT_SYNC = """
import os
os.fsync = lambda descriptor: None
from refimpl.cli import main
main()
"""


def grads_memory(
    checkpoint: Path, out: Path, *options: str, tokens: int = 256, sync: bool = True
) -> GradsMemory:
    """Run ``refimpl grads`` on random tokens, this many, in a process of its own; without ``sync``
    the system writes to the disk when it likes to."""
    vocabulary = read_json(checkpoint / "config.json")["vocab_size"]
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, tokens))
    ids_file = out.with_name(f"{out.name}-tokens.json")
    report = out.with_name(f"{out.name}-report.json")
    write_json(ids_file, ids.tolist())
    command = [sys.executable, *(["-m", "refimpl"] if sync else ["-c", WITHOUT_SYNC])]
    command += ["grads", "--checkpoint", str(checkpoint)]
    command += ["--out", str(out), "--tokens", str(ids_file), "--json", str(report), *options]
    found = process_memory(command)
    numbers = sum(size["elements"] for size in read_json(report)["gradients"].values())
    return GradsMemory(found.peak, found.seconds, numbers)


class CheckMemory(NamedTuple):
    peak: int  # bytes that no file backs (RssAnon), the interpreter's included
    seconds: float
    largest: int  # bytes of the largest tensor
    stored: int  # bytes of all files of one side


def check_memory(truth: Path) -> CheckMemory:
    """Run ``refimpl check`` in a process of its own, on a port that holds the files of ``truth``,
    in several shards. Measuring units would take six times the run: they are set to a rounding
    of each tensor's largest number, since a size of theirs changes no memory."""
    index = read_json(truth / "index.json")
    index["metadata"]["units"] = {"types": ["float32"]}
    largest = 0
    for told in index["tensors"].values():
        if told.get("dtype") == "float32":
            told["units"] = {"float32": 2.0**-24 * told["scale"]}
            largest = max(largest, 4 * prod(told["shape"]))
    write_json(truth / "index.json", index)
    theirs = truth.with_name(f"{truth.name}-theirs")
    theirs.mkdir()
    for file in truth.glob("*.safetensors"):
        (theirs / file.name).hardlink_to(file)
    stored = sum(file.stat().st_size for file in theirs.iterdir())
    command = [sys.executable, "-m", "refimpl", "check", str(theirs), "--against", str(truth)]
    found = process_memory(command)
    shutil.rmtree(theirs)
    return CheckMemory(found.peak, found.seconds, largest, stored)


def _grads(model: str, layers: int, tokens: int, folder: Path | None) -> int:
    """The peak of `refimpl grads` on a random bfloat16 checkpoint; the exit code."""
    whole, out = load_config(model), console()
    if not 1 <= layers <= whole.layers or tokens < 2:
        raise CouldNotRun(
            f"--layers must lie in 1…{whole.layers} and --tokens be at least 2, got {layers}, "
            f"{tokens}"
        )
    config = replace(
        whole, layers=layers, dense_layers=min(whole.dense_layers, layers), mtp_depth=0
    )
    try:
        place = Path(tempfile.mkdtemp(prefix="refimpl-memory-", dir=folder))
    except OSError as error:
        raise CouldNotRun(f"--folder {folder} can't be written: {error.strerror}") from error
    try:
        write_random(config, place / "checkpoint")
        stored = sum(file.stat().st_size for file in (place / "checkpoint").iterdir())
        found = grads_memory(place / "checkpoint", place / "grads", tokens=tokens)
        made = sum(file.stat().st_size for file in (place / "grads").iterdir())
        checked = check_memory(place / "grads")
        shutil.rmtree(place / "grads")
        unsynced = grads_memory(place / "checkpoint", place / "unsynced", tokens=tokens, sync=False)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    out.print(
        f"refimpl grads: {model}, {layers} of {whole.layers} layers, 1×{tokens} tokens, "
        "bfloat16 to float32"
    )
    out.print(
        f"  checkpoint {stored / 1e9:.2f} GB, {found.numbers:,} gradients in {made / 1e9:.2f} "
        "GB of files"
    )
    out.print(
        f"  peak RssAnon {found.peak / 1e9:.2f} GB, {found.seconds:.0f} s; bound "
        f"{GRADS_BOUND / 1e9:.0f} GB"
    )
    out.print(
        f"  written through to the disk (fsync) {found.seconds:.1f} s, without "
        f"{unsynced.seconds:.1f} s"
    )
    out.print(
        f"refimpl check of these gradients: peak RssAnon {checked.peak / 1e9:.2f} GB, "
        f"{checked.seconds:.0f} s; the largest tensor has {checked.largest / 1e9:.2f} GB, all "
        f"{checked.stored / 1e9:.2f} GB; bound {CHECK_BOUND / 1e9:.1f} GB"
    )
    out.print(
        f"  all of it: refimpl memory --grads --model {model} --layers {whole.layers} --folder …"
    )
    holds = found.peak <= GRADS_BOUND and checked.peak <= CHECK_BOUND
    out.print("holds" if holds else "DOES NOT HOLD")
    return int(not holds)
