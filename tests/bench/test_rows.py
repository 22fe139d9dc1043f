"""Each row: its bytes and floors, its launches, its error against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from refimpl.bench.rows import ROWS
from refimpl.bench.works import Maker, number_type

from bench.examples import DryLaunch, results
from bench.sizes import V3
from kernel_support import ON_DEVICE, make_launch

T = 4096
D = 7168
H = 128
F = 18432
E = 256
K = 8
W = 129280
FLOORS = {  # (bytes, by hand, and the µs of the row at 3.0 TB/s and 798 TFLOP/s)
    "RMSNorm forward": (4 * T * D, 39), "RMSNorm backward": (6 * T * D, 59),
    "RoPE forward": (4 * T * H * 64, 45), "RoPE backward": (4 * T * H * 64, 45),
    "SwiGLU forward": (6 * T * F, 151), "SwiGLU backward": (10 * T * F, 252),
    "attention forward, 1k": (4 * 1024 * H * 320, 56),  # of bytes; all others of products
    "attention backward, 1k": (8 * 1024 * H * 320, 140),
    "attention forward, 4k": (4 * T * H * 320, 861),
    "attention backward, 4k": (8 * T * H * 320, 2239),
    "attention forward, 16k": (16 * T * H * 320, 13.8e3),
    "attention backward, 16k": (32 * T * H * 320, 35.8e3),
    "attention forward, 32k": (32 * T * H * 320, 55.1e3),
    "attention backward, 32k": (64 * T * H * 320, 143e3),
    **{f"MLA decode, 16 heads, {n}k": (256 * 1024 * n * 576, 50.3 * n) for n in (1, 4, 16, 64)},
    **{f"MLA decode, 128 heads, {n}k": (256 * 1024 * n * 576, 50.3 * n) for n in (1, 4, 16, 64)},
    "gate top-k": (4 * T * E, 1.4), "MoE permute": (2 * T * D + 2 * T * K * D, 176),
    "MoE combine": (2 * T * D + 2 * T * K * D, 176),
    "MoE layer, 8 experts, balanced": (D * (8 * T + 18 * 8 * 2048), 10.86e3),  # of products
    "MoE layer, 64 experts, balanced": (D * (8 * T + 18 * 64 * 2048), 10.86e3),
    "MoE layer, 256 experts, balanced": (D * (8 * T + 18 * 256 * 2048), 22.6e3),  # of bytes
    "MoE layer, 64 experts, Zipf": (D * (8 * T + 18 * 64 * 2048), 10.86e3),
    "MoE layer, 64 experts, one hot": (D * (8 * T + 18 * 64 * 2048), 10.86e3),
    "CE forward + backward in place": (4 * T * W, 706),
    "head + CE": (2 * D * (2 * T + 3 * W), 28.5e3),  # h, w and dh in two bytes, dw in four
    "GRPO from log-probabilities": (24 * 2**20, 8.4), "AdamW step": (28 * 2**28, 2505),
}  # fmt: skip


def test_bytes_and_floors() -> None:
    assert list(FLOORS) == list(ROWS)
    for name, (by_hand, microseconds) in FLOORS.items():
        row = ROWS[name]
        counted = row.bytes(row.sizes)
        assert counted == by_hand, name
        flops = row.flops(row.sizes) if row.flops else 0
        (row,) = results(name=name, bytes=counted, flops=flops).rows
        assert row.floor(3.0e12, 798e12) * 1e6 == pytest.approx(microseconds, rel=0.03), name
    assert ROWS["head + CE"].flops(V3) == 6 * T * D * W


TARGETS = {  # the share of the floor's rate that is asked for, by hand
    "RMSNorm forward": 39.1 / 45, "RMSNorm backward": 58.7 / 70,
    "RoPE forward": 44.7 / 50, "RoPE backward": 44.7 / 50,
    "SwiGLU forward": 151 / 165, "SwiGLU backward": 251.7 / 275,
    "attention forward, 1k": 55.9 / 137.5, "attention backward, 1k": 2.24 / 7.5,
    "attention forward, 4k": 0.86 / 2.2, "attention backward, 4k": 2.24 / 7.5,
    "attention forward, 16k": 0.86 / 2.2, "attention backward, 16k": 2.24 / 7.5,
    "attention forward, 32k": 0.86 / 2.2, "attention backward, 32k": 2.24 / 7.5,
    **{f"MLA decode, 16 heads, {n}k": 201 / 225 for n in (1, 4, 16, 64)},
    **{f"MLA decode, 128 heads, {n}k": 201 / 400 for n in (1, 4, 16, 64)},
    "gate top-k": 1.4 / 7, "MoE permute": 176 / 210, "MoE combine": 176 / 210,
    "MoE layer, 8 experts, balanced": 400 / 798, "MoE layer, 64 experts, balanced": 400 / 798,
    "MoE layer, 64 experts, Zipf": 400 / 798, "MoE layer, 64 experts, one hot": 400 / 798,
    "CE forward + backward in place": 706 / 1150, "head + CE": 28.5 / 33,
    "AdamW step": 9.3 / 10.2,
}  # fmt: skip


def test_targets() -> None:
    without = {"GRPO from log-probabilities", "MoE layer, 256 experts, balanced"}
    assert set(ROWS) - set(TARGETS) == without
    for name, row in ROWS.items():
        asked = row.asked()
        assert asked == (pytest.approx(TARGETS[name], rel=0.01) if name in TARGETS else None), name


class DryMaker(Maker):
    def normal(self, *shape: int, dtype: Any = None, scale: float = 1) -> Any:
        return np.zeros(shape, self.storage if dtype is None else dtype)


# What the kernels' arguments hold, over the row's bytes: an array that is read and one that is
# written count once each.
ARGUMENTS = {
    "RMSNorm backward": 1.083,  # 256 partial sums of dw, written and read again
    "RoPE forward": 1.008, "RoPE backward": 1.008,  # cos and sin in float32
    "gate top-k": 2.098,  # the scores are written too, for the backward, and ids in int64
    "CE forward + backward in place": 0.5,  # the logits are read and written in place
    # the gradient is one array that is written, read and written
    "GRPO from log-probabilities": 18 / 24,
    "AdamW step": 20 / 28,  # m and v are read and written; p is given twice, as its own master
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if not row.flops])
def test_arguments_of_the_kernels_are_the_bytes(name: str) -> None:
    """At V3's shapes, without executing: what the launches touch is what the row counts, or it is
    said why not."""
    row, launch = ROWS[name], DryLaunch()
    sizes = replace(V3, tokens=64) if row.stem == "cross_entropy" else replace(V3, parameters=2**20)
    work = row.make(DryMaker(launch, np, sizes, number_type(row.storage), 0))
    launch.seen.clear()
    work.run()
    arrays = [x for arguments in launch.seen for x in arguments if isinstance(x, np.ndarray)]
    assert sum(x.nbytes for x in arrays) / row.bytes(sizes) == pytest.approx(
        ARGUMENTS.get(name, 1), rel=2e-3
    )


@pytest.mark.skipif(not ON_DEVICE, reason="shapes for a GPU: make gpu")
@pytest.mark.parametrize("name", ROWS)
def test_v3_shapes(name: str) -> None:
    """On the GPU: at V3's shapes, against the float64 reference on the GPU."""
    import cupy

    row = ROWS[name]
    work = row.make(Maker(make_launch(), cupy, row.sizes, number_type(row.storage), 0))
    errors = work.check()
    assert all(error <= 1 for error in errors.values()), f"{name}: {errors}"
    del work
    cupy.get_default_memory_pool().free_all_blocks()
