"""``refimpl grads``."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from .. import __version__
from ..checkpoint import Checkpoint
from ..checkpoint.names import layer_of
from ..checkpoint.source import Source
from ..config import CONVENTIONS, Conventions, ModelConfig
from ..errors import CouldNotRun
from ..grads import (
    ACTIVATIONS,
    INNER,
    SPEC,
    UNITS,
    Request,
    Result,
    Size,
    check_shared,
    shared_gradients,
    write_gradients,
)
from ..kernels.columns import COLUMNS, IN_FP8, ON_CPU, expect_recipe
from ..parallel.ranks import Ranks
from ..parameters import (
    DENSE,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    HEAD,
    attention_shapes,
    is_stacked,
    layer_name,
)
from .app import (
    CONVENTION,
    Json,
    app,
    check_writable,
    console,
    counted,
    expect_choice,
    progress,
    refused,
    replace_json,
)
from .inputs import booleans, integers, numbers, read_grpo, read_routes, text_tokens
from .ranks import ContextParallel, DataParallel, ExpertParallel, RankCount, Timeout, joined

File = Path | None
PARTS = ("attention", "norms", "gate", "experts", "shared, dense")


@app.command()
def grads(
    checkpoint: Annotated[
        Path,
        typer.Option(help="Folder with config.json and safetensors, in Hugging Face's layout."),
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the results: new, empty, or of the run to resume.")
    ],
    tokens: Annotated[
        File, typer.Option(help="Token ids [batch, time] or [time]: .npy or .json.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Instead of token ids: a text, or a file of one, to tokenize."),
    ] = None,
    mask: Annotated[
        File,
        typer.Option(
            help="[batch, time] of 0 and 1: 1 where the prediction of the next token counts, as "
            "in fine-tuning on the answers alone."
        ),
    ] = None,
    key_mask: Annotated[
        File, typer.Option(help="[batch, time] of 0 and 1: 0 is padding, which attention skips.")
    ] = None,
    targets: Annotated[
        File,
        typer.Option(
            help="[batch, time]: the token that each position predicts instead of the next one; "
            "-100: none."
        ),
    ] = None,
    dlogits: Annotated[
        File,
        typer.Option(
            help="[batch, time, vocabulary], .npy: the gradient of your own loss in the logits; "
            "only the backward uses it."
        ),
    ] = None,
    positions: Annotated[
        File,
        typer.Option(
            help="[batch, time] or [time]: the position of each token, for RoPE; by default from 0."
        ),
    ] = None,
    segments: Annotated[
        File,
        typer.Option(
            help="[batch, time]: the number of each token's document; attention stays within one."
        ),
    ] = None,
    grpo: Annotated[
        File,
        typer.Option(
            help="GRPO's loss instead: safetensors with mask [batch, time] (1 where the next token "
            "is part of an output), advantages [batch] and, if needed, old_log_prob and "
            "reference_log_prob [batch, time]. The metadata's key settings has, as JSON, the op's "
            "settings (derivations/grpo.md), temperature, and preset."
        ),
    ] = None,
    routes: Annotated[
        File,
        typer.Option(
            help="Choices of experts to replay: safetensors with aux/routes.L (L: the layer), or "
            "the folder of a result."
        ),
    ] = None,
    mtp: Annotated[bool, typer.Option("--mtp", help="Add the losses of the MTP modules.")] = False,
    mtp_weight: Annotated[
        float | None, typer.Option(help="λ, the weight of those losses; by default 0.3.")
    ] = None,
    balance_alpha: Annotated[
        float, typer.Option(help="α, the weight of the balance loss; Hugging Face's loss has none.")
    ] = 0.0,
    layers: Annotated[
        int | None, typer.Option(help="Use only this many first layers, then norm and head.")
    ] = None,
    only: Annotated[
        str, typer.Option(help="Write the gradients whose names match, as in *.self_attn.*.")
    ] = "*",
    activations: Annotated[
        str | None,
        typer.Option(
            help="Also write the activations whose names match, and their gradients: "
            f"{', '.join(ACTIVATIONS)}; inside attention, if the pattern contains self_attn.: "
            f"{', '.join(name.rpartition('.')[2] for name in INNER)}."
        ),
    ] = None,
    logits: Annotated[bool, typer.Option("--logits/--no-logits", help="Write the logits.")] = True,
    units: Annotated[
        str,
        typer.Option(
            help=f"Types, of {','.join(UNITS)}: also measure how far a right implementation in "
            "each type errs, for each tensor, in 6 reruns. `refimpl check` needs these units."
        ),
    ] = "",
    split: Annotated[
        str | None,
        typer.Option(
            help=f"Also take the batch in parts: {SPEC}. rows gives the number of rows of each "
            "part, positions the places at which sequences are cut; R is by default the number of "
            "parts. Every part's gradients are written, for each term of the loss. The whole model "
            "is in memory."
        ),
    ] = None,
    convention: Annotated[str, typer.Option(help=CONVENTION)] = "official",
    backend: Annotated[
        str, typer.Option(help="numpy, or cupy: each op moves its arrays to a GPU.")
    ] = "numpy",
    implementation: Annotated[
        str,
        typer.Option(
            help=f"One of {', '.join((*ON_CPU, IN_FP8, *COLUMNS))}: flash for long sequences, "
            "numba_cpu for long sequences and speed, cuda on a GPU; fp8 emulates V3's FP8 training."
        ),
    ] = "reference",
    fp8: Annotated[
        str,
        typer.Option(
            help="Choices of --implementation fp8, as in scale=ue8m0,promote=0. floor: of a tile's "
            "largest number, 1e-4. scale: float32 or ue8m0. promote: terms until a sum goes on in "
            "float32, 128; 0: never. bits: of a tensor core's sum, as 14; 0: float32's. "
            "weight_input: what is quantised for the weights' gradients, kept or exact."
        ),
    ] = "",
    dtype: Annotated[str, typer.Option(help="Type to compute in: float32 or float64.")] = "float32",
    force: Annotated[
        bool, typer.Option("--force", help="Replace the result in the folder.")
    ] = False,
    ranks: RankCount = None,
    data_parallel: DataParallel = None,
    context_parallel: ContextParallel = 1,
    expert_parallel: ExpertParallel = 1,
    timeout: Timeout = 300.0,
    json_file: Json = None,
) -> None:
    """Compute the gradient of every parameter of a checkpoint.

    The loss is Hugging Face's, the mean cross-entropy of the next token, with --mask over the
    answers alone (SFT); or GRPO's. Memory holds one layer at a time. Every gradient goes to a file,
    under its parameter's name in the checkpoint. If interrupted, run the same command again: it
    resumes where it stopped. `refimpl check` compares a port with the result, if it has --units.

    The table has a row per layer. Each column has the norm of the gradient of one part of it; the
    last two columns are of the whole layer. |g| is the absolute value of one number of a gradient.
    With --split there is also a line per term of the loss with its right value. The lines below it
    have the value by each wrong divisor.
    """
    expect_choice("convention", convention, CONVENTIONS)
    expect_choice("backend", backend, ("numpy", "cupy"))
    expect_choice("implementation", implementation, (*ON_CPU, IN_FP8, *COLUMNS))
    expect_choice("dtype", dtype, ("float32", "float64"))
    recipe = expect_recipe(fp8, implementation)
    for argument, number in (("balance_alpha", balance_alpha), ("mtp_weight", mtp_weight or 0.0)):
        if not (number >= 0 and math.isfinite(number)):
            raise CouldNotRun(f"must be a number of at least 0, got {number}", argument=argument)
    if mtp_weight is not None and not mtp:
        raise CouldNotRun("--mtp-weight needs --mtp, whose losses it weighs")
    if (tokens is None) == (text is None):
        raise CouldNotRun("give either --tokens FILE or --text TEXT")
    if json_file is not None:
        check_writable(json_file)
    source = Checkpoint.open(checkpoint, dtype=dtype, conventions=CONVENTIONS[convention], mtp=mtp)
    ids = (
        integers(tokens, "--tokens") if tokens is not None else text_tokens(text or "", checkpoint)
    )
    predicted, counted_at = _predicted(targets, mask, ids)
    logits_shape = (*ids.shape, source.config.vocabulary)
    request = Request(
        ids,
        predicted,
        counted_at,
        None if key_mask is None else booleans(key_mask, "--key-mask", ids.shape),
        None if dlogits is None else numbers(dlogits, "--dlogits", logits_shape),
        {} if routes is None else read_routes(routes),
        mtp=mtp,
        mtp_weight=mtp_weight,
        balance_alpha=balance_alpha,
        layers=layers,
        only=only,
        activations=activations,
        logits=logits,
        implementation=implementation,
        backend=backend,
        fp8=recipe,
        positions=None if positions is None else _row(integers(positions, "--positions")),
        segments=None if segments is None else integers(segments, "--segments"),
        grpo=None if grpo is None else read_grpo(grpo),
        split=split,
        units=tuple(units.split(",")) if units else (),
    )
    said = {} if text is None else {"tokens": "--text: its tokens"}
    with refused(said if grpo is None else said | {"mask": "--grpo: its mask"}):
        request.check(source)
    together = joined(ranks, data_parallel, context_parallel, expert_parallel, timeout)
    config, start = request.config(source.config), time.perf_counter()
    if together is not None:
        check_shared(request)
        if together.rank:
            shared_gradients(source, request, together)
            return
    result = _write(source, request, checkpoint, out, force, together)
    seconds = time.perf_counter() - start
    console().print(
        f"refimpl {__version__}: {checkpoint}, {ids.shape[0]}×{ids.shape[1]} tokens, {dtype}"
    )
    after_padding = request.targets_after_padding(config)
    _show(result, config, convention, after_padding)
    if result.split is not None:
        _show_split(result.split)
    bad = [name for name, size in result.gradients.items() if not math.isfinite(size.largest)]
    console().print(f"{_verdict(result, bad)}; {seconds:.1f} s; in {out}")
    if json_file is not None:
        given = {
            "checkpoint": str(checkpoint),
            "out": str(out),
            "tokens": ids.shape,
            "dtype": dtype,
            "backend": backend,
            "implementation": implementation,
            "fp8": request.about(config)["fp8"],
            "convention": convention,
            "mtp": mtp,
            "layers": layers,
            "only": only,
        }
        about = {
            "ok": not bad,
            "seconds": round(seconds, 1),
            "settings": given,
            "config": asdict(config),
            "versions": {"refimpl": __version__, "numpy": np.__version__},
        }
        replace_json(json_file, about | _content(result))
    raise typer.Exit(int(bool(bad)))


def _row(x: np.ndarray) -> np.ndarray:
    """A single row as the positions of every row."""
    return x[0] if len(x) == 1 else x


def _predicted(
    targets: File, mask: File, ids: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The targets, or None for the next tokens, and the mask of what counts; -100 among the targets
    does not."""
    counts = None if mask is None else booleans(mask, "--mask", ids.shape)
    if targets is None:
        return None, counts
    found = integers(targets, "--targets")
    if found.shape != ids.shape:
        raise CouldNotRun(
            f"must have the tokens' shape {ids.shape}, got {found.shape}", argument="targets"
        )
    counts = (found != -100) if counts is None else counts & (found != -100)
    return np.where(found == -100, 0, found), counts


def _write(
    source: Source, request: Request, checkpoint: Path, out: Path, force: bool, ranks: Ranks | None
) -> Result:
    """Do the work, with a bar on a terminal."""
    fingerprint = _fingerprint(checkpoint)
    try:
        with progress("gradients") as move:
            return write_gradients(
                source,
                request,
                out,
                checkpoint=fingerprint,
                origin=checkpoint,
                force=force,
                progress=move,
                shared=None if ranks is None else partial(shared_gradients, source, request, ranks),
            )
    except OSError as error:
        raise CouldNotRun(
            f"{out} can't be written: {error.strerror or error}", argument="out"
        ) from error
    except MemoryError as error:
        raise CouldNotRun(
            f"not enough memory ({error}): give fewer tokens, or --implementation flash"
        ) from error


def _verdict(result: Result, bad: list[str]) -> str:
    """How many gradients there are, their norm, and whether they are finite."""
    total = _sum(list(result.gradients.values()))
    verdict = "all finite"
    if bad:
        verdict = (
            f"{counted(len(bad), 'gradient')} {'is' if len(bad) == 1 else 'are'} not finite, "
            f"{bad[0]} the first"
        )
    return (
        f"{counted(len(result.gradients), 'gradient')}, {total.elements:,} numbers, norm "
        f"{total.norm:.6g}, {verdict}"
    )


def _content(result: Result) -> dict[str, Any]:
    """What the file of --json says of the result."""
    return {
        "loss": result.loss,
        "main": result.main,
        "mtp": result.mtp,
        "balance": result.balance,
        "activations": result.activations,
        "split": result.split,
        "loads": {layer: load.tolist() for layer, load in result.loads.items()},
        "gradients": {
            name: {"elements": size.elements, "norm": size.norm, "largest": size.largest}
            for name, size in result.gradients.items()
        },
    }


def _show(result: Result, config: ModelConfig, convention: str, after_padding: bool) -> None:
    """The loss, how Hugging Face's conventions differ, and the sizes of the gradients by part."""
    out = console()
    unlike = _unlike_hf(config, after_padding)
    out.print(f"conventions: {convention}; {unlike}")
    if config.index_topk is not None:
        out.print(
            f"indexers left out: with up to {config.index_topk:,} tokens they choose every key"
        )
    if result.loss is not None:
        parts = [f"main {result.main:.9g}"] + [
            f"MTP {k} {x:.9g}" for k, x in enumerate(result.mtp, 1)
        ]
        parts += [f"balance {sum(result.balance.values()):.6g}"] if result.balance else []
        out.print(f"loss {result.loss:.9g}" + (f" ({', '.join(parts)})" if len(parts) > 1 else ""))
    table = Table(
        box=None,
        header_style="bold",
        pad_edge=False,
        title="norms of the gradients",
        title_justify="left",
    )
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


def _show_split(split: dict[str, Any]) -> None:
    """The parts, and the loss of each term under every rule; what agrees with the right one can't
    show in this split."""
    out, counts = console(), split["counts"]
    kind = "pieces of sequences" if split["pieces"] else "micro-batches"
    out.print(
        f"split {split['spec']}: {len(split['shapes'])} {kind}, {split['ranks']} ranks; "
        "losses with λ and α"
    )
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("part", "shape", *(f"{term} counts" for term in counts)):
        table.add_column(title, justify="right", no_wrap=True)
    for part, (rows, length) in enumerate(split["shapes"]):
        shape = f"{rows}×{length - split['follow'][part]}"
        cells = [f"{count['own'][part]:g}" for count in counts.values()]
        table.add_row(str(part), shape, *cells)
    out.print(table)
    for term, rules in split["rules"].items():
        losses = {
            rule: math.fsum(c * x for c, x in zip(factors, split["sums"][term], strict=True))
            for rule, factors in rules.items()
        }
        right = losses.pop("right")
        losses.pop("left out", None)
        out.print(f"{term}: right {right:.9g}" if any(rules["right"]) else f"{term}:")
        for rule, loss in losses.items():
            same = np.allclose(rules[rule], rules["right"], rtol=1e-9)
            out.print(f"  {rule}: " + ("can't show here" if same else f"{loss:.9g}"))


def _unlike_hf(config: ModelConfig, after_padding: bool) -> str:
    ours, hf = config.conventions, CONVENTIONS["hf"]
    other = [
        f"{name} {getattr(ours, name)!r}, hf {getattr(hf, name)!r}"
        for name in differing(config, hf, after_padding=after_padding)
    ]
    return "differs from hf: " + "; ".join(other) if other else "the same as hf here"


def differing(config: ModelConfig, other: Conventions, *, after_padding: bool = False) -> list[str]:
    """The fields of the config's conventions that ``other`` has otherwise and that change this
    model's gradients; ``after_padding``: of a batch that has targets right behind padding."""
    ours = config.conventions

    def derived(conventions: Conventions) -> list[object]:
        model = replace(config, conventions=conventions)
        return [model.weight_rule, model.latent_eps, model.active_yarn, model.rope_factor]

    matters = {
        name: derived(ours) != derived(replace(ours, **{name: getattr(other, name)}))
        or derived(other) != derived(replace(other, **{name: getattr(ours, name)}))
        for name in ("softmax_normalise", "latent_eps", "yarn_when", "yarn_factor")
    }
    matters |= {
        f.name: config.mtp_depth > 0 for f in fields(Conventions) if f.name.startswith("mtp_")
    }
    matters |= {
        "target_after_padding": after_padding,
        "blind_query": False,  # matters where a target behind padding counts
        "gate_epsilon": config.weight_rule[0],
        "masked_groups": config.keep_groups < config.groups,
        "softmax_ranking": config.gate == "softmax" and config.keep_groups < config.groups,
        "balance_counts": config.balance_weight > 0,
        "bias_centre": False,  # nothing updates the biases
        "rope_layout": False,  # the weights', which the checkpoint says
    }
    return [
        f.name
        for f in fields(Conventions)
        if matters[f.name] and getattr(ours, f.name) != getattr(other, f.name)
    ]


def _place(name: str, config: ModelConfig) -> tuple[str, str]:
    """The row and the column of the summary that a gradient counts in."""
    layer = layer_of(name)
    if layer is None:
        embedding = "embedding, head" if config.tied else "embedding"
        return {EMBEDDING: embedding, FINAL_NORM: "final norm", HEAD: "head"}[name], ""
    row = f"layer {layer}" if layer < config.layers else f"MTP, layer {layer}"
    part = name.removeprefix(layer_name(layer, ""))
    if "norm." in part:
        return row, "norms"
    if part in attention_shapes(config):
        return row, "attention"
    if part == GATE:
        return row, "gate"
    if part.startswith(f"{DENSE}."):
        return row, "experts" if is_stacked(name) else "shared, dense"
    return row, ""


def _sum(sizes: list[Size]) -> Size:
    largest = float(np.max([size.largest for size in sizes]))  # NaN, if one is
    return Size(
        sum(size.elements for size in sizes), math.hypot(*(size.norm for size in sizes)), largest
    )


def _fingerprint(checkpoint: Path) -> str:
    """Of the checkpoint's files: their names, sizes and times."""
    files = sorted([*checkpoint.glob("*.safetensors"), checkpoint / "config.json"])
    try:
        told = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError as error:
        raise CouldNotRun(
            f"--checkpoint: {error.filename} can't be read: {error.strerror}"
        ) from error
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
