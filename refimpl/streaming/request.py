"""What is asked for, what identifies it to a run that goes on, and how it fits a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from .. import __version__
from ..array import expect_ids
from ..batch import make_batch
from ..checkpoint.names import stored_names
from ..checkpoint.source import Source
from ..config import ModelConfig
from ..model import Route
from ..ops import IMPLEMENTATIONS, Op
from ..parameters import is_buffer, parameter_shapes
from .pieces import EMBEDDING, LazyParameters, embedding_backward, embedding_forward

__all__ = ["ACTIVATIONS", "Plan", "Request", "gradient_shapes"]

ACTIVATIONS = {
    "model.embed_tokens": "the embeddings, what layer 0 reads",
    "model.layers.L": "layer L's output, what the next one reads",
    "model.layers.L.self_attn": "attention's output, before it is added to the stream",
    "model.layers.L.after_attention": (
        "the stream with attention's output added, what post_attention_layernorm reads"
    ),
    "model.layers.L.mlp.gate.scores": "the router's scores [B, T, E], before bias and selection",
    "model.norm": "the final hidden states, what the head reads",
}
"""act/…: those named like a module are its output, as a forward hook on Hugging Face's module sees
it."""


@dataclass(frozen=True)
class Request:
    """What is asked for; arrays as in `model.forward` and `model.backward`."""

    tokens: np.ndarray  # [B, T]
    targets: np.ndarray | None = None  # [B, T]
    mask: np.ndarray | None = None  # [B, T] bool
    key_mask: np.ndarray | None = None  # [B, T] bool
    dlogits: np.ndarray | None = None  # [B, T, W]: the backward of another loss, instead of ours
    routes: Mapping[int, Route] = field(default_factory=dict)  # by layer, to replay
    mtp: bool = False  # with the losses of the MTP modules
    mtp_weight: float | None = None  # λ, by default the config's
    balance_alpha: float = 0.0  # α; 0: no balance loss, as in Hugging Face
    layers: int | None = None  # only so many of the first
    only: str = "*"  # pattern of the gradients to write
    activations: str | None = None  # pattern of the activations to write
    logits: bool = True  # write them
    implementation: str = "reference"

    def config(self, config: ModelConfig) -> ModelConfig:
        """The model that is asked for; ValueError if there is none such."""
        if self.layers is not None and not 1 <= self.layers <= config.layers:
            raise ValueError(f"layers must lie in 1…{config.layers}, got {self.layers}")
        if self.mtp and not config.mtp_depth:
            raise ValueError("mtp asks for a loss of modules that the model does not have")
        if self.mtp and self.layers not in (None, config.layers):
            raise ValueError("layers leaves out what mtp reads: give one of them")
        ours = self.mtp or self.balance_alpha or self.mask is not None or self.targets is not None
        if self.dlogits is not None and ours:
            raise ValueError(
                "dlogits is the gradient of another loss: it goes with none of mtp, "
                "balance_alpha, mask, targets"
            )
        layers = config.layers if self.layers is None else self.layers
        return replace(
            config,
            layers=layers,
            dense_layers=min(config.dense_layers, layers),
            balance_weight=self.balance_alpha,
            mtp_depth=config.mtp_depth if self.mtp else 0,
            mtp_weight=config.mtp_weight if self.mtp_weight is None else self.mtp_weight,
        )

    def identity(self, source: Source, checkpoint: str) -> dict[str, str]:
        """Each part of the request as a word or a digest: a resumed run must agree in all."""
        parts: dict[str, Any] = {
            "config": asdict(source.config),
            "dtype": str(source.dtype),
            "checkpoint": checkpoint,
        }
        parts |= {"refimpl": __version__, "numpy": np.__version__}
        parts |= {name: getattr(self, name) for name in self.__dataclass_fields__}
        parts["routes"] = {
            str(layer): digest(route.indices, route.counted) for layer, route in self.routes.items()
        }
        for name, value in parts.items():
            if isinstance(value, np.ndarray):
                parts[name] = digest(value)
            elif isinstance(value, dict):
                parts[name] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        return {name: str(value) for name, value in parts.items()}


def gradient_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every gradient's name and shape as a checkpoint has them, the experts one by one."""
    return {
        stored: shape if stored == name else shape[1:]
        for name, shape in parameter_shapes(config).items()
        if not is_buffer(name)
        for stored in stored_names(name, shape)
    }


def digest(*arrays: np.ndarray | None) -> str:
    """Of the arrays' types, shapes and values."""
    hashed = hashlib.sha256()
    for x in arrays:
        hashed.update(
            b"none"
            if x is None
            else f"{x.dtype}{x.shape}".encode() + np.ascontiguousarray(x).tobytes()
        )
    return hashed.hexdigest()


class Plan:
    """A request that fits a source; ValueError or TypeError says which part of it does not, name
    first."""

    def __init__(self, source: Source, request: Request) -> None:
        self.source, self.request = source, request
        self.config = config = request.config(source.config)
        self.params = LazyParameters(source, config)
        self.with_loss = request.dlogits is None
        if request.implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got "
                f"{request.implementation}"
            )
        self.ops = IMPLEMENTATIONS[request.implementation] | {
            "embedding": Op(embedding_forward, embedding_backward)
        }
        if request.tokens.ndim == 2 and request.tokens.shape[1] < (
            2 if self.with_loss and request.targets is None else 1
        ):
            raise ValueError(
                f"tokens must have shape (B, T) with T of at least 2, got {request.tokens.shape}"
            )
        if request.tokens.size == 0:
            raise ValueError("tokens must not be empty, got none")
        self.batch = make_batch(
            self.params[EMBEDDING],
            request.tokens,
            config,
            targets=request.targets,
            mask=request.mask,
            key_mask=request.key_mask,
            with_loss=self.with_loss,
        )
        expect_ids("targets", np.where(self.batch.mask, self.batch.targets, 0), config.vocabulary)
        if request.dlogits is not None and request.dlogits.shape != (
            *request.tokens.shape,
            config.vocabulary,
        ):
            wanted = (*request.tokens.shape, config.vocabulary)
            raise ValueError(
                f"dlogits must have shape (B, T, W)={wanted}, got {request.dlogits.shape}"
            )
        if request.dlogits is not None and not np.isfinite(request.dlogits).all():
            raise ValueError("dlogits must be finite, got NaN or infinity")
        with np.errstate(over="ignore"):
            self.dlogits = None if request.dlogits is None else request.dlogits.astype(source.dtype)
        if self.dlogits is not None and not np.isfinite(self.dlogits).all():
            raise ValueError(f"dlogits has numbers that {source.dtype} can't hold")
        if self.with_loss and not self.batch.mask.any():
            given = [
                name
                for name in ("mask", "targets", "key_mask")
                if getattr(request, name) is not None
            ]
            raise ValueError(
                f"{' and '.join(given)} must leave at least one target that counts, got none"
            )
        self.modules = range(1, config.mtp_depth + 1)
        self.moe_layers = range(config.dense_layers, config.layers + config.mtp_depth)
        self._check_routes()
        self.wanted = {
            n: s for n, s in gradient_shapes(config).items() if fnmatchcase(n, request.only)
        }
        if not self.wanted:
            raise ValueError(f"only must match the name of a gradient, got {request.only}")
        self.activations = [
            name
            for name in self._activation_names()
            if fnmatchcase(name, request.activations or "")
        ]
        if request.activations is not None and not self.activations:
            raise ValueError(
                f"activations must match a name such as {', '.join(ACTIVATIONS)}, got "
                f"{request.activations}"
            )

    def _check_routes(self) -> None:
        routes, config, (b, t) = self.request.routes, self.config, self.request.tokens.shape
        whole = self.source.config  # whose routes serve a request for some of its layers, too
        strange = sorted(routes.keys() - range(whole.dense_layers, whole.layers + whole.mtp_depth))
        if strange:
            given = ", ".join(map(str, strange))
            raise ValueError(
                "routes must be of the model's MoE layers, with mtp also of its modules, got "
                f"layer {given}"
            )
        missing = [layer for layer in self.moe_layers if layer not in routes]
        if routes and missing:
            raise ValueError(
                "routes must have every MoE layer of the model, lacks "
                f"{', '.join(map(str, missing))}"
            )
        for layer in self.moe_layers if routes else ():
            shape = (b, t - max(layer - config.layers + 1, 0), config.top_k)
            for name, x in zip(("routes", "counted"), routes[layer], strict=True):
                if x is not None and x.shape != shape:
                    raise ValueError(
                        f"routes of layer {layer} ({name}) must have shape (B, T, K)={shape}, "
                        f"got {x.shape}"
                    )
                if x is not None:
                    expect_ids(f"routes of layer {layer}", x, config.experts)
            in_order = np.sort(routes[layer].indices, axis=-1)
            if np.any(in_order[..., 1:] == in_order[..., :-1]):
                raise ValueError(
                    f"routes of layer {layer} must name an expert once a token, got one twice"
                )

    def _activation_names(self) -> Iterator[str]:
        for name in ACTIVATIONS:
            if ".L" not in name:
                yield name
                continue
            for layer in (
                self.moe_layers
                if "gate" in name
                else range(self.config.layers + self.config.mtp_depth)
            ):
                yield name.replace(".L", f".{layer}")
