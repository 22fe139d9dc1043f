"""The request, its validation against a model, and its fingerprint."""

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
from ..batch import Batch, make_batch
from ..checkpoint.names import stored_names
from ..checkpoint.source import Source
from ..config import CONVENTIONS, ModelConfig
from ..fp8 import DEFAULT, Recipe
from ..kernels.columns import IN_FP8, expect_backend, on_cpu, placement, table_of
from ..kernels.placed import on_host
from ..model import Route
from ..ops import Ops
from ..parameters import (
    EMBEDDING,
    FINAL_NORM,
    depth_of,
    is_buffer,
    layer_name,
    module_name,
    moe_layers,
    parameter_shapes,
)
from .grpo import GRPO
from .split import Split, split_batch

__all__ = ["ACTIVATIONS", "INNER", "UNITS", "Request", "gradient_shapes"]

# Activations, and parts of their names in a layer:
EMBEDDINGS = EMBEDDING.removesuffix(".weight")
HIDDEN = FINAL_NORM.removesuffix(".weight")
ATTENTION = "self_attn"
AFTER_ATTENTION = "after_attention"
SCORES = "mlp.gate.scores"
LOG_PROB = "log_prob"  # of GRPO; written with its loss
ACTIVATIONS = {
    EMBEDDINGS: "the embeddings, what layer 0 reads",
    module_name("L"): "layer L's output, what the next one reads",
    layer_name("L", ATTENTION): "attention's output, before it is added to the stream",
    layer_name("L", AFTER_ATTENTION): (
        "the stream with attention's output added, what post_attention_layernorm reads"
    ),
    layer_name("L", SCORES): "the router's scores [B, T, E], before bias and selection",
    HIDDEN: "the final hidden states, what the head reads",
}
"""The activations, act/…: the name of a module stands for its output, as a forward hook on Hugging
Face's module sees it."""
INNER = {
    layer_name("L", f"{ATTENTION}.{part}"): told
    for part, told in {
        "latent": "[B, T, C + R]: the latent, normed, and the shared key, rotated",
        "q": "[B, T, H, N + R]: the queries, rotated",
        "k": "[B, T, H, N + R]: the keys of all heads, rotated",
        "v": "[B, T, H, V]: the values",
        "probabilities": "[B, H, T, S]: attention's, S the position of the key",
    }.items()
}
"""Inside attention: written where the pattern names them, so that * leaves them out."""
UNITS = ("float64", "float32", "bfloat16")
"""The types whose units of error can be measured."""


@dataclass(frozen=True)
class Request:
    """What to compute of a model: losses, layers, and which gradients and activations to write.
    Arrays are those of `model.forward` and `model.backward`.

    ValueError or TypeError, from `check` and from the method that the argument goes to, begins with
    the argument that does not fit the model.
    """

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
    positions: np.ndarray | None = None  # [B, T] or [T]
    segments: np.ndarray | None = None  # [B, T]
    grpo: GRPO | None = None  # GRPO's loss, instead of the cross-entropy
    split: str | None = None  # as `SPEC`: also write the terms of each part
    units: tuple[str, ...] = ()  # of `UNITS`: also measure the unit of error of every tensor
    reruns: int = 6  # for each type of units
    seed: int = 0  # of the reruns
    backend: str = (
        "numpy"  # or cupy: each op moves what it is given to a GPU, and fetches what it gives
    )
    fp8: Recipe = DEFAULT  # of the implementation of that name

    def config(self, config: ModelConfig) -> ModelConfig:
        """The config of the model that is run: its layers, modules and losses."""
        if self.layers is not None and not 1 <= self.layers <= config.layers:
            raise ValueError(f"layers must lie in 1…{config.layers}, got {self.layers}")
        if self.mtp and not config.mtp_depth:
            raise ValueError("mtp needs MTP modules, which the model does not have")
        if self.mtp and self.layers not in (None, config.layers):
            raise ValueError("layers cannot be combined with mtp, which reads the last layer")
        ours = self.mtp or self.balance_alpha or self.mask is not None or self.targets is not None
        if self.dlogits is not None and ours:
            raise ValueError(
                "dlogits is the gradient of another loss: it cannot be combined with mtp, "
                "balance_alpha, mask or targets"
            )
        if self.grpo is not None and (self.mtp or self.mask is not None or not self.with_loss):
            raise ValueError(
                "grpo has its own loss and mask: it cannot be combined with mtp, mask or dlogits"
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

    def check(self, source: Source) -> None:
        """Validate everything, before any work is done."""
        config = self.config(source.config)
        self.table()
        if self.grpo is not None:
            self.grpo.check(self.tokens.shape)
        batch = self.batch(config)
        self._check_units(source.dtype)
        for dtype in {source.dtype, *(np.dtype("float32") for name in self.units)}:
            self.dlogits_as(dtype, config)
        if self.with_loss and not batch.mask.any():
            masks = ("mask", "grpo", "targets", "key_mask")
            given = [name for name in masks if getattr(self, name) is not None]
            raise ValueError(
                f"{' and '.join(given)} must leave at least one target that counts, got none"
            )
        self._check_routes(config, source.config)
        self.gradients(config)
        self.activation_names(config)
        self.split_of(config)

    @property
    def with_loss(self) -> bool:
        """Whether the gradients are those of our loss."""
        return self.dlogits is None

    def table(self) -> Ops:
        """The ops, which are given and give NumPy's arrays. CouldNotRun without the GPU or the
        library that they need."""
        expect_backend(self.backend, self.implementation)
        place = placement(self.backend)
        return (
            on_cpu(self.implementation, self.fp8)
            if place is None
            else on_host(table_of(self.implementation), place)
        )

    def batch(self, config: ModelConfig) -> Batch:
        """Tokens, targets and masks of the main model."""
        least = 2 if self.with_loss and self.targets is None else 1
        if self.tokens.ndim == 2 and self.tokens.shape[1] < least:
            raise ValueError(
                f"tokens must have shape (B, T) with T of at least 2, got {self.tokens.shape}"
            )
        if self.tokens.size == 0:
            raise ValueError("tokens must not be empty, got none")
        batch = make_batch(
            np.empty(0),
            self.tokens,
            config,
            targets=self.targets,
            mask=self.mask if self.grpo is None else self.grpo.mask,
            key_mask=self.key_mask,
            segments=self.segments,
            positions=self.positions,
            with_loss=self.with_loss,
        )
        expect_ids("targets", np.where(batch.mask, batch.targets, 0), config.vocabulary)
        return batch

    def arrays(self, config: ModelConfig) -> dict[str, np.ndarray]:
        """The batch as `refimpl.splits` cuts it, each [B, T]."""
        batch = self.batch(config)
        given = {
            "tokens": batch.tokens,
            "targets": batch.targets,
            "mask": batch.mask,
            "key_mask": self.key_mask,
            "segments": self.segments,
            "positions": batch.positions,
        }
        return {name: x for name, x in given.items() if x is not None}

    def split_of(self, config: ModelConfig) -> Split | None:
        """The parts of ``split``."""
        if self.split is None:
            return None
        if not self.with_loss:
            raise ValueError("split needs a loss to divide: it cannot be combined with dlogits")
        found = split_batch(self.split, self.arrays(config), config)
        if found.pieces and self.grpo is not None:
            raise ValueError(
                "split must be micro_batches or rows with grpo, which needs whole outputs"
            )
        return found

    def targets_after_padding(self, config: ModelConfig) -> bool:
        """Whether the loss depends on ``target_after_padding``: a row has padding in front of a
        token, and no mask or targets say whether that counts."""
        given = any(x is not None for x in (self.targets, self.mask, self.grpo))
        if self.key_mask is None or given or not self.with_loss:
            return False
        return bool((~self.key_mask[:, :-1] & self.key_mask[:, 1:]).any())

    def dlogits_as(self, dtype: np.dtype[Any], config: ModelConfig) -> np.ndarray | None:
        """The given gradient of the logits in the type to compute in."""
        if self.dlogits is None:
            return None
        wanted = (*self.tokens.shape, config.vocabulary)
        if self.dlogits.shape != wanted:
            raise ValueError(
                f"dlogits must have shape (B, T, W)={wanted}, got {self.dlogits.shape}"
            )
        if not np.isfinite(self.dlogits).all():
            raise ValueError("dlogits must be finite, got NaN or infinity")
        with np.errstate(over="ignore"):
            dlogits = self.dlogits.astype(dtype)
        if not np.isfinite(dlogits).all():
            raise ValueError(f"dlogits has numbers that {dtype} can't hold")
        return dlogits

    def gradients(self, config: ModelConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the gradients to write."""
        wanted = {
            name: shape
            for name, shape in gradient_shapes(config).items()
            if fnmatchcase(name, self.only)
        }
        if not wanted:
            raise ValueError(f"only must match the name of a gradient, got {self.only}")
        return wanted

    def activation_names(self, config: ModelConfig) -> list[str]:
        """Names of the activations to write."""
        pattern = self.activations
        if pattern is None:
            return []
        inner = INNER if f"{ATTENTION}." in pattern else {}
        every = _activations(config, ACTIVATIONS | inner)
        wanted = [name for name in every if fnmatchcase(name, pattern)]
        if self.implementation != "reference" and any(is_inner(name) for name in wanted):
            raise ValueError(
                "activations inside attention are those of the implementation reference, got "
                f"{self.implementation}"
            )
        if not wanted:
            raise ValueError(
                f"activations must match a name such as {', '.join(ACTIVATIONS)}, got {pattern}"
            )
        return wanted

    def fingerprint(self, source: Source, checkpoint: str) -> dict[str, str]:
        """Each part of the request as a word or a digest; a run resumes one that agrees in all."""
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
            elif isinstance(value, GRPO):
                arrays = [x for x in vars(value).values() if x is None or isinstance(x, np.ndarray)]
                parts[name] = digest(*arrays) + json.dumps(value.told)
            elif isinstance(value, dict):
                parts[name] = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        return {name: str(value) for name, value in parts.items()}

    def about(self, config: ModelConfig) -> dict[str, Any]:
        """What the index says of the request."""
        plain = ("mtp", "balance_alpha", "layers", "only", "activations")
        loss = "dlogits" if self.dlogits is not None else "cross_entropy"
        layout = config.conventions.rope_layout  # the checkpoint's
        named = {name: replace(x, rope_layout=layout) for name, x in CONVENTIONS.items()}
        return {name: getattr(self, name) for name in plain} | {
            "mtp_weight": config.mtp_weight if self.mtp else None,
            "loss": loss if self.grpo is None else "grpo",
            "grpo": None if self.grpo is None else self.grpo.told,
            "routes_given": bool(self.routes),
            "fp8": asdict(self.fp8) if self.implementation == IN_FP8 else None,
            "convention": next((n for n, x in named.items() if x == config.conventions), None),
        }

    def _check_units(self, dtype: np.dtype[Any]) -> None:
        """ValueError unless all types of ``units`` can be measured beside results of ``dtype``."""
        if strange := [name for name in self.units if name not in UNITS]:
            raise ValueError(f"units must be among {', '.join(UNITS)}, got {strange[0]}")
        if len({*self.units}) < len(self.units):
            raise ValueError(f"units must name a type once, got {', '.join(self.units)}")
        if self.units and self.reruns < 1:
            raise ValueError(f"reruns must be at least 1, got {self.reruns}")
        if "float64" in self.units and dtype != np.float64:
            raise ValueError(
                f"units of float64 need results of that type to compare with, got {dtype}"
            )

    def _check_routes(self, config: ModelConfig, whole: ModelConfig) -> None:
        """ValueError unless the routes fit the layers that are run. Routes of the ``whole`` model
        do, even where some of its layers are left out."""
        routes, (b, t) = self.routes, self.tokens.shape
        strange = sorted(routes.keys() - set(moe_layers(whole)))
        if strange:
            given = ", ".join(map(str, strange))
            raise ValueError(
                "routes must name the model's MoE layers, with mtp also those of its modules, got "
                f"layer {given}"
            )
        missing = [layer for layer in moe_layers(config) if layer not in routes]
        if routes and missing:
            raise ValueError(
                "routes must have every MoE layer of the model, lacks "
                f"{', '.join(map(str, missing))}"
            )
        for layer in moe_layers(config) if routes else ():
            shape = (b, t - depth_of(config, layer), config.top_k)
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
                    f"routes of layer {layer} must name an expert once per token, got one twice"
                )


def gradient_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every gradient's name and shape as a checkpoint has them, the experts one by one."""
    return {
        stored: shape if stored == name else shape[1:]
        for name, shape in parameter_shapes(config).items()
        if not is_buffer(name)
        for stored in stored_names(name, shape)
    }


def digest(*arrays: np.ndarray | None) -> str:
    """A digest of the arrays' types, shapes and values."""
    hashed = hashlib.sha256()
    for x in arrays:
        hashed.update(
            b"none"
            if x is None
            else f"{x.dtype}{x.shape}".encode() + np.ascontiguousarray(x).tobytes()
        )
    return hashed.hexdigest()


def is_inner(name: str) -> bool:
    """Whether an activation stands inside attention."""
    return f".{ATTENTION}." in name


def has_width(name: str) -> bool:
    """Whether the last axis of an activation is the model's width D."""
    return not (name.endswith(SCORES) or is_inner(name) or name == LOG_PROB)


def _activations(config: ModelConfig, kinds: Mapping[str, str]) -> Iterator[str]:
    """The names of all activations of these kinds in a model."""
    every = range(config.layers + config.mtp_depth)
    for name in kinds:
        if ".L" not in name:
            yield name
            continue
        for layer in moe_layers(config) if name.endswith(SCORES) else every:
            yield name.replace(".L", f".{layer}")
