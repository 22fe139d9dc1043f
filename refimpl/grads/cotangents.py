"""The activations of a block and their cotangents, from what the ops of its backward are called
with: the core tells nobody of them, and need not.

Letters: B batch, T query position, S key position, H heads, C latent, V value width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..array import einsum
from ..config import ModelConfig
from ..model import BlockSaved, ExpertsSublayerSaved
from ..ops import AnyOp, Op, Ops
from ..ops.router import scores_backward
from ..parameters import layer_name, module_name
from .request import AFTER_ATTENTION, ATTENTION, SCORES, is_inner

__all__ = ["Call", "Calls", "activations_of", "noting"]

Arrays = dict[str, np.ndarray]


class Call(NamedTuple):
    """One call of a backward."""

    dy: Any
    saved: Any
    gradients: Any


class Calls:
    """``ops``, the table whose backwards note their calls, and these calls: of a block that is
    ``layer`` of a model, as far as the activations ``names`` need them."""

    def __init__(self, ops: Ops, config: ModelConfig, layer: int, names: Iterable[str]) -> None:
        begin = f"{module_name(layer)}."
        wanted = [name for name in names if f"{name}.".startswith(begin)]
        self.layer, self.wanted = layer, set(wanted)
        self.network = "ffn" if layer < config.dense_layers else "moe"
        watched = {self.network, "mla", "router"} if wanted else set()
        if any(is_inner(name) for name in wanted):
            watched |= {"attention", "rms_norm", "rope"}
        self.calls: dict[str, list[Call]] = {name: [] for name in watched}
        self.ops = ops | {name: noting_backward(ops[name], self.calls[name]) for name in watched}

    def cotangents(self, block: BlockSaved) -> Arrays:
        """By the activation's name, once the backward of the block is done."""
        if not self.wanted:
            return {}
        stream = self.calls["mla"][0].dy[0]  # has two readers, attention's output and x, as a sum
        found = {
            module_name(self.layer): self.calls[self.network][0].dy,
            layer_name(self.layer, AFTER_ATTENTION): stream,
            layer_name(self.layer, ATTENTION): stream,
        }
        if isinstance(block.network, ExpertsSublayerSaved):
            dy, saved, _ = self.calls["router"][0]
            found[layer_name(self.layer, SCORES)] = scores_backward(dy, saved)
        if "attention" in self.calls:
            for part, x in self._inside(block).items():
                found[layer_name(self.layer, f"{ATTENTION}.{part}")] = x
        return found

    def _inside(self, block: BlockSaved) -> Arrays:
        """Those inside attention."""
        do, saved, (dq, dk, dv) = self.calls["attention"][0]
        project = block.attention.mla.project
        dlatent = self._given("rms_norm", project.kv_a_norm)
        dkey = self._given("rope", project.k_pe)[:, :, 0, :]
        return {
            "latent": np.concatenate((dlatent, dkey), axis=-1),
            "q": dq,
            "k": dk,
            "v": dv,
            "probabilities": einsum("bthv,bshv->bhts", do, saved.v),  # o = p v
        }

    def _given(self, op: str, saved: Any) -> Any:
        """The cotangent of the call with this very ``saved``."""
        return next(call.dy for call in self.calls[op] if call.saved is saved)


def activations_of(layer: int, block: BlockSaved, names: Iterable[str], ops: Ops) -> Arrays:
    """Those inside a block by name; attention's output, and what stands inside it, only if they are
    among ``names``."""
    attention, inside = layer_name(layer, ATTENTION), layer_name(layer, f"{ATTENTION}.")
    names, mla = list(names), block.attention.mla
    found = {layer_name(layer, AFTER_ATTENTION): block.network.norm.x}
    if attention in names:  # what the output projection read: its product again
        found[attention] = ops.linear.forward(mla.o.x, mla.o.w)[0]
    if isinstance(block.network, ExpertsSublayerSaved):
        found[layer_name(layer, SCORES)] = block.network.routed.scores
    if any(name.startswith(inside) for name in names):
        q, k, v, p, _ = mla.attention
        parts = {"latent": block.attention.cache, "q": q, "k": k, "v": v, "probabilities": p}
        found |= {f"{inside}{part}": x for part, x in parts.items()}
    return found


def noting(op: AnyOp, outputs: list[np.ndarray]) -> AnyOp:
    """``op``, whose forward also appends its output to ``outputs``."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        y, saved = op.forward(*args, **kwargs)
        outputs.append(y)
        return y, saved

    return Op(forward, op.backward)


def noting_backward(op: AnyOp, calls: list[Call]) -> AnyOp:
    """``op``, whose backward also appends its `Call` to ``calls``."""

    def backward(dy: Any, saved: Any) -> Any:
        gradients = op.backward(dy, saved)
        calls.append(Call(dy, saved, gradients))
        return gradients

    return Op(op.forward, backward)
