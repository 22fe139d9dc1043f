"""The parts of a run in the order in which a porter reads them: the forward from the tokens to the
loss, then the backward from the loss down to the embedding.

A part is what a verdict is about and what a diagnosis computes again, alone, from the truth's own
inputs. Each tensor of a result belongs to one part; the order within a part is that in which they
are made.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from ..checkpoint.names import stored_names
from ..config import ModelConfig
from ..errors import CouldNotRun
from ..parameters import (
    ATTENTION_NORM,
    DENSE,
    EMBEDDING,
    EXPERTS,
    FINAL_NORM,
    GATE,
    HEAD,
    MTP,
    MTP_NORM,
    NETWORK_NORM,
    SHARED,
    attention_shapes,
    block_shapes,
    depth_of,
    layer_name,
    module_name,
    mtp_layers,
    network_names,
)
from .truth import Truth

__all__ = ["Part", "parts_of"]

Kind = Literal["embedding", "attention", "gate", "network", "norm", "head", "mtp", "loss", "case"]
EMBEDDINGS, HIDDEN = EMBEDDING.removesuffix(".weight"), FINAL_NORM.removesuffix(".weight")
INTERNALS = ("latent", "q", "k", "v", "probabilities")  # of attention, as the forward makes them
OPS: dict[Kind, tuple[str, ...]] = {  # whose mistakes can show in a part
    "embedding": ("embedding", "model"),
    "attention": ("mla", "attention", "flash_attention", "rope", "rms_norm", "linear", "model"),
    "gate": ("router", "expert_load", "balance_loss", "rms_norm", "model"),
    "network": ("moe", "ffn", "swiglu", "router", "balance_loss", "rms_norm", "linear", "model"),
    "norm": ("rms_norm", "model"),
    "head": ("head_cross_entropy", "cross_entropy", "log_prob", "grpo", "linear", "model"),
    "mtp": (
        *("mtp", "head_cross_entropy", "cross_entropy", "log_prob"),
        *("rms_norm", "linear", "embedding", "model"),
    ),
    "loss": ("model",),
}


class Part(NamedTuple):
    """A piece of a run that can be judged alone: its tensors, in order."""

    kind: Kind
    layer: int | None  # of the parts of a layer or of an MTP module
    backward: bool
    tensors: tuple[str, ...]  # that the truth has, in the order in which they are made
    ops: tuple[str, ...]  # whose planted bugs it can show
    case: str = ""  # of vectors: the case's name

    @property
    def name(self) -> str:
        """As it is told: ``layer 3, attention, backward``."""
        place = [] if self.layer is None else [f"layer {self.layer}"]
        what = self.case or self.kind
        return ", ".join([*place, what, "backward" if self.backward else "forward"])


def parts_of(truth: Truth) -> list[Part]:
    """The parts of a result, in reading order, those left out of which it has no tensor."""
    if truth.config is None:
        return list(_cases(truth))
    found = []
    for kind, layer, backward, names in _model(truth.config):
        present = tuple(name for name in names if name in truth)
        if present:
            joins = kind == "attention" and not backward and layer in mtp_layers(truth.config)
            ops = (*OPS[kind], "mtp") if joins else OPS[kind]  # what a module's block reads
            found.append(Part(kind, layer, backward, present, ops))
    return found


def _model(config: ModelConfig) -> Iterator[tuple[Kind, int | None, bool, list[str]]]:
    """Kind, layer, direction and tensors of every part of a model."""
    main, modules = range(config.layers), mtp_layers(config)
    yield "embedding", None, False, [f"act/{EMBEDDINGS}"]
    for layer in main:
        yield from _layer_forward(layer)
    yield "norm", None, False, [f"act/{HIDDEN}"]
    yield "head", None, False, ["out/logits", "act/log_prob", "out/loss_per_token", "out/main"]
    for layer in modules:
        yield from _layer_forward(layer)
        yield "mtp", layer, False, [f"out/mtp.{depth_of(config, layer)}"]
    yield "loss", None, False, ["out/loss"]
    for layer in reversed(modules):
        above = [f"grad/{layer_name(layer, MTP_NORM)}", f"cot/{module_name(layer)}"]
        yield "mtp", layer, True, above
        yield from _layer_backward(config, layer, None)
        joined = [f"grad/{layer_name(layer, name)}" for name in reversed(MTP)]
        yield "mtp", layer, True, joined
    yield "head", None, True, ["cot/log_prob", f"grad/{HEAD}", f"cot/{HIDDEN}"]
    last = module_name(config.layers - 1)
    yield "norm", None, True, [f"grad/{FINAL_NORM}", f"cot/{last}"]
    for layer in reversed(main):
        below = module_name(layer - 1) if layer else EMBEDDINGS
        yield from _layer_backward(config, layer, below)
    yield "embedding", None, True, [f"grad/{EMBEDDING}"]


def _layer_forward(layer: int) -> Iterator[tuple[Kind, int, bool, list[str]]]:
    attention = f"act/{layer_name(layer, 'self_attn')}"
    after = f"act/{layer_name(layer, 'after_attention')}"
    inside = [f"{attention}.{part}" for part in INTERNALS]
    yield "attention", layer, False, [*inside, attention, after]
    chosen = [f"aux/{name}.{layer}" for name in ("routes", "weights", "counted", "load")]
    scores = f"act/{layer_name(layer, 'mlp.gate.scores')}"
    yield "gate", layer, False, [scores, *chosen, f"out/balance.{layer}"]
    yield "network", layer, False, [f"act/{module_name(layer)}"]


def _layer_backward(
    config: ModelConfig, layer: int, below: str | None
) -> Iterator[tuple[Kind, int, bool, list[str]]]:
    """``below``: the module whose output the layer reads; None for that of an MTP module, whose
    gradient is not stored."""
    grad = f"grad/{layer_name(layer, '')}"
    shapes = block_shapes(config, layer)
    told: list[str] = []
    for prefix in (SHARED, EXPERTS, DENSE):
        for name in reversed(network_names(prefix)):
            if name in shapes:
                told += stored_names(f"{grad}{name}", shapes[name])
    after = f"cot/{layer_name(layer, 'after_attention')}"
    scores = f"cot/{layer_name(layer, 'mlp.gate.scores')}"
    above = [f"{grad}{name}" for name in (GATE, NETWORK_NORM)]
    yield "network", layer, True, [*told, scores, *above, after]
    attention = f"cot/{layer_name(layer, 'self_attn')}"
    inside = [f"{attention}.{part}" for part in reversed(INTERNALS)]
    weights = [f"{grad}{name}" for name in [*reversed(attention_shapes(config)), ATTENTION_NORM]]
    stream = [] if below is None else [f"cot/{below}"]
    yield "attention", layer, True, [attention, weights[0], *inside, *weights[1:], *stream]


def _cases(truth: Truth) -> Iterator[Part]:
    """Two parts per case of conformance vectors: forward, then backward."""
    by_case: dict[str, list[str]] = {}
    for name in truth.entries:
        by_case.setdefault(name.partition("/")[0], []).append(name)
    cases = truth.metadata.get("cases", {})
    for case, names in by_case.items():
        if case not in cases:
            raise CouldNotRun(f"{truth.folder / 'index.json'} does not say what {case} is")
        op = cases[case]["op"]
        for prefix, backward in (("out", False), ("grad", True)):
            tensors = _of(names, f"{case}/{prefix}/")
            if tensors:
                yield Part("case", None, backward, tensors, (op,), case)


def _of(names: Iterable[str], prefix: str) -> tuple[str, ...]:
    return tuple(name for name in names if name.startswith(prefix))
