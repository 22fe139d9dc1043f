"""The steps in their order, those done left out; then what is known once all are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .. import __version__
from ..parameters import head_name
from .folder import Folder, Size, held
from .pieces import EMBEDDING
from .request import Plan
from .steps import Steps

__all__ = ["Result", "Stream"]


class Result(NamedTuple):
    loss: float | None  # None with dlogits
    main: float | None
    mtp: list[float]  # of each module, before λ
    balance: dict[int, float]  # of each MoE layer, with its α
    loads: dict[int, np.ndarray]  # [E] of each MoE layer
    gradients: dict[str, Size]  # by the checkpoint's names
    activations: list[str]


class Step(NamedTuple):
    name: str
    run: Callable[[], dict[str, np.ndarray]]  # the arrays of its record
    gradients: tuple[str, ...] = ()  # that it writes
    is_backward: bool = False


class Stream(Plan):
    """What ``request`` asks of ``source``; ValueError or TypeError says which part of it is wrong,
    name first."""

    def write(
        self,
        folder: Path,
        *,
        checkpoint: str = "",
        force: bool = False,
        progress: Callable[[str, int, int], None] = lambda step, done, total: None,
    ) -> Result:
        """Write everything to ``folder``, or the rest of it if a run of the same request was killed
        there.

        Args:
            checkpoint: what tells the source's contents from others of the same config, for
                resuming.
            force: replace what such a run left in the folder.
            progress: called with a step's name, how many are done, and how many there are.

        CouldNotRun says why the folder can't be used.
        """
        about = {
            "refimpl": __version__,
            "dtype": str(self.source.dtype),
            "implementation": self.request.implementation,
        }
        with held(folder):
            out = Folder(
                folder,
                self.request.identity(self.source, checkpoint),
                force,
                gradients=self.wanted,
                activations=self.activations,
                dtype=self.source.dtype,
            )
            steps = self._order(Steps(self, out), out)
            for i, step in enumerate(steps):
                progress(step.name, i, len(steps))
                out.do(step.name, step.run)
            progress("done", len(steps), len(steps))
            result = self._result(out)
            out.finish(about | {"config": asdict(self.config)})
        return result

    def _order(self, steps: Steps, out: Folder) -> list[Step]:
        """All that is to be done; a backward that leads to no gradient that is wanted is left
        out."""
        config = self.config
        order = [Step("embedding", steps.embed)]
        order += [
            Step(f"forward-{layer:05d}", partial(steps.forward, layer))
            for layer in range(config.layers)
        ]
        order += [
            Step(f"forward-{config.layers + k - 1:05d}", partial(steps.forward_mtp, k))
            for k in self.modules
        ]
        head = () if config.tied else (head_name(config),)
        order.append(Step("head", steps.head, () if self.modules else head))
        for k in reversed(self.modules):
            layer = config.layers + k - 1
            names = (*out.of_layer(layer), *(head if k == 1 else ()))
            order.append(Step(f"backward-{layer:05d}", partial(steps.backward_mtp, k), names, True))
        order.append(Step("norm", steps.norm, ("model.norm.weight",), True))
        for layer in reversed(range(config.layers)):
            order.append(
                Step(
                    f"backward-{layer:05d}",
                    partial(steps.backward, layer),
                    out.of_layer(layer),
                    True,
                )
            )
        order.append(Step("lookup", steps.lookup, (EMBEDDING,), True))
        while order[-1].is_backward and not self.wanted.keys() & set(order[-1].gradients):
            order.pop()
        return order

    def _result(self, out: Folder) -> Result:
        """Write the small files, from what the records say."""
        records, batch, config = out.records, self.batch, self.config
        given = {
            "tokens": batch.tokens,
            "targets": batch.targets,
            "mask": batch.mask,
            "key_mask": batch.takes_part,
        }
        if not self.with_loss:
            del given["targets"], given["mask"]
        out.write(
            "in.safetensors",
            {f"in/{name}": np.array(x) for name, x in given.items() if x is not None},
        )
        routed = {layer: records[f"forward-{layer:05d}"] for layer in self.moe_layers}
        aux = {
            f"aux/{name}.{layer}": record[key]
            for name, key in {
                "routes": "indices",
                "counted": "counted",
                "weights": "weights",
                "load": "load",
            }.items()
            for layer, record in routed.items()
            if key in record.arrays
        }
        if aux:
            out.write("aux.safetensors", aux)
        head, loss, mtp, balance = records["head"], None, [], {}
        if self.with_loss:
            loss = main = head["main"]
            mtp = [records[f"backward-{config.layers + k - 1:05d}"]["loss"] for k in self.modules]
            for module in mtp:
                loss = loss + config.mtp_weight / config.mtp_depth * module
            balance = {layer: r["balance"] for layer, r in routed.items() if "balance" in r.arrays}
            loss = sum(balance.values(), start=loss)
            per_token = np.where(batch.mask, -head["log_prob"], 0)
            losses = {"out/loss": loss, "out/main": main, "out/loss_per_token": per_token}
            losses |= {f"out/mtp.{k}": x for k, x in enumerate(mtp, 1)}
            losses |= {f"out/balance.{layer}": x for layer, x in balance.items()}
            out.write(
                "out.safetensors",
                {name: np.asarray(x, self.source.dtype) for name, x in losses.items()},
            )
        sizes = {name: size for record in records.values() for name, size in record.sizes.items()}
        return Result(
            None if loss is None else float(loss),
            None if loss is None else float(main),
            [float(x) for x in mtp],
            {layer: float(x) for layer, x in balance.items()},
            {layer: r["load"] for layer, r in routed.items()},
            {name: sizes[name] for name in self.wanted if name in sizes},
            self.activations,
        )
