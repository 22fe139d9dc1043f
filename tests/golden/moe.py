"""The mixture of experts, a slot at a time."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from golden.case import Case
from golden.ffn import ffn
from golden.router import repeated


def moe(x: Tensor, weights: Tensor, w: dict[str, Tensor], indices: Tensor) -> Tensor:
    """DeepSeek-V3 eq. 12: a token at a time, an expert at a time; the shared experts unscaled."""
    rows, gates, chosen = x.flatten(0, -2), weights.flatten(0, -2), indices.flatten(0, -2).tolist()
    outputs = []
    for m, experts in enumerate(chosen):
        y = torch.zeros_like(rows[m])
        for k, i in enumerate(experts):
            y = y + gates[m, k] * ffn(rows[m], w["w_gate"][i], w["w_up"][i], w["w_down"][i])
        if "w_shared_gate" in w:
            y = y + ffn(rows[m], w["w_shared_gate"], w["w_shared_up"], w["w_shared_down"])
        outputs.append(y)
    return torch.stack(outputs).unflatten(0, x.shape[:-1])


def cases() -> Iterable[Case]:
    for name, shared, top_k in (("shared", 4, 2), ("routed_alone", 0, 3), ("one_choice", 4, 1)):
        case = Case(f"moe/{name}")
        x = case.input("x", values=repeated(case, 2, 4, 5))
        weights = case.input("weights", 2, 4, top_k, mean=0.5)
        experts, hidden = 6, 3
        w = {
            "w_gate": case.input("w_gate", experts, hidden, 5),
            "w_up": case.input("w_up", experts, hidden, 5),
            "w_down": case.input("w_down", experts, 5, hidden),
        }
        if shared:
            w["w_shared_gate"] = case.input("w_shared_gate", shared, 5)
            w["w_shared_up"] = case.input("w_shared_up", shared, 5)
            w["w_shared_down"] = case.input("w_shared_down", 5, shared)
        busy = np.array([0, 1, 3, 4, 5])  # expert 2 gets no token
        choices = np.array(
            [[case.rng.permutation(busy)[:top_k] for _ in range(4)] for _ in range(2)]
        )
        yield case.finish(y=moe(x, weights, w, case.aux("indices", choices)))
