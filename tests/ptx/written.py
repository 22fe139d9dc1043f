"""Kernels written by hand, to test the interpreter with."""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx import run

HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n"

INF, NAN = np.inf, np.nan

REGISTERS = """
    .reg .pred %p<20>;
    .reg .b16 %h<20>;
    .reg .b32 %r<40>;
    .reg .f32 %f<20>;
    .reg .f64 %fd<20>;
    .reg .b64 %rd<20>;
"""


def kernel(body: str, parameters: int = 1, extra: str = "") -> str:
    """A kernel `k` with pointers a, b, … in %rd1, %rd2, …, and the thread's number in %r0."""
    formal = ",\n".join(f".param .u64 k_{i}" for i in range(parameters))
    loads = "".join(f"ld.param.u64 %rd{i + 1}, [k_{i}];\n" for i in range(parameters))
    return f"{HEAD}{extra}\n.visible .entry k(\n{formal}\n)\n{{{REGISTERS}{loads}mov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"


def threads(body: str, count: int = 32, grid: int = 1, **options: Any) -> np.ndarray:
    """Each thread's %r1 (u32) after the body; %r2 is the block's number."""
    tail = f"mad.lo.s32 %r30, %r2, {count}, %r0;\nmul.wide.u32 %rd9, %r30, 4;\nadd.s64 %rd9, %rd9, %rd1;\n"
    out = np.zeros(count * grid, np.uint32)
    extra = options.pop("extra", "")
    text = kernel(f"mov.u32 %r2, %ctaid.x;\n{body}\n{tail}st.global.u32 [%rd9], %r1;", extra=extra)
    run(text, "k", grid, count, [out], **options)
    return out
