"""The gradients of a model over several ranks: each has its parts of the batch and its experts in
memory, and the first writes the result, in the files that one process writes.

The other way to gradients whose step does not fit: one process keeps one layer in memory, ranks
keep all, each its share. The first collects all gradients before it writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..checkpoint.names import stored_names
from ..checkpoint.source import Source
from ..config import ModelConfig
from ..errors import CouldNotRun
from ..model import ModelOutput, ModelSaved, backward, forward
from ..ops import Ops
from ..parallel.ranks import Ranks
from ..parameters import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    depth_of,
    head_name,
    is_stacked,
    layer_name,
    mtp_layers,
    parameter_shapes,
)
from ..splits import Part, filled
from .folder import Folder, LayerGradients
from .request import Request
from .steps import Arrays, Steps

__all__ = ["Found", "SharedSteps", "check_shared", "shared_gradients"]

ALONE = ("units", "activations", "split", "grpo", "dlogits", "routes")
"""What one process alone can be asked for."""


class Found(NamedTuple):
    """What all ranks found together."""

    gradients: dict[str, np.ndarray]  # by our names
    losses: dict[str, float]  # main, mtp.K, balance.L
    loads: dict[int, np.ndarray]  # [E]
    tokens: dict[tuple[str, int], np.ndarray]  # by name and layer, [B, T, …]: what each token has


def check_shared(request: Request) -> None:
    """CouldNotRun, naming the argument, if the request asks for what ranks don't give."""
    for name in ALONE:
        if getattr(request, name) not in (None, (), {}):
            reason = "can't be had from several ranks: leave out"
            raise CouldNotRun(reason, argument=name, remedy="ranks")


def shared_gradients(source: Source, request: Request, ranks: Ranks) -> Found | None:
    """The gradients, found by all ranks together; None on all but the first."""
    config = request.config(source.config)
    arrays = request.arrays(config)
    rows, length = arrays["tokens"].shape
    (part,) = ranks.grid.parts(ranks.rank, arrays, config, rows=rows)
    whole, ops = ranks.whole([part], config), ranks.ops(request.table(), config)
    params = dict(_own(source, config, ranks))
    given = filled(part, config.mtp_depth)
    output, saved = forward(
        ranks.held(params, config),
        config=config,
        whole=whole,
        follow=given.follow,
        ops=ops,
        **given.arrays,
    )
    slices = ranks.reduced(backward(saved))
    gradients = ranks.whole_gradients(slices, params)
    place = ranks.grid.place(ranks.rank, rows, length)
    tokens = _tokens(output, saved, ops, params[head_name(config)], given)
    each = ranks.world.collect((place, _losses(output), output.loads, tokens))
    if each is None or gradients is None:
        return None
    return Found(
        gradients,
        {name: sum(losses[name] for _, losses, _, _ in each) for name in each[0][1]},
        {layer: sum(loads[layer] for _, _, loads, _ in each) for layer in output.loads},
        {
            key: _joined([(place, found[key]) for place, _, _, found in each], rows, shape)
            for key, shape in ((key, length - depth_of(config, key[1])) for key in tokens)
        },
    )


def _own(source: Source, config: ModelConfig, ranks: Ranks) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that a rank holds; no others are read."""
    mine = ranks.grid.experts(ranks.rank, config)
    for name in parameter_shapes(config):
        yield name, source.piece(name, mine) if is_stacked(name) else source.tensor(name)


def _losses(output: ModelOutput) -> dict[str, float]:
    """A part's share of each loss."""
    found = {"main": output.main} | {f"mtp.{k}": x for k, x in enumerate(output.mtp, 1)}
    found |= {f"balance.{layer}": x for layer, x in output.balance.items()}
    return {name: float(x) for name, x in found.items() if x is not None}


def _tokens(
    output: ModelOutput, saved: ModelSaved, ops: Ops, head: np.ndarray, part: Part
) -> dict[tuple[str, int], np.ndarray]:
    """What the result says of each token of a part: its hidden state and log-probability, and by
    layer its experts."""
    targets, mask = (part.arrays[name][:, : output.hidden.shape[1]] for name in ("targets", "mask"))
    log_prob, _ = ops.log_prob.forward(
        output.hidden, head, targets=np.where(mask, targets, 0), mask=mask
    )
    found = {("hidden", 0): output.hidden, ("log_prob", 0): log_prob}
    every = [*saved.blocks, *(module.block for module in saved.mtp)]
    for layer, route in output.routes.items():
        routed = every[layer].network.routed
        found |= {("indices", layer): route.indices, ("counted", layer): route.counted}
        found |= {("weights", layer): routed.weights}
    return found


def _joined(
    each: Sequence[tuple[tuple[slice, slice], np.ndarray]], rows: int, length: int
) -> np.ndarray:
    """An array [B, its positions, …] of what every rank has of it; what a part without tokens was
    filled with is left out."""
    whole = np.zeros((rows, length, *each[0][1].shape[2:]), each[0][1].dtype)
    for place, x in each:
        own = whole[place]
        own[...] = x[: own.shape[0], : own.shape[1]]
    return whole


class SharedSteps(Steps):
    """The steps of a request whose numbers are there already."""

    def __init__(self, source: Source, request: Request, folder: Folder, found: Found) -> None:
        super().__init__(source, request, folder)
        self.found = found

    def embedding(self) -> Arrays:
        return {}

    def forward(self, layer: int) -> Arrays:
        return self._routed(layer)

    def head(self) -> Arrays:
        tokens, losses = self.found.tokens, self.found.losses
        if self.request.logits:
            self._write_logits(self._run_of_head(), tokens["hidden", 0])
        self._write("head", HEAD)
        return {"main": np.asarray(losses["main"]), "log_prob": tokens["log_prob", 0]}

    def backward(self, layer: int) -> Arrays:
        with self.folder.layer_gradients(layer) as grads:
            self._write_layer(layer, grads)
        if layer not in (modules := mtp_layers(self.config)):
            return {}
        return {"loss": np.asarray(self.found.losses[f"mtp.{modules.index(layer) + 1}"])}

    def norm(self) -> Arrays:
        self._write("norm", FINAL_NORM)
        return {}

    def lookup(self) -> Arrays:
        self._write("embedding", EMBEDDING)
        return {}

    def _write(self, place: str, name: str) -> None:
        if name in self.found.gradients:
            self.folder.write_gradient(place, name, [self.found.gradients[name]])

    def _write_layer(self, layer: int, grads: LayerGradients) -> None:
        begin = layer_name(layer, "")
        for name, x in self.found.gradients.items():
            if name.startswith(begin):
                for expert, stored in enumerate(stored_names(name, x.shape)):
                    grads.write(stored, x if stored == name else x[expert])

    def _routed(self, layer: int) -> Arrays:
        """The arrays that the record of a layer with experts has."""
        found = self.found
        if layer not in found.loads:
            return {}
        record = {name: found.tokens[name, layer] for name in ("indices", "weights")}
        record |= {"load": np.asarray(found.loads[layer])}
        if self.config.balance_weight:
            record |= {"counted": found.tokens["counted", layer]}
            record |= {"balance": np.asarray(found.losses[f"balance.{layer}"])}
        return record
