"""Machine code as nvdisasm shows it, and how many loads it has on their way at once.

An instruction is 128 bits. Since sm_70 the upper half says in bits 46 to 48 which of six counters a
load raises until its data is there (7: none), and in bits 52 to 57 which counters must be 0 before
the instruction starts. NVIDIA has not documented these bits; others have read them (Jia et al.,
arXiv 1804.06826, on control information).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refimpl.kernels.compile import Module


def machine_code(module: Module) -> dict[str, str]:
    """Text and bits by the kernel's name; skips the test if there is no nvdisasm."""
    packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    disassembler = shutil.which("nvdisasm") or str(
        Path(sys.prefix) / packages / "nvidia/cu13/bin/nvdisasm"
    )
    if not Path(disassembler).is_file():
        pytest.skip("there is no nvdisasm: pip install nvidia-cuda-nvdisasm")
    command = [disassembler, "-c", "-hex", str(module.cubin)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    _, *parts = re.split(r"\.section\s+\.text\.(\w+)", done.stdout)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def loads_in_flight(code: str) -> int:
    """The most 16-byte loads of global memory on any path from the start, before the first wait for
    one of them."""
    instructions: list[tuple[str, int]] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        if label := re.match(r"(\.L_\w+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;?\s*/\* 0x", line):
            instructions.append((found[1], 0))
        elif (upper := re.match(r"\s*/\* (0x[0-9a-f]+) \*/", line)) and instructions:
            instructions[-1] = instructions[-1][0], int(upper[1], 16)
    most = 0
    seen = set()
    paths = [(0, 0, 0)]
    while paths:
        at, raised, loads = paths.pop()
        if at >= len(instructions) or (at, raised, loads) in seen:
            continue
        seen.add((at, raised, loads))
        text, bits = instructions[at]
        if bits >> 52 & raised or (raised and "DEPBAR" in text) or re.match("EXIT|RET", text):
            continue
        if re.search(r"\bLDG\.E.*\.128", text):
            raised, loads = raised | 1 << (bits >> 46 & 7), loads + 1
            most = max(most, loads)
        if branch := re.search(r"\bBRA\b.*\((\.L_\w+)\)", text):
            paths.append((labels[branch[1]], raised, loads))
            if re.match(r"BRA `", text):  # else it may go on below
                continue
        paths.append((at + 1, raised, loads))
    return most
