"""torch's autograd on the conformance vectors, from formulas that share no code with ours: within 4
units in float64, in float32, and in bfloat16, where torch rounds after every single operation.
Needs the extra `oracle`."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="the extra `oracle` is not installed")

from refimpl.port.cases import FACTOR
from refimpl.port.vectors import SMALL

from golden import ffn, mla, moe, rms_norm

INDEX = json.loads((SMALL / "index.json").read_text())
TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def rotated(x: Any, *given: Any, rope: Callable[..., Any] = mla.rope) -> Any:
    """In float32 for bfloat16, which has no complex type."""
    return rope(x.float() if x.dtype == torch.bfloat16 else x, *given).to(x.dtype)


def outputs(op: str, x: dict[str, Any], settings: dict[str, Any], aux: dict[str, Any]) -> Any:
    if op == "rms_norm":
        return {"y": rms_norm.rms_norm(x["x"], x["w"], **settings)}
    if op == "ffn":
        return {"y": ffn.ffn(x["x"], x["w_gate"], x["w_up"], x["w_down"])}
    if op == "mtp":
        norms = (("embedding", "w_enorm"), ("hidden", "w_hnorm"))
        halves = [rms_norm.rms_norm(x[a], x[w], settings["eps"]) for a, w in norms]
        halves = halves if settings["order"] == "embedding_hidden" else halves[::-1]
        return {"h": torch.cat(halves, -1) @ x["w_proj"].T}
    if op == "moe":
        w = {name: a for name, a in x.items() if name not in ("x", "weights")}
        return {"y": moe.moe(x["x"], x["weights"], w, aux["indices"])}
    w = {name: a for name, a in x.items() if name not in ("x", "cache")}
    y, cache = mla.mla(x["x"], x.get("cache"), w, **settings, **aux)
    return {"y": y, "cache": cache}


OPS = ("rms_norm", "ffn", "mla", "moe", "mtp")
CASES = {
    name: case
    for name, case in INDEX["metadata"]["cases"].items()
    if case["op"] in OPS and case["source"] == "refimpl"
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", CASES)
def test_torch_on_the_vectors(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mla, "rope", rotated)
    case, kind = CASES[name], TYPES[dtype]
    held = load_file(SMALL / f"{case['op']}.safetensors")
    found = {k.removeprefix(f"{name}/"): v for k, v in held.items() if k.startswith(f"{name}/")}
    inputs = {
        k[3:]: torch.tensor(x).to(kind).requires_grad_()
        for k, x in found.items()
        if k.startswith("in/")
    }
    aux = {k[4:]: torch.tensor(x) for k, x in found.items() if k.startswith("aux/")}
    y = outputs(case["op"], inputs, case["settings"], aux)
    total = sum((torch.tensor(found[f"cot/{k}"]).to(a.dtype) * a).sum() for k, a in y.items())
    grads = torch.autograd.grad(total, list(inputs.values()))
    theirs = {f"out/{k}": a for k, a in y.items()}
    theirs |= {f"grad/{k}": g for k, g in zip(inputs, grads, strict=True)}
    errors = {}
    for k, a in theirs.items():
        away = float(np.max(np.abs(a.detach().double().numpy() - found[k])))
        errors[k] = away / INDEX["tensors"][f"{name}/{k}"]["units"][dtype]
    wrong = sorted(k for k, x in errors.items() if not x <= FACTOR)
    assert wrong == sorted(case["differs"]), errors
