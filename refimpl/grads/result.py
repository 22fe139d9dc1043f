"""The result: losses, loads and sizes, and the small files of what the records hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..batch import Batch
from ..model import total_loss
from ..parameters import moe_layers, mtp_layers
from .folder import Folder, Record, Size
from .steps import Steps

__all__ = ["Result", "write_result"]


class Result(NamedTuple):
    loss: float | None  # None with dlogits
    main: float | None  # None with dlogits
    mtp: list[float]  # of each module, before λ
    balance: dict[int, float]  # of each MoE layer, with its α
    loads: dict[int, np.ndarray]  # [E] of each MoE layer
    gradients: dict[str, Size]  # by the checkpoint's names
    activations: list[str]  # the names of those that were written


def write_result(steps: Steps) -> Result:
    """What is known once all steps are done; writes in.safetensors, aux.safetensors and
    out.safetensors."""
    folder, records = steps.folder, steps.records
    with_loss = steps.request.with_loss
    write_inputs(folder, steps.batch, with_loss=with_loss)
    routed = {layer: records["forward", layer] for layer in moe_layers(steps.config)}
    write_routing(folder, routed)
    loss = main = None
    mtp: list[np.ndarray] = []
    balance: dict[int, np.ndarray] = {}
    if with_loss:
        main = records["head",].array("main")
        mtp = [records["backward", layer].array("loss") for layer in mtp_layers(steps.config)]
        balance = {n: r.array("balance") for n, r in routed.items() if "balance" in r.arrays}
        loss = total_loss(steps.config, main, mtp, balance)
        log_prob = records["head",].array("log_prob")
        losses = {
            "out/loss": loss,
            "out/main": main,
            "out/loss_per_token": np.where(steps.batch.mask, -log_prob, 0),
        }
        losses |= {f"out/mtp.{depth}": x for depth, x in enumerate(mtp, 1)}
        losses |= {f"out/balance.{layer}": x for layer, x in balance.items()}
        dtype = steps.source.dtype
        folder.write("out.safetensors", {n: np.asarray(x, dtype) for n, x in losses.items()})
    sizes = {name: size for record in records.values() for name, size in record.sizes.items()}
    return Result(
        None if loss is None else float(loss),
        None if main is None else float(main),
        [float(x) for x in mtp],
        {layer: float(x) for layer, x in balance.items()},
        {layer: record.array("load") for layer, record in routed.items()},
        {name: sizes[name] for name in folder.gradients if name in sizes},
        list(folder.activations),
    )


def write_inputs(folder: Folder, batch: Batch, *, with_loss: bool) -> None:
    """in.safetensors: the batch."""
    given = {"tokens": batch.tokens}
    if with_loss:
        given |= {"targets": batch.targets, "mask": batch.mask}
    if batch.takes_part is not None:
        given["key_mask"] = batch.takes_part
    folder.write("in.safetensors", {f"in/{name}": np.array(x) for name, x in given.items()})


def write_routing(folder: Folder, routed: Mapping[int, Record]) -> None:
    """aux.safetensors: what the gates of all MoE layers chose."""
    names = {"routes": "indices", "counted": "counted", "weights": "weights", "load": "load"}
    found = {
        f"aux/{name}.{layer}": record.array(key)
        for name, key in names.items()
        for layer, record in routed.items()
        if key in record.arrays
    }
    if found:
        folder.write("aux.safetensors", found)
