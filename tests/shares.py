"""What the kernels bound by memory execute per element, and the share of the card's copy rate that
this predicts.

``python tests/shares.py`` prints the table of kernels/README.md; `BEFORE` holds what it printed at
commit b7be57f. Nothing here is a time: the shares are arithmetic.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from math import hypot
from typing import Any, NamedTuple
from unittest.mock import patch

import ml_dtypes
import numpy as np

from refimpl.kernels.adamw import adamw
from refimpl.kernels.compile import Module
from refimpl.kernels.cross_entropy import cross_entropy_in_place
from refimpl.kernels.moe import combine, combine_backward, permute
from refimpl.kernels.rms_norm import rms_norm
from refimpl.kernels.rope import rope
from refimpl.kernels.swiglu import swiglu
from refimpl.optimizer import Moments

from ladder import CountingLaunch

# An H200: bytes per second that its copy moves, and instructions per second, counted once per
# thread: in each of 1.755 · 10⁹ cycles 132 multiprocessors start an instruction of 4 warps of 32.
COPY = 4.3e12
ISSUE = 132 * 4 * 32 * 1.755e9
# What a multiprocessor of it holds (CUDA C++ Programming Guide, compute capability 9.0)
REGISTERS = 65536
WARPS = 64
BLOCKS = 32
TIED = ("rms_norm_forward", "rms_norm_backward")  # by a barrier per row: a block waits as a whole


class Share(NamedTuple):
    ptx: float  # instructions of PTX executed per element
    machine: float  # of machine code, estimated
    blocks: int  # on a multiprocessor at once, by registers: of the kernel with the fewest
    share: float  # of the copy rate


class Launch(CountingLaunch):
    """Also keeps each launch's module and threads per block."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[tuple[Module, int]] = []

    def __call__(
        self,
        module: Module,
        kernel: str,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: Sequence[Any],
        *,
        shared: int = 0,
    ) -> None:
        super().__call__(module, kernel, grid, block, arguments, shared=shared)
        self.launched.append((module, int(np.prod(block))))


def blocks_at_once(registers: int, threads: int) -> int:
    """Blocks of ``threads`` threads that a multiprocessor holds, at ``registers`` per thread: a
    warp gets registers in multiples of 256."""
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // 256) * 256
    # warps are dealt to four schedulers, each of which has a quarter of the registers
    return min(4 * (REGISTERS // 4 // of_a_warp) // warps, WARPS // warps, BLOCKS)


# Instructions of sm_90's machine code per instruction of PTX, as NVRTC 13 translates kernels of one
# line. The first pattern that matches the beginning of an opcode counts; others count 1.
WEIGHTS = {
    r"mov|cvta|ld\.param": 0,  # of names, of address spaces, of constants: operands
    r"cvt\.rn\.bf16\.f32": 0.5,  # two in one
    r"ex2\.approx\.f32": 4,  # with the range's correction
    r"(div|sqrt)\.rn\.f32": 9,  # and a call, near the ends of the range
    r"(div|rem)\.[su]64": 24,  # where 32 bits are enough, else a call
    r"(div|rem)\.[su]32": 17,
    r"(add|sub|min|setp\.\w+|shl)\.[sub]64": 2,
}


def machine_of(histogram: Counter[str]) -> float:
    """Instructions of machine code, estimated from those of PTX."""
    total = 0.0
    for opcode, count in histogram.items():
        total += count * next((w for like, w in WEIGHTS.items() if re.match(like, opcode)), 1)
    return total


def share_of(launch: Launch, elements: int, least: float, more: float = 0) -> Share:
    """The prediction for what ``launch`` executed on ``elements`` elements. ``least``: bytes per
    element that the row counts; ``more``: those that the kernels move besides.

    Memory and instructions overlap, but not always: the squares of their times add up to that of
    the whole. Instructions that no other warp can hide come on top: one block's of all that are on
    the multiprocessor, where a barrier ties a block's warps, else one warp's.
    """
    ptx = machine = alone = 0.0
    fewest = BLOCKS
    for (kernel, report), (module, threads) in zip(launch.reports, launch.launched, strict=True):
        own = report.instructions / elements
        translated = machine_of(report.histogram) / elements
        blocks = blocks_at_once(module.usage[kernel].registers, threads)
        ptx += own
        machine += translated
        alone += translated / (blocks if kernel in TIED else blocks * -(-threads // 32))
        fewest = min(fewest, blocks)
    covered = (machine - alone) / ISSUE
    time = hypot((least + more) / COPY, covered) + alone / ISSUE
    return Share(ptx, machine, fewest, least / COPY / time)


def _drawn(*shape: int, dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def _rms_norm(backward: bool) -> Share:
    rows, width = 128, 7168  # 16 rows per block, as at 4,096
    x, launch = _drawn(rows, width), Launch()
    _, saved = rms_norm(launch).forward(x, _drawn(width), eps=1e-6)
    if not backward:
        return share_of(launch, x.size, 4)
    launch = Launch()
    with patch("refimpl.kernels.rms_norm.PARTS", rows // 16):
        rms_norm(launch).backward(x, saved)
    return share_of(launch, x.size, 6, 8 / 16)  # partial sums of dw, written and read


def _rope() -> Share:
    x, launch = _drawn(1, 2, 128, 64), Launch()
    inv_freq = np.logspace(0, -3, 32)
    rope(launch).forward(x, positions=np.arange(2), inv_freq=inv_freq)
    return share_of(launch, x.size, 4)


def _swiglu(backward: bool) -> Share:
    x, launch = _drawn(1, 18432), Launch()
    _, saved = swiglu(launch).forward(x, x)
    if not backward:
        return share_of(launch, x.size, 6)
    launch = Launch()
    swiglu(launch).backward(x, saved)
    return share_of(launch, x.size, 10)


def _cross_entropy() -> Share:
    logits, launch = _drawn(1, 129280), Launch()
    cross_entropy_in_place(launch)(logits, targets=np.array([7]))
    return share_of(launch, logits.size, 4)  # the second read comes from L1 and L2


def _adamw() -> Share:
    launch = Launch()
    params = {"w": _drawn(8192, dtype=np.float32)}
    adamw(launch)().update(params, {"w": params["w"].copy()}, Moments(), 0.01)
    return share_of(launch, 8192, 28)


def _moe(work: str) -> Share:
    """Per element of the rows sent to experts, eight per token."""
    tokens, top_k = 4, 8
    x, rows = _drawn(tokens, 7168), _drawn(tokens * top_k, 7168)
    launch = Launch()
    where = np.random.default_rng(1).permutation(tokens * top_k)
    weights = np.ones((tokens, top_k), np.float32)
    if work == "permute":
        permute(launch, x, where, top_k)
    elif work == "combine":
        combine(launch, rows, where, weights)
    else:
        combine_backward(launch, x, rows, where, weights)
    return share_of(launch, rows.size, (2 if work != "combine backward" else 4) + 2 / top_k)


ROWS: dict[str, tuple[str, Callable[[], Share]]] = {
    "RMSNorm forward": ("rms_norm", lambda: _rms_norm(False)),
    "RMSNorm backward": ("rms_norm", lambda: _rms_norm(True)),
    "RoPE": ("rope", _rope),
    "SwiGLU forward": ("swiglu", lambda: _swiglu(False)),
    "SwiGLU backward": ("swiglu", lambda: _swiglu(True)),
    "MoE permute": ("moe", lambda: _moe("permute")),
    "MoE combine": ("moe", lambda: _moe("combine")),
    "MoE combine backward": ("moe", lambda: _moe("combine backward")),
    "CE forward + backward in place": ("cross_entropy", _cross_entropy),
    "AdamW step": ("adamw", _adamw),
}
BEFORE = {  # at commit b7be57f
    "RMSNorm forward": Share(21.027, 15.811, 4, 0.812),
    "RMSNorm backward": Share(33.196, 25.958, 1, 0.611),
    "RoPE": Share(18.188, 18.875, 12, 0.821),
    "SwiGLU forward": Share(30.5, 32.75, 8, 0.781),
    "SwiGLU backward": Share(40.875, 41.0, 6, 0.855),
    "MoE permute": Share(12.5, 10.75, 16, 0.819),
    "MoE combine": Share(7.953, 6.781, 12, 0.912),
    "MoE combine backward": Share(19.951, 16.349, 8, 0.87),
    "CE forward + backward in place": Share(28.19, 30.194, 2, 0.535),
    "AdamW step": Share(56.0, 75.0, 8, 0.929),
}
HEAD = (
    "kernel",
    "instructions of PTX per element",
    "of machine code, estimated",
    "blocks per multiprocessor",
    "predicted share of the copy rate",
)


def render() -> str:
    """What kernels/README.md holds."""
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    for row, (stem, make) in ROWS.items():
        pairs = zip(BEFORE[row], make(), strict=True)
        ptx, machine, blocks, share = (
            " → ".join(dict.fromkeys(format(x, form) for x in pair))  # once, if nothing changed
            for pair, form in zip(pairs, (".1f", ".1f", "d", ".0%"), strict=True)
        )
        cells = f"[{row}]({stem}.cu)", ptx, machine, blocks, share.replace("%", " %")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(render(), end="")
