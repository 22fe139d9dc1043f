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
from ..ops import LEAVES, AnyOp, Op, Ops
from ..ops.router import scores_backward
from ..parameters import layer_name, module_name
from .request import AFTER_ATTENTION, ATTENTION, SCORES, is_inner

__all__ = ["Call", "Calls", "activations_of", "noting"]

Arrays = dict[str, np.ndarray]


class Call(NamedTuple):
    """One call of a backward."""

    dy: Any
    saved: Any
    gradients: Any  # of attention alone: others are as large as the weights


class Calls:
    """``ops``, the table whose backwards note their calls, and these calls: of a block that is
    ``layer`` of a model, as far as the activations ``names`` need them."""

    def __init__(self, ops: Ops, config: ModelConfig, layer: int, names: Iterable[str]) -> None:
        begin = f"{module_name(layer)}."
        wanted = [name for name in names if f"{name}.".startswith(begin)]
        self.layer, self.wanted = layer, set(wanted)
        watched = {"mla", "router", "ffn" if layer < config.dense_layers else "moe"}
        self.inside = any(is_inner(name) for name in wanted)
        if self.inside:  # without those whose calls hold the experts' weights
            watched |= {*LEAVES} - {"linear", "swiglu"}
        self.calls: list[Call] = []
        noted = {
            name: noting_backward(ops[name], self.calls, keep=name == "attention")
            for name in watched
            if wanted
        }
        self.ops = ops | noted

    def cotangents(self, block: BlockSaved) -> Arrays:
        """By the activation's name, once the backward of the block is done."""
        if not self.wanted:
            return {}
        network: Any = block.network
        stream = self.call(block.attention.mla).dy[0]  # attention's output is added to it
        own = network.ffn if hasattr(network, "ffn") else network.moe
        found = {
            module_name(self.layer): self.call(own).dy,
            layer_name(self.layer, AFTER_ATTENTION): stream,
            layer_name(self.layer, ATTENTION): stream,
        }
        if hasattr(network, "router"):
            dy = self.call(network.router).dy
            found[layer_name(self.layer, SCORES)] = scores_backward(dy, network.router)
        if self.inside:
            for part, x in self._inside(block).items():
                found[layer_name(self.layer, f"{ATTENTION}.{part}")] = x
        return found

    def _inside(self, block: BlockSaved) -> Arrays:
        """Those inside attention."""
        mla = block.attention.mla
        do, saved, (dq, dk, dv) = self.call(mla.attention)
        dlatent = self.call(mla.project.kv_a_norm).dy
        dkey = self.call(mla.project.k_pe).dy[:, :, 0, :]
        return {
            "latent": np.concatenate((dlatent, dkey), axis=-1),
            "q": dq,
            "k": dk,
            "v": dv,
            "probabilities": einsum("bthv,bshv->bhts", do, saved.v),  # o = p v
        }

    def call(self, saved: Any) -> Call:
        """The call with this very ``saved``."""
        return next(call for call in self.calls if call.saved is saved)


def activations_of(layer: int, block: BlockSaved, names: Iterable[str]) -> Arrays:
    """Those inside a block by name, but for attention's output, which is not saved; what stands
    inside attention only if it is among ``names``."""
    inside, mla = layer_name(layer, f"{ATTENTION}."), block.attention.mla
    found = {layer_name(layer, AFTER_ATTENTION): block.network.norm.x}
    if isinstance(block.network, ExpertsSublayerSaved):
        found[layer_name(layer, SCORES)] = block.network.routed.scores
    if any(name.startswith(inside) for name in names):
        q, k, v, p, *_ = mla.attention
        parts = {"latent": block.attention.cache, "q": q, "k": k, "v": v, "probabilities": p}
        found |= {f"{inside}{part}": x for part, x in parts.items()}
    return found


def noting(op: AnyOp, outputs: list[Any]) -> AnyOp:
    """``op``, whose forward also appends its output to ``outputs``."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        y, saved = op.forward(*args, **kwargs)
        outputs.append(y)
        return y, saved

    return Op(forward, op.backward)


def noting_backward(op: AnyOp, calls: list[Call], *, keep: bool) -> AnyOp:
    """``op``, whose backward also appends its `Call` to ``calls``, with the gradients to
    ``keep``."""

    def backward(dy: Any, saved: Any) -> Any:
        gradients = op.backward(dy, saved)
        calls.append(Call(dy, saved, gradients if keep else None))
        return gradients

    return Op(op.forward, backward)
