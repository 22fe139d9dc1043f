"""The result: losses, loads and sizes, and the small files of what the records hold."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..model import total_loss
from ..parameters import moe_layers, mtp_layers
from .folder import Record, Size
from .split import rules, term_counts
from .steps import Steps

__all__ = ["Result", "result_of", "split_of", "write_result"]


class Result(NamedTuple):
    """What a finished run found: losses, loads, and the size of each gradient."""

    loss: float | None  # None with dlogits
    main: float | None  # None with dlogits
    mtp: list[float]  # of each module, before λ
    balance: dict[int, float]  # of each MoE layer, with its α
    loads: dict[int, np.ndarray]  # [E] of each MoE layer
    gradients: dict[str, Size]  # by the checkpoint's names
    activations: list[str]  # the names of those that were written
    split: dict[str, Any] | None  # the parts, their sums and counts by term, and the rules' factors


def write_result(steps: Steps) -> dict[str, np.ndarray]:
    """in.safetensors, aux.safetensors and out.safetensors, of what the records of all steps hold;
    the last step, whose record holds no arrays."""
    write_inputs(steps)
    write_choices(steps)
    if steps.request.with_loss:
        write_losses(steps)
    return {}


def result_of(steps: Steps) -> Result:
    """What is known once all steps are done."""
    records, folder = steps.records, steps.folder
    loss = main = None
    mtp: list[np.ndarray] = []
    balance: dict[int, np.ndarray] = {}
    if steps.request.with_loss:
        loss, main, mtp, balance = losses_of(steps)
    sizes = {name: size for record in records.values() for name, size in record.sizes.items()}
    return Result(
        None if loss is None else float(loss),
        None if main is None else float(main),
        [float(x) for x in mtp],
        {layer: float(x) for layer, x in balance.items()},
        {layer: record.array("load") for layer, record in routed_layers(steps).items()},
        {name: sizes[name] for name in folder.gradients if name in sizes},
        list(folder.activations),
        split_of(steps),
    )


def split_of(steps: Steps) -> dict[str, Any] | None:
    """What the index says of the parts: their sums by term, counts, and every rule's factors."""
    request, config = steps.request, steps.config
    split = request.split_of(config)
    if split is None:
        return None
    found = term_counts(split, config, request.grpo)
    sums = steps.records["split",]
    return {
        "spec": request.split,
        "ranks": split.ranks,
        "pieces": split.pieces,
        "shapes": [list(part.arrays["tokens"].shape) for part in split.parts],
        "follow": [part.follow for part in split.parts],
        "sums": {term: sums.array(term).tolist() for term in found},
        "counts": {term: count._asdict() for term, count in found.items()},
        "rules": {term: rules(term, count, split.ranks) for term, count in found.items()},
    }


def routed_layers(steps: Steps) -> dict[int, Record]:
    """The records of the MoE layers' forwards."""
    return {layer: steps.records["forward", layer] for layer in moe_layers(steps.config)}


def losses_of(steps: Steps) -> tuple[Any, Any, list[Any], dict[int, Any]]:
    """The loss, its main part, that of each MTP module, and the balance loss of each MoE layer."""
    main = steps.records["head",].array("main")
    mtp = [steps.records["backward", n].array("loss") for n in mtp_layers(steps.config)]
    routed = routed_layers(steps).items()
    balance = {n: record.array("balance") for n, record in routed if "balance" in record.arrays}
    return total_loss(steps.config, main, mtp, balance), main, mtp, balance


def write_losses(steps: Steps) -> None:
    """out.safetensors; the loss of each token is GRPO's alone to tell, by log-probabilities."""
    loss, main, mtp, balance = losses_of(steps)
    losses = {"out/loss": loss, "out/main": main}
    if steps.request.grpo is None:
        log_prob = steps.records["head",].array("log_prob")
        losses["out/loss_per_token"] = np.where(steps.batch.mask, -log_prob, 0)
    losses |= {f"out/mtp.{depth}": x for depth, x in enumerate(mtp, 1)}
    losses |= {f"out/balance.{layer}": x for layer, x in balance.items()}
    dtype = steps.source.dtype
    steps.folder.write("out.safetensors", {n: np.asarray(x, dtype) for n, x in losses.items()})


def write_inputs(steps: Steps) -> None:
    """in.safetensors: the batch, and what GRPO needs besides."""
    batch, request = steps.batch, steps.request
    given: dict[str, Any] = {"tokens": batch.tokens}
    if request.with_loss:
        given["targets"] = batch.targets
    if request.grpo is not None:
        given |= {"grpo_mask": batch.mask} | request.grpo.inputs(steps.source.dtype)
    elif request.with_loss:
        given["mask"] = batch.mask
    if batch.takes_part is not None:
        given["key_mask"] = batch.takes_part
    if request.positions is not None:
        given["positions"] = batch.positions
    if batch.segments is not None:
        given["segments"] = batch.segments
    found = {f"in/{name}": np.array(x) for name, x in given.items() if x is not None}
    steps.folder.write("in.safetensors", found)


def write_choices(steps: Steps) -> None:
    """aux.safetensors: what the gates of all MoE layers chose, and what GRPO clipped."""
    routed = routed_layers(steps)
    names = {"routes": "indices", "counted": "counted", "weights": "weights", "load": "load"}
    found = {
        f"aux/{name}.{layer}": record.array(key)
        for name, key in names.items()
        for layer, record in routed.items()
        if key in record.arrays
    }
    head = steps.records["head",]
    found |= {f"aux/{key}": head.array(key) for key in ("unclipped", "kept") if key in head.arrays}
    if found:
        steps.folder.write("aux.safetensors", found)
