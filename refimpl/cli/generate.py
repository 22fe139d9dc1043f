"""``refimpl generate``."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from ..checkpoint import Checkpoint
from ..checkpoint.config_json import stop_tokens
from ..checkpoint.lazy import LazyParameters
from ..config import CONVENTIONS
from ..errors import CouldNotRun
from ..files import read_json, read_text
from ..generate import Generation, check_request, generate
from ..kernels.columns import (
    COLUMNS,
    ON_CPU,
    expect_backend,
    expect_dtype,
    for_generation,
    placement,
)
from ..memory import available_memory
from ..parameters import is_buffer
from ..tokenizer import Bytes, HuggingFace, TextStream, Tokenizer
from ..train.stage import checkpoint_of
from ..train.vocabulary import tokenizer_json
from .app import (
    CONVENTION,
    Json,
    app,
    check_writable,
    counted,
    expect_choice,
    refused,
    replace_json,
)
from .inputs import token_lists


@app.command("generate")
def generate_command(
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="Folder with config.json and safetensors, or of a finished run of training."
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option(help="A text to continue; may be given several times.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="More texts: a .json file with a list of them, or one text per line."),
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="Prompts as token ids: .json or .npy, one list or several. The output is ids too."
        ),
    ] = None,
    bytes_: Annotated[
        bool, typer.Option("--bytes", help="Take bytes as tokens, without a tokenizer.json.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to add to each prompt.")] = 100,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits; 0: always the most probable token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(help="Draw from the fewest tokens whose probabilities sum to at least this."),
    ] = 1.0,
    seed: Annotated[
        int, typer.Option(help="Seed of the first prompt; each next prompt adds 1.")
    ] = 0,
    stop: Annotated[
        list[int] | None,
        typer.Option(help="Token id to stop at; by default the checkpoint's eos_token_id."),
    ] = None,
    speculate: Annotated[
        int,
        typer.Option(
            help="Number of tokens that the MTP modules draft; with more tokens than modules, the "
            "last module drafts on. The output does not change."
        ),
    ] = 0,
    dtype: Annotated[
        str,
        typer.Option(
            help="Type to compute in: float32, float64, or bfloat16 (needs --implementation cuda)."
        ),
    ] = "float32",
    backend: Annotated[str, typer.Option(help="numpy, or cupy for a GPU.")] = "numpy",
    implementation: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join((*ON_CPU, *COLUMNS))}; numba_cpu is the fastest without a "
            "GPU, cuda with one."
        ),
    ] = "reference",
    convention: Annotated[str, typer.Option(help=CONVENTION)] = "official",
    json_file: Json = None,
) -> None:
    """Continue prompts with a checkpoint.

    A single prompt is shown token by token; of several, each is shown when it is finished. A
    summary goes to standard error. The weights stay in the files' own type in the system's file
    cache; weights that do not fit there are read from the disk when they are used. With a GPU, all
    weights are in its memory.
    """
    expect_choice("convention", convention, CONVENTIONS)
    expect_choice("backend", backend, ("numpy", "cupy"))
    expect_choice("implementation", implementation, (*ON_CPU, *COLUMNS))
    expect_backend(backend, implementation)
    expect_dtype(dtype, implementation)
    if json_file is not None:
        check_writable(json_file)
    checkpoint = checkpoint_of(checkpoint)
    source = Checkpoint.open(
        checkpoint,
        dtype="float32" if dtype == "bfloat16" else dtype,
        conventions=CONVENTIONS[convention],
        mtp=speculate != 0,
    )
    tokenizer: Tokenizer | None = None
    if tokens is None:
        tokenizer = (
            bytes_of(checkpoint)
            if bytes_
            else HuggingFace(checkpoint, "token ids with --tokens FILE, or --bytes")
        )
    elif prompt or prompts or bytes_:
        raise CouldNotRun("--tokens cannot be combined with --prompt, --prompts or --bytes")
    texts = (prompt or []) + (read_prompts(prompts) if prompts else [])
    for row, text in enumerate(texts):
        if not text or any("\ud800" <= character <= "\udfff" for character in text):
            raise CouldNotRun(f"prompt {row} is {'not UTF-8' if text else 'empty'}")
    given = (
        token_lists(tokens, "--tokens")
        if tokens is not None
        else [tokenizer.encode(t) for t in texts if tokenizer]
    )
    if not given:
        raise CouldNotRun("give at least one --prompt TEXT, --prompts FILE or --tokens FILE")
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
        "speculate": speculate,
        "stop": [t for t in stop_tokens(checkpoint) if t < source.config.vocabulary]
        if stop is None
        else stop,
    }
    with refused({"prompt": "prompt"}):  # of that number, wherever it came from
        check_request(source.config, given, **options)
        place = placement(backend)
        prefill, decode = for_generation(implementation, dtype)
        params: Mapping[str, Any] = LazyParameters(source, source.config, matrices=True)
        if place is not None:
            params = on_device(source, dtype, place)
        elif line := short_of_memory(source):
            print(line, file=sys.stderr)
        output, begin = Output(tokenizer, len(given)), time.perf_counter()
        try:
            found = generate(
                params,
                source.config,
                given,
                **options,
                prefill=prefill,
                decode=decode,
                on_token=output,
            )
        except MemoryError as error:
            raise CouldNotRun(f"not enough memory for so many tokens ({error})") from error
    if source.config.index_topk is not None:
        print(
            f"indexers left out: with up to {source.config.index_topk:,} tokens they choose every "
            "key",
            file=sys.stderr,
        )
    print(summary(found, time.perf_counter() - begin), file=sys.stderr)
    if json_file is not None:
        names = ("tokens", "finish", "forwards", "drafted", "accepted")
        results = [
            {"prompt": list(p), **{name: getattr(g, name) for name in names}}
            | ({} if tokenizer is None else {"text": tokenizer.decode(g.tokens)})
            for p, g in zip(given, found, strict=True)
        ]
        settings = options | {
            "checkpoint": str(checkpoint),
            "dtype": dtype,
            "backend": backend,
            "implementation": implementation,
            "convention": convention,
        }
        replace_json(json_file, {"settings": settings, "results": results})


def on_device(source: Checkpoint, dtype: str, place: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """All parameters on the device, one after the other; gates' biases are always float32."""
    return {
        name: place(x if is_buffer(name) else x.astype(dtype))
        for name in source.names
        for x in [source.tensor(name)]
    }


def bytes_of(checkpoint: Path) -> Bytes:
    """Bytes as tokens; CouldNotRun if the checkpoint's tokenizer.json has other tokens."""
    file = checkpoint / "tokenizer.json"
    if file.is_file() and read_json(file) != tokenizer_json():
        raise CouldNotRun(f"--bytes cannot be used: the tokens of {file} are not bytes")
    return Bytes()


def short_of_memory(source: Checkpoint) -> str:
    """A line for files that do not fit in memory, else nothing."""
    at_hand = available_memory()
    if at_hand is None or source.bytes <= at_hand:
        return ""
    return (
        f"the weights have {source.bytes / 1e9:.3g} GB, but only {at_hand / 1e9:.3g} GB of memory "
        "are free: weights are read from the disk again and again"
    )


class Output:
    """Shows the tokens of one prompt on standard output as they come, those of several prompts as
    each prompt is finished."""

    def __init__(self, tokenizer: Tokenizer | None, prompts: int) -> None:
        self.tokenizer, self.prompts = tokenizer, prompts
        self.streams = [
            None if tokenizer is None else TextStream(tokenizer) for _ in range(prompts)
        ]
        self.shown = [""] * prompts
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(
                errors="backslashreplace"
            )  # a terminal that lacks a character stops nothing

    def __call__(self, row: int, token: int, finish: str) -> None:
        stream = self.streams[row]
        piece = f"{token} " if stream is None else stream.add(token)
        if finish:
            piece = piece.rstrip(" ") if stream is None else piece + stream.rest()
            piece += "\n"
        if self.prompts == 1:
            print(piece, end="", flush=True)
            return
        self.shown[row] += piece
        if finish:
            print(f"[{row}] {self.shown[row]}", end="", flush=True)


def summary(found: list[Generation], seconds: float) -> str:
    """The numbers of prompts and tokens, the speed, and the share of accepted drafts."""
    tokens, forwards = sum(len(g.tokens) for g in found), sum(g.forwards for g in found)
    drafted, accepted = sum(g.drafted for g in found), sum(g.accepted for g in found)
    line = f"{counted(len(found), 'prompt')}, {counted(tokens, 'token')}, {seconds:.1f} s, "
    line += f"{tokens / seconds:.1f} tokens per second"
    if drafted:
        line += (
            f"; {accepted} of {counted(drafted, 'draft')} accepted "
            f"({100 * accepted / drafted:.1f} %), {(tokens - len(found)) / forwards:.2f} "
            "tokens per forward of the main model"
        )
    return line


def read_prompts(path: Path) -> list[str]:
    """The texts of a file: a JSON list of strings, or one text per line."""
    if path.suffix == ".json":
        texts = read_json(path, f"--prompts {path}")
        if not (isinstance(texts, list) and all(isinstance(text, str) for text in texts)):
            raise CouldNotRun(f"--prompts {path} must hold a list of strings")
        return texts
    return read_text(path, f"--prompts {path}").removesuffix("\n").split("\n")
