"""One golden case: inputs are drawn, outputs kept, gradients of random cotangents are torch's."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

SMALLEST_GAP = (
    1e-6  # a choice decided by less could go the other way in another implementation's rounding
)


class Case:
    """One case of an op: its settings, its tensors, and, once finished, the gradients of random
    cotangents."""

    def __init__(self, name: str, *, storage: type = np.float64, **settings: Any) -> None:
        self.name, self.storage, self.settings = name, storage, settings
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))
        self.inputs: dict[str, Tensor] = {}
        self.tensors: dict[str, np.ndarray] = {}

    def input(
        self, name: str, *shape: int, std: float = 1.0, mean: float = 0.0, values: Any = None
    ) -> Tensor:
        """A differentiable input, normal unless its values are given."""
        drawn = (
            mean + std * self.rng.standard_normal(shape)
            if values is None
            else np.asarray(values, np.float64)
        )
        self.tensors[f"in/{name}"] = drawn.astype(self.storage)
        self.inputs[name] = torch.tensor(
            self.tensors[f"in/{name}"].astype(np.float64), requires_grad=True
        )
        return self.inputs[name]

    def aux(self, name: str, values: Any) -> Tensor:
        """An input without gradient, stored in the type that it has."""
        array = values.detach().numpy() if isinstance(values, Tensor) else np.asarray(values)
        self.tensors[f"aux/{name}"] = array.copy()
        return torch.tensor(array)

    def integers(self, name: str, low: int, high: int, *shape: int) -> Tensor:
        return self.aux(name, self.rng.integers(low, high, shape))

    def finish(self, without_cotangent: Sequence[str] = (), **outputs: Any) -> Case:
        """Keep the outputs, draw a cotangent for each differentiable one, and add the gradients of
        the inputs."""
        total, differentiated = torch.zeros(()), False
        for name, value in outputs.items():
            y = value if isinstance(value, Tensor) else torch.tensor(value)
            self.tensors[f"out/{name}"] = y.detach().numpy().copy()
            if y.requires_grad and name not in without_cotangent:
                cotangent = self.rng.standard_normal(tuple(y.shape))
                self.tensors[f"cot/{name}"] = np.asarray(cotangent)
                total, differentiated = total + (torch.tensor(cotangent) * y).sum(), True
        if differentiated:
            leaves = list(self.inputs.values())
            grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
            self.tensors |= {
                f"grad/{name}": g.numpy().copy() for name, g in zip(self.inputs, grads, strict=True)
            }
        for name, array in self.tensors.items():
            if not np.isfinite(array).all():
                raise ValueError(f"{self.name}/{name} is not finite")
        return self
