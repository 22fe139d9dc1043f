"""`refimpl generate` beside transformers' `generate`, on a random bfloat16 checkpoint: time to the
first token, tokens per second behind it, and memory. Not part of the package.

    python benchmarks/generation.py                      # V2-Lite's shape, 4 of its layers: 4.5 GB
    python benchmarks/generation.py --column ours --layers 2

Each column is a process of its own, one after another, and does what `refimpl generate` or
``from_pretrained(…).generate(…)`` does, greedily, from the same prompt. Both tell when each token
comes. A first run warms up (files, compiled kernels) and is not counted. The columns of
transformers need the extra ``oracle``, and as much memory as the weights have in their type; each
of its ways to run the experts has a line, except batched_mm, which copies an expert for every
token that goes there (V2-Lite's shape, 64 tokens: 6 GB for a layer's).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refimpl.checkpoint import Checkpoint, load_config, write_random
from refimpl.checkpoint.lazy import LazyParameters
from refimpl.config import CONVENTIONS
from refimpl.errors import CouldNotRun
from refimpl.generate import generate
from refimpl.kernels.columns import for_generation

OURS = {"reference": "float32", "numba_cpu": "float32"}  # implementation, and what it computes in
EXPERTS = ("eager", "grouped_mm")  # transformers' implementations
THEIRS = {f"transformers {dtype}": dtype for dtype in ("bfloat16", "float32")}
Times = Callable[[], tuple[list[float], list[int]]]


@dataclass
class Line:
    """One column with one way to run the experts."""

    column: str
    experts: str
    first: list[float]  # seconds to the first token, of each run
    rest: list[float]  # seconds from the first token to the last
    tokens: list[int]
    anonymous: int  # bytes that no file backs (RssAnon) at the end
    resident: int  # bytes, at their peak, with the files that are mapped (VmHWM)


def status(field: str) -> int:
    """Bytes of a field of this process's status."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    return 1024 * int(found[1]) if found else 0


def ours(
    implementation: str, folder: Path, prompt: list[int], count: int
) -> Iterator[tuple[str, Times]]:
    """As refimpl/cli/generate.py."""
    source = Checkpoint.open(
        folder, dtype=OURS[implementation], conventions=CONVENTIONS["hf"], mtp=False
    )
    params = LazyParameters(source, source.config, matrices=True)
    prefill, decode = for_generation(implementation)

    def run() -> tuple[list[float], list[int]]:
        times = [time.perf_counter()]
        (found,) = generate(
            params,
            source.config,
            [prompt],
            max_tokens=count,
            prefill=prefill,
            decode=decode,
            on_token=lambda row, token, finish: times.append(time.perf_counter()),
        )
        return times, found.tokens

    yield "", run


def theirs(
    dtype: str, folder: Path, prompt: list[int], count: int, ways: Sequence[str]
) -> Iterator[tuple[str, Times]]:
    """transformers with SDPA, and its experts in each of these ways."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.generation.streamers import BaseStreamer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    class Clock(BaseStreamer):
        """When each piece came: the prompt, then the tokens."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    ids = torch.tensor([prompt])
    length = {"max_new_tokens": count, "min_new_tokens": count}

    def run() -> tuple[list[float], list[int]]:
        clock = Clock()
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, streamer=clock, **length
            )
        return [start, *clock.times[1:]], out[0, len(prompt) :].tolist()

    for experts in ways:
        model.set_experts_implementation(experts)
        yield experts, run


def measure(given: argparse.Namespace) -> Iterator[Line]:
    """The lines of the column ``given.inside``, in this process."""
    column = given.inside
    asked = given.folder, random_prompt(given.folder, given.prompt), given.tokens
    if column in THEIRS:
        ways = theirs(THEIRS[column], *asked, given.experts or EXPERTS)
    else:
        ways = ours(column, *asked)
    for experts, run in ways:
        line = Line(column, experts, [], [], [], 0, 0)
        run()
        for _ in range(given.rounds):
            times, line.tokens = run()
            line.first.append(times[1] - times[0])
            line.rest.append(times[-1] - times[1])
        line.anonymous, line.resident = status("RssAnon"), status("VmHWM")
        yield line


def shown(line: dict[str, Any], prompt: int, before: dict[str, Any]) -> str:
    """A row of the table, the spread from the slowest run to the fastest; the last number is how
    many tokens are those of the line ``before``, up to the first that differs."""
    first = [prompt / seconds for seconds in line["first"]]
    rest = [(len(line["tokens"]) - 1) / seconds for seconds in line["rest"]]
    cells = [f"{line['column']} {line['experts']}".ljust(32)]
    for rates in (first, rest):
        cells.append(
            f"{statistics.median(rates):8.1f} ({min(rates):.1f}…{max(rates):.1f})".ljust(26)
        )
    cells.append(f"{line['anonymous'] / 1e9:6.2f} {line['resident'] / 1e9:9.2f}")
    pairs = enumerate(zip(line["tokens"], before["tokens"], strict=True))
    same = next((n for n, (a, b) in pairs if a != b), len(line["tokens"]))
    return " ".join([*cells, f"{same:9}"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="v2-lite", help="preset or config.json with the shapes")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--column", action="append", choices=[*OURS, *THEIRS])
    parser.add_argument(
        "--folder", type=Path, help="checkpoint to use; it is written if it does not exist"
    )
    parser.add_argument("--experts", action="append", choices=EXPERTS, help="of transformers")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", help=argparse.SUPPRESS)  # a column, in this very process
    given = parser.parse_args()
    if given.inside:
        for line in measure(given):
            print(json.dumps(asdict(line)), flush=True)
        return
    with tempfile.TemporaryDirectory(prefix="refimpl-generation-") as place:
        folder = given.folder or Path(place) / "checkpoint"
        if not folder.exists():
            whole = load_config(given.model)
            config = replace(whole, layers=given.layers, mtp_depth=0)
            write_random(
                replace(config, dense_layers=min(whole.dense_layers, given.layers)),
                folder,
                std=0.02,
            )
        stored = Checkpoint.open(folder, mtp=False).bytes
        threads = {name: str(given.threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        print(
            f"{given.folder or given.model}, {stored / 1e9:.2f} GB in bfloat16; prompt "
            f"{given.prompt}, {given.tokens} tokens, greedy, {given.threads} threads, "
            f"{given.rounds} runs"
        )
        print(
            f"{'':32} {'prompt, tokens/s':26} {'then, tokens/s':26} {'GB own':>6} {'resident':>9} "
            f"{'same tokens':>9}"
        )
        lines: list[dict[str, Any]] = []
        for column in given.column or columns():
            options = ["--inside", column, "--folder", folder]
            options += ["--prompt", given.prompt, "--tokens", given.tokens]
            options += ["--rounds", given.rounds]
            options += [part for way in given.experts or () for part in ("--experts", way)]
            done = subprocess.run(
                [sys.executable, __file__, *map(str, options)],
                env=os.environ | threads,
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            for row in done.stdout.splitlines():
                lines.append(json.loads(row))
                print(shown(lines[-1], given.prompt, lines[0]), flush=True)
    if given.json:
        about = {name: getattr(given, name) for name in ("model", "layers", "prompt", "threads")}
        given.json.write_text(json.dumps({"settings": about, "lines": lines}, indent=1) + "\n")


def random_prompt(folder: Path, length: int) -> list[int]:
    vocabulary = Checkpoint.open(folder, mtp=False).config.vocabulary
    return [int(token) for token in np.random.default_rng(0).integers(0, vocabulary, length)]


def columns() -> list[str]:
    """Those that can run here."""
    found = ["reference"]
    try:
        for_generation("numba_cpu")
        found.append("numba_cpu")
    except CouldNotRun as error:
        print(error, file=sys.stderr)
    if importlib.util.find_spec("transformers") is not None:
        found += THEIRS
    return found


if __name__ == "__main__":
    main()
