"""``refimpl grads``."""

from __future__ import annotations

import hashlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import __version__
from ..checkpoint import Checkpoint
from ..checkpoint.tensor_file import read_tensor_file
from ..config import CONVENTIONS, Conventions, ModelConfig
from ..errors import CouldNotRun
from ..model import Route
from ..ops import IMPLEMENTATIONS
from ..streaming import ACTIVATIONS, EMBEDDING, Request, Result, Size, Stream
from ..tokenizer import HuggingFace
from .app import Json, app, check_writable, console, replace_json

File = Path | None
PARTS = ("attention", "norms", "gate", "experts", "shared, dense")


@app.command()
def grads(
    checkpoint: Annotated[
        Path, typer.Option(help="Folder with config.json and safetensors, as Hugging Face has them.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results: a new or empty one, or an unfinished run's.")],
    tokens: Annotated[File, typer.Option(help="Token ids [batch, time]: .npy or .json.")] = None,
    text: Annotated[str | None, typer.Option(help="A file or the text itself, for the checkpoint's tokenizer.")] = None,
    mask: Annotated[
        File, typer.Option(help="[batch, time] of 0 and 1: at which positions predicting the next token counts.")
    ] = None,
    key_mask: Annotated[File, typer.Option(help="[batch, time] of 0 and 1: 0 is padding, which nobody sees.")] = None,
    targets: Annotated[
        File, typer.Option(help="[batch, time]: what each position predicts (-100: nothing), not the next token.")
    ] = None,
    dlogits: Annotated[
        File, typer.Option(help="[batch, time, vocabulary], .npy: your loss's gradient; the backward alone.")
    ] = None,
    routes: Annotated[
        File, typer.Option(help="Choices of experts to replay: safetensors with aux/routes.L, or a result's folder.")
    ] = None,
    mtp: Annotated[bool, typer.Option("--mtp", help="Add the losses of the MTP modules.")] = False,
    mtp_weight: Annotated[float | None, typer.Option(help="λ of MTP, by default 0.3.")] = None,
    balance_alpha: Annotated[float, typer.Option(help="α of the balance loss; Hugging Face has none.")] = 0.0,
    layers: Annotated[int | None, typer.Option(help="Only so many layers, then final norm and head.")] = None,
    only: Annotated[str, typer.Option(help="Write the gradients whose names match, as *.self_attn.* does.")] = "*",
    activations: Annotated[
        str | None, typer.Option(help=f"Also write activations whose names match: {', '.join(ACTIVATIONS)}.")
    ] = None,
    logits: Annotated[bool, typer.Option("--logits/--no-logits", help="Write the logits.")] = True,
    convention: Annotated[str, typer.Option(help=f"Of {', '.join(CONVENTIONS)}.")] = "official",
    implementation: Annotated[
        str, typer.Option(help=f"Of {', '.join(IMPLEMENTATIONS)}; flash for long sequences.")
    ] = "reference",
    dtype: Annotated[str, typer.Option(help="The type to compute in: float32 or float64.")] = "float32",
    force: Annotated[bool, typer.Option("--force", help="Replace a result that is in the folder.")] = False,
    json_file: Json = None,
) -> None:
    """Compute the loss of a checkpoint and the gradient of every parameter, in the memory of one layer.

    The loss is Hugging Face's: the mean cross-entropy of the next token. Everything goes to files under the
    checkpoint's own names. A run that was killed goes on when the same command is given again.
    """
    for name, value, choices in (
        ("convention", convention, CONVENTIONS),
        ("implementation", implementation, IMPLEMENTATIONS),
        ("dtype", dtype, ("float32", "float64")),
    ):
        if value not in choices:
            raise CouldNotRun(f"--{name} must be one of {', '.join(choices)}, got {value}")
    for name, number in (("balance-alpha", balance_alpha), ("mtp-weight", mtp_weight or 0.0)):
        if not (number >= 0 and math.isfinite(number)):
            raise CouldNotRun(f"--{name} must be a number of at least 0, got {number}")
    if mtp_weight is not None and not mtp:
        raise CouldNotRun("--mtp-weight weighs the losses of --mtp, which is not given")
    if (tokens is None) == (text is None):
        raise CouldNotRun("give either --tokens FILE or --text TEXT")
    if json_file is not None:
        check_writable(json_file)
    source = Checkpoint.open(checkpoint, dtype=dtype, conventions=CONVENTIONS[convention], mtp=mtp)
    ids = _tokens(tokens, text, checkpoint)
    given_targets = None if targets is None else _integers(targets, "--targets")
    counts = None if mask is None else _booleans(mask, "--mask")
    if given_targets is not None:
        _expect_shape("--targets", given_targets, ids)
        if counts is not None:
            _expect_shape("--mask", counts, ids)
        counts = (given_targets != -100) if counts is None else counts & (given_targets != -100)
        given_targets = np.where(given_targets == -100, 0, given_targets)
    request = Request(
        ids, given_targets, counts, None if key_mask is None else _booleans(key_mask, "--key-mask"),
        None if dlogits is None else _numbers(dlogits), {} if routes is None else _routes(routes),
        mtp=mtp, mtp_weight=mtp_weight, balance_alpha=balance_alpha, layers=layers, only=only, activations=activations,
        logits=logits, implementation=implementation,
    )  # fmt: skip
    try:
        stream = Stream(source, request)
    except (ValueError, TypeError) as error:
        argument, space, wrong = str(error).partition(" ")
        raise CouldNotRun(f"--{argument.replace('_', '-')}{space}{wrong}") from error
    start = time.perf_counter()
    try:
        with _progress() as progress:
            result = stream.write(out, checkpoint=_fingerprint(checkpoint), force=force, progress=progress)
    except OSError as error:
        raise CouldNotRun(f"--out {out} can't be written: {error.strerror}") from error
    except MemoryError as error:
        raise CouldNotRun(f"not enough memory ({error}): give fewer tokens, or --implementation flash") from error
    seconds = time.perf_counter() - start
    console().print(f"refimpl {__version__}: {checkpoint}, {ids.shape[0]}×{ids.shape[1]} tokens, {dtype}", markup=False)
    _show(result, stream.config, convention)
    bad = [name for name, size in result.gradients.items() if not math.isfinite(size.squares)]
    verdict = f"{len(bad)} gradients are not finite, {bad[0]} the first" if bad else "all finite"
    total = _sum(list(result.gradients.values()))
    console().print(
        f"{len(result.gradients):,} gradients, {total.elements:,} numbers, norm {total.norm:.6g}, {verdict}; "
        f"{seconds:.1f} s; in {out}", markup=False,
    )  # fmt: skip
    if json_file is not None:
        given: dict[str, Any] = {"checkpoint": str(checkpoint), "out": str(out), "tokens": ids.shape, "dtype": dtype}
        given |= {
            "implementation": implementation,
            "convention": convention,
            "mtp": mtp,
            "layers": layers,
            "only": only,
        }
        content = {
            "ok": not bad, "seconds": round(seconds, 1), "settings": given, "config": asdict(stream.config),
            "versions": {"refimpl": __version__, "numpy": np.__version__}, "loss": result.loss, "main": result.main,
            "mtp": result.mtp, "balance": result.balance, "activations": result.activations,
            "loads": {layer: load.tolist() for layer, load in result.loads.items()},
            "gradients": {
                name: {"elements": size.elements, "norm": size.norm, "largest": size.largest}
                for name, size in result.gradients.items()
            },
        }  # fmt: skip
        replace_json(json_file, content)
    raise typer.Exit(int(bool(bad)))


def _show(result: Result, config: ModelConfig, convention: str) -> None:
    """The loss, how Hugging Face's conventions differ, and the sizes of the gradients by part."""
    out = console()
    out.print(f"conventions: {convention}; {_unlike_hf(config)}", markup=False)
    if result.loss is not None:
        parts = [f"main {result.main:.9g}"] + [f"MTP {k} {x:.9g}" for k, x in enumerate(result.mtp, 1)]
        parts += [f"balance {sum(result.balance.values()):.6g}"] if result.balance else []
        out.print(f"loss {result.loss:.9g}" + (f" ({', '.join(parts)})" if len(parts) > 1 else ""))
    table = Table(box=None, header_style="bold", pad_edge=False, title="norms of the gradients", title_justify="left")
    for title in ("part", *PARTS, "all", "largest |g|"):
        table.add_column(title, justify="left" if title == "part" else "right", no_wrap=True)
    found: dict[str, dict[str, list[Size]]] = {}
    for name, size in result.gradients.items():
        row, column = _place(name, config)
        found.setdefault(row, {}).setdefault(column, []).append(size)
    for row, columns in found.items():
        total = _sum([size for sizes in columns.values() for size in sizes])
        cells = [f"{_sum(columns[part]).norm:.3e}" if part in columns else "" for part in PARTS]
        table.add_row(row, *cells, f"{total.norm:.3e}", f"{total.largest:.3e}")
    out.print(table)


def _unlike_hf(config: ModelConfig) -> str:
    """Where Hugging Face's model computes something else, and what is the same if it does not."""
    ours, hf = config.conventions, CONVENTIONS["hf"]
    theirs = replace(config, conventions=hf)
    has_no_effect = {
        "gate_epsilon": not config.weight_rule[0],
        "softmax_normalise": config.weight_rule == theirs.weight_rule,
        "latent_eps": config.latent_eps == theirs.latent_eps,
        "yarn_when": config.active_yarn == theirs.active_yarn,
        "yarn_factor": config.rope_factor == theirs.rope_factor,
        "masked_groups": config.groups == 1,
        "balance_counts": config.balance_weight == 0,
        "bias_centre": True,  # nothing updates the biases
        "rope_layout": True,  # the weights', which the checkpoint says
    } | {f.name: config.mtp_depth == 0 for f in fields(Conventions) if f.name.startswith("mtp_")}
    other = [
        f"{f.name} {getattr(ours, f.name)!r}, hf {getattr(hf, f.name)!r}"
        for f in fields(Conventions)
        if getattr(ours, f.name) != getattr(hf, f.name) and not has_no_effect.get(f.name, False)
    ]
    return "other than hf: " + "; ".join(other) if other else "the same as hf here"


def _place(name: str, config: ModelConfig) -> tuple[str, str]:
    """The row and the column of the summary that a gradient counts in."""
    if not name.startswith("model.layers."):
        rows = {EMBEDDING: "embedding, head" if config.tied else "embedding", "lm_head.weight": "head"}
        return rows.get(name, "final norm"), ""
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    row = f"layer {layer}" if int(layer) < config.layers else f"MTP, layer {layer}"
    if "norm." in rest:
        return row, "norms"
    if rest.startswith("self_attn."):
        return row, "attention"
    if rest == "mlp.gate.weight":
        return row, "gate"
    if rest.startswith("mlp."):
        return row, "experts" if rest.startswith("mlp.experts.") else "shared, dense"
    return row, ""


def _sum(sizes: list[Size]) -> Size:
    largest = float(np.max([size.largest for size in sizes]))  # NaN, if one is
    return Size(sum(size.elements for size in sizes), sum(size.squares for size in sizes), largest)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function that moves a progress bar on a terminal's standard error."""
    columns = (TextColumn("gradients"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    description = TextColumn("{task.description}")
    shown = sys.stderr.isatty()
    with Progress(*columns, description, console=Console(stderr=True), transient=True, disable=not shown) as progress:
        task = progress.add_task("", total=None)

        def move(step: str, done: int, total: int) -> None:
            progress.update(task, description=step, completed=done, total=total)

        yield move


def _tokens(file: File, text: str | None, checkpoint: Path) -> np.ndarray:
    """Token ids [B, T], from a file or by the checkpoint's tokenizer."""
    if file is not None:
        return _integers(file, "--tokens")
    assert text is not None
    path = Path(text)
    try:
        if len(text) < 4096 and "\0" not in text and path.is_file():
            text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CouldNotRun(f"--text {path} must be UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise CouldNotRun(f"--text {path} can't be read: {error.strerror}") from error
    return np.array([HuggingFace(checkpoint).encode(text)], dtype=np.int64)


def _integers(path: Path, option: str) -> np.ndarray:
    x = _array(path, option)
    if x.dtype.kind not in "iu" or x.ndim != 2 or x.size == 0:
        raise CouldNotRun(f"{option} {path} must hold integers [batch, time], got {x.dtype} {list(x.shape)}")
    return x.astype(np.int64)


def _booleans(path: Path, option: str) -> np.ndarray:
    x = _array(path, option)
    if x.dtype.kind not in "biu" or x.ndim != 2 or not np.isin(x, (0, 1)).all():
        raise CouldNotRun(f"{option} {path} must hold 0 and 1 [batch, time], got {x.dtype} {list(x.shape)}")
    return x.astype(np.bool_)


def _numbers(path: Path) -> np.ndarray:
    x = _array(path, "--dlogits")
    if x.dtype.kind not in "fiu":
        raise CouldNotRun(f"--dlogits {path} must hold numbers [batch, time, vocabulary], got {x.dtype}")
    return x


def _array(path: Path, option: str) -> np.ndarray:
    """The array of a .npy or .json file."""
    try:
        if path.suffix == ".npy":
            x = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            x = np.array(json.loads(path.read_text(encoding="utf-8")))
        else:
            raise CouldNotRun(f"{option} {path} must be a .npy or a .json file")
    except OSError as error:
        raise CouldNotRun(f"{option} {path} can't be read: {error.strerror or error}") from error
    except (ValueError, EOFError, RecursionError, OverflowError) as error:
        raise CouldNotRun(f"{option} {path} is not an array: {str(error).splitlines()[0]}") from error
    if not isinstance(x, np.ndarray):  # an archive of arrays
        x.close()
        raise CouldNotRun(f"{option} {path} must hold one array")
    return x


def _expect_shape(option: str, x: np.ndarray, tokens: np.ndarray) -> None:
    if x.shape != tokens.shape:
        raise CouldNotRun(f"{option} must have the tokens' shape {tokens.shape}, got {x.shape}")


def _routes(path: Path) -> dict[int, Route]:
    """The choices in a file of ours, or of another implementation in the same form."""
    file = path / "aux.safetensors" if path.is_dir() else path
    tensors, _ = read_tensor_file(file)
    found = {}
    for name, x in tensors.items():
        layer = name.removeprefix("aux/routes.")
        if layer != name and layer.isdecimal():
            counted = tensors.get(f"aux/counted.{layer}")
            found[int(layer)] = Route(np.array(x), None if counted is None else np.array(counted))
    if not found:
        raise CouldNotRun(f"--routes {file} must hold aux/routes.L as int64 or int32, holds none")
    return found


def _fingerprint(checkpoint: Path) -> str:
    """Of the checkpoint's files: their names, sizes and times."""
    files = sorted([*checkpoint.glob("*.safetensors"), checkpoint / "config.json"])
    told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
