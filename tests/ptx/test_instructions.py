"""Instructions of warps, and what the interpreter must refuse."""

from __future__ import annotations

import numpy as np
import pytest

from ptx import PTXError, run
from ptx.written import kernel, threads

SHUFFLES = {
    "bfly.b32 %r1|%p1, %r0, 1, 31": lambda i: i ^ 1,
    "up.b32 %r1|%p1, %r0, 3, 0": lambda i: np.where(i >= 3, i - 3, i),
    "idx.b32 %r1|%p1, %r0, 7, 31": lambda i: np.full(32, 7),
    "up.b32 %r1|%p1, %r0, 2, 0x1800": lambda i: np.where(i % 8 >= 2, i - 2, i),
    "idx.b32 %r1|%p1, %r0, 1, 0x1c1f": lambda i: i // 4 * 4 + 1,  # segments of 4
    "bfly.b32 %r1|%p1, %r0, 4, 0x1c03": lambda i: np.where(i ^ 4 <= (i & 28 | 3), i ^ 4, i),
}


@pytest.mark.parametrize("form", SHUFFLES)
def test_shuffles(form: str) -> None:
    np.testing.assert_array_equal(threads(f"shfl.sync.{form}, -1;"), SHUFFLES[form](np.arange(32)))


def test_reductions_of_a_warp() -> None:
    np.testing.assert_array_equal(
        threads("redux.sync.max.u32 %r1, %r0, -1;", 64), [31] * 32 + [63] * 32
    )
    body = "sub.s32 %r3, %r0, 40;\nredux.sync.min.s32 %r1, %r3, -1;\nadd.s32 %r1, %r1, 40;"
    np.testing.assert_array_equal(threads(body, 64), [0] * 32 + [32] * 32)
    leave = (
        "setp.{} %p1, %r0, 19;\n@%p1 bra $A;\nredux.sync.{} %r1, %r0, -1;\nbra $B;\n$A: ret;\n$B:"
    )
    assert (
        threads(leave.format("gt.u32", "max.u32")).tolist() == [19] * 20 + [0] * 12
    )  # lanes that exited don't count
    assert threads(leave.format("lt.u32", "min.s32")).tolist() == [0] * 19 + [19] * 13
    assert threads("redux.sync.max.u32 %r1, %r0, -1;", 20).tolist() == [19] * 20


REFUSED = {
    "add.f99 %r1, %r1, %r1;": "the instruction add.f99 is not supported",
    "add.odd.s32 %r1, %r1, %r1;": "the instruction add.odd.s32",
    "add.s64 %rd1, %r1, %r1;": ".b32 %r1 as .s64",
    "wgmma.fence.sync.aligned;": "the instruction wgmma",
    "fma.rz.f32 %f1, %f1, %f1, %f1;": "the instruction fma.rz.f32",
    "ex2.approx.f64 %fd1, %fd1;": "the instruction ex2.approx.f64",
    "mov.u32 %r1, %smid;": "special register %smid",
    "mov.u64 %rd1, nowhere;": "the name nowhere",
    "setp.gt.u32 %p1, %r0, 3; @%p1 mov.u32 %r1, 5;": "a guard",
    "bra $NOWHERE;": "this form of bra",
    "ld.volatile.global.u32 %r1, [%rd1];": "the instruction ld.volatile",
    "atom.global.max.u32 %r1, [%rd1], 5;": "the instruction atom.global.max",
    "cp.async.cg.shared.global [%r1], [%rd1], 4;": "this form of cp.async",
    "shfl.sync.down.b32 %r1|%p1, %r0, 1, 31, -1;": "the instruction shfl.sync.down",
    "shfl.sync.idx.b32 %r1|%p1, %r0, 9, 31, 0xFF;": "member mask 0xff",
    "redux.sync.add.u32 %r1, %r0, -1;": "the instruction redux.sync.add.u32",
    "bar.sync 1;": "this form of bar.sync",
    "bar.sync 0, 64;": "this form of bar.sync",
    "$A: bra $A;": "endless loop",
    "setp.gt.u32 %p1, %r0, 3; $A: @%p1 bra $A; bra $B; $C: @!%p1 bra $C; $B: bra $C;": "endless loop",
    "st.global.v2.u32 [%rd1+-8], {%r0, %r0};": "out of bounds",
    "ld.global.u32 %r1, [%rd1+4];": "out of bounds: global byte 4 of argument 0 uint32.1., which has 4 bytes",
    "ld.global.u32 %r1, [%rd1+-4];": "out of bounds: global byte -4",
    "ld.global.u16 %h1, [%rd1+1];": "misaligned",
    "ld.global.u64 %rd2, [%rd1];": "out of bounds",
    "ld.global.u32 %r1, [%r31];": "near no variable",
    "st.global.u32 [%rd1], %r0;": "by the same instruction",
    "setp.le.u32 %p1, %r0, 3; @%p1 bra $A; bar.sync 0; $A: mov.u32 %r1, 1;": "thread .4, 0, 0.: barrier in",
    ".shared .align 4 .b8 s[64]; mov.u64 %rd2, s; st.shared.v2.u32 [%rd2], {%r0, %r0};": "misaligned",
    "setp.gt.u32 %p1, %r0, 3; @%p1 bra $A; bar.warp.sync -1; bra $A; $A: bar.warp.sync -1;": "lanes missing",
}


@pytest.mark.parametrize("body", REFUSED)
def test_what_is_refused(body: str) -> None:
    """Each error names the kernel, the line and the instruction's text."""
    with pytest.raises(PTXError, match=REFUSED[body]) as caught:
        run(kernel(body), "k", 1, 32, [np.zeros(1, np.uint32)], limit=1000)
    assert "k, line" in str(caught.value)
