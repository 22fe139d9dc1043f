"""The parts of a run: every tensor in one of them, in the order in which a porter reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from refimpl.errors import CouldNotRun
from refimpl.port.parts import parts_of
from refimpl.port.truth import Entry, Truth

from port.examples import Example


def test_every_tensor_is_in_one_part(example: Example) -> None:
    parts = parts_of(Truth.open(example.truth))
    told = [name for part in parts for name in part.tensors]
    assert len(told) == len(set(told))
    assert set(told) == {name for name in example.arrays if not name.startswith("in/")}


def test_reading_order(example: Example) -> None:
    """Forward from the tokens to the loss; then backward from the loss down."""
    parts = parts_of(Truth.open(example.truth))
    names = [part.name for part in parts]
    assert names[:4] == [
        "embedding, forward",
        "layer 0, attention, forward",
        "layer 0, network, forward",
        "layer 1, attention, forward",
    ]
    half = names.index("loss, forward") + 1
    assert all(name.endswith("forward") for name in names[:half])
    assert all(name.endswith("backward") for name in names[half:])
    assert names[half : half + 4] == [
        "layer 3, mtp, backward",
        "layer 3, network, backward",
        "layer 3, attention, backward",
        "layer 3, mtp, backward",
    ]
    assert names[-2:] == ["layer 0, attention, backward", "embedding, backward"]


def test_order_within_a_part(example: Example) -> None:
    parts = {p.name: p.tensors for p in parts_of(Truth.open(example.truth))}
    last = [name.rpartition("model.layers.1.")[2] for name in parts["layer 1, attention, backward"]]
    assert [name for name in last if "norm" not in name] == [
        "self_attn",
        *(f"self_attn.{x}.weight" for x in ("o_proj", "kv_b_proj", "kv_a_proj_with_mqa")),
        *(f"self_attn.{x}.weight" for x in ("q_b_proj", "q_a_proj")),
        "cot/model.layers.0",
    ]
    experts = parts["layer 1, network, backward"]
    assert experts[0].endswith("shared_experts.down_proj.weight")
    assert experts[3].endswith("mlp.experts.0.down_proj.weight")
    assert experts[-1] == "cot/model.layers.1.after_attention"


def vectors(cases: dict[str, Any]) -> Truth:
    entry = Entry((2,), "float64", "x.safetensors", "y", 1.0, {"float32": 1e-7})
    names = ["mla-1/in/x", "mla-1/out/y", "mla-1/grad/x", "mla-1/grad/w", "moe-1/out/y"]
    metadata = {"kind": "vectors", "config": None, "cases": cases}
    return Truth(Path("there"), metadata, dict.fromkeys(names, entry))


def test_a_case_is_a_part() -> None:
    parts = parts_of(vectors({"mla-1": {"op": "mla"}, "moe-1": {"op": "moe"}}))
    assert [(part.name, part.tensors, part.ops) for part in parts] == [
        ("mla-1, forward", ("mla-1/out/y",), ("mla",)),
        ("mla-1, backward", ("mla-1/grad/x", "mla-1/grad/w"), ("mla",)),
        ("moe-1, forward", ("moe-1/out/y",), ("moe",)),
    ]


def test_a_case_that_is_not_described() -> None:
    with pytest.raises(CouldNotRun, match=r"there/index.json does not say what moe-1 is"):
        parts_of(vectors({"mla-1": {"op": "mla"}}))
