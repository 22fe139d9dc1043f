"""What the kernels that memory bounds execute per element, and the share of the card's copy rate
that this predicts.

``python tests/shares.py`` prints the table of kernels/README.md; `BEFORE` holds what it printed at
commit b7be57f. Nothing here is a time: the shares are arithmetic.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import ml_dtypes
import numpy as np

from refimpl.kernels.adamw import adamw
from refimpl.kernels.compile import Module
from refimpl.kernels.cross_entropy import cross_entropy, cross_entropy_in_place
from refimpl.kernels.rms_norm import rms_norm
from refimpl.kernels.rope import rope
from refimpl.kernels.swiglu import swiglu
from refimpl.optimizer import Moments

from kernel_support.sass import machine_code
from ladder import CountingLaunch

# An H200: bytes per second that its copy moves, and instructions of threads per second: 132
# multiprocessors start an instruction of 4 warps in each of 1.755 · 10⁹ cycles.
COPY = 4.3e12
ISSUE = 132 * 4 * 32 * 1.755e9
# What a multiprocessor of it holds (CUDA C++ Programming Guide, compute capability 9.0)
REGISTERS = 65536
WARPS = 64
BLOCKS = 32


class Share(NamedTuple):
    ptx: float  # executed instructions of PTX per element
    machine: float  # of machine code, estimated
    blocks: int  # on a multiprocessor at once, by registers: of the kernel with the fewest
    share: float  # of the copy rate


class Launch(CountingLaunch):
    """Keeps modules and threads of a block besides."""

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
    """Blocks of so many threads that a multiprocessor holds, if each thread has so many registers:
    a warp gets them in 256s."""
    warps = -(-threads // 32)
    of_a_warp = -(-registers * 32 // 256) * 256
    # warps are dealt to four schedulers, each of which has a quarter of the registers
    return min(4 * (REGISTERS // 4 // of_a_warp) // warps, WARPS // warps, BLOCKS)


@cache
def machine_per_ptx(module: Module) -> dict[str, float]:
    """Instructions of machine code for each of PTX, in the text of each kernel; without what lies
    behind calls, the division of numbers near the ends of the range."""
    written = {}
    for part in module.ptx.split(".entry ")[1:]:
        body = part.split("\n{", 1)[1]
        written[re.split(r"\W", part)[0]] = len(re.findall(r"(?m)^\s*(?!\.)[^/\n]*;", body))
    found = {}
    for kernel, code in machine_code(module).items():
        own = re.split(r"(?m)^\$[\w$]+:", code)[0]
        opcodes = re.findall(r"(?m)^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?(\w+)", own)
        found[kernel] = (len(opcodes) - Counter(opcodes)["NOP"]) / written[kernel]
    return found


def share_of(launch: Launch, elements: int, least: float, moved: float | None = None) -> Share:
    """Of bytes per element: those that the row counts, and those that the kernels move.

    The time is that of memory and of the instructions that no other block of the multiprocessor
    covers, at least that of all instructions.
    """
    ptx = machine = alone = 0.0
    fewest = BLOCKS
    for (kernel, report), (module, threads) in zip(launch.reports, launch.launched, strict=True):
        own = report.instructions / elements
        translated = own * machine_per_ptx(module)[kernel]
        blocks = blocks_at_once(module.usage[kernel].registers, threads)
        ptx += own
        machine += translated
        alone += translated / blocks
        fewest = min(fewest, blocks)
    memory = (least if moved is None else moved) / COPY
    time = max(memory + alone / ISSUE, machine / ISSUE)
    return Share(ptx, machine, fewest, least / COPY / time)


def _drawn(*shape: int, dtype: Any = ml_dtypes.bfloat16) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(dtype)


def _rms_norm(backward: bool) -> Share:
    rows, width = 16, 7168  # as many rows per block as at 4,096
    x, launch = _drawn(rows, width), Launch()
    pair = rms_norm(launch)
    _, saved = pair.forward(x, _drawn(width), eps=1e-6)
    if not backward:
        return share_of(launch, x.size, 4)
    launch = Launch()
    with patch("refimpl.kernels.rms_norm.PARTS", 1):
        rms_norm(launch).backward(x, saved)
    return share_of(launch, x.size, 6, 6 + 8 / rows)  # partial sums of dw, written and read


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
    _, saved = cross_entropy(launch).forward(logits, targets=np.array([7]))
    cross_entropy_in_place(launch)(1.0, saved)
    return share_of(launch, logits.size, 4, 6)


def _adamw() -> Share:
    launch = Launch()
    params = {"w": _drawn(8192, dtype=np.float32)}
    adamw(launch)().update(params, {"w": params["w"].copy()}, Moments(), 0.01)
    return share_of(launch, 8192, 28)


ROWS: dict[str, tuple[str, Callable[[], Share]]] = {
    "RMSNorm forward": ("rms_norm", lambda: _rms_norm(False)),
    "RMSNorm backward": ("rms_norm", lambda: _rms_norm(True)),
    "RoPE": ("rope", _rope),
    "SwiGLU forward": ("swiglu", lambda: _swiglu(False)),
    "SwiGLU backward": ("swiglu", lambda: _swiglu(True)),
    "CE forward + backward in place": ("cross_entropy", _cross_entropy),
    "AdamW step": ("adamw", _adamw),
}
BEFORE = {  # at commit b7be57f
    "RMSNorm forward": Share(21.03, 19.61, 4, 0.849),
    "RMSNorm backward": Share(47.41, 43.57, 1, 0.579),
    "RoPE": Share(18.19, 18.152, 12, 0.948),
    "SwiGLU forward": Share(30.50, 32.40, 8, 0.911),
    "SwiGLU backward": Share(40.88, 40.88, 6, 0.910),
    "CE forward + backward in place": Share(28.19, 26.06, 2, 0.584),
    "AdamW step": Share(56.00, 104.53, 8, 0.937),
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
