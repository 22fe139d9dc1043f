"""Divergence, reconvergence, blocks, and what a run refuses."""

from __future__ import annotations

import numpy as np
import pytest

from ptx import PTXError, run
from ptx.written import kernel, threads


def test_divergent_loop_and_reconvergence() -> None:
    """Each thread loops as often as its number; both ways of a branch run."""
    body = """
    mov.u32 %r1, 0; mov.u32 %r3, %r0;
$LOOP: setp.eq.u32 %p1, %r3, 0;
    @%p1 bra $DONE;
    add.s32 %r1, %r1, %r3; sub.s32 %r3, %r3, 1;
    bra.uni $LOOP;
$DONE: and.b32 %r4, %r0, 1; setp.ne.u32 %p2, %r4, 0;
    @%p2 bra $ODD;
    add.s32 %r1, %r1, 1000; bra $JOIN;
$ODD: add.s32 %r1, %r1, 2000;
$JOIN: @%p2 bra $END;
    add.s32 %r1, %r1, 10000;
$END:"""
    n = np.arange(70)
    np.testing.assert_array_equal(
        threads(body, 70), n * (n + 1) // 2 + np.where(n % 2, 2000, 11000)
    )


def test_early_exit_and_special_registers() -> None:
    body = "setp.lt.u32 %p1, %r0, 5; @%p1 bra $A; ret; $A: mov.u32 %r4, %ntid.x; mad.lo.s32 %r1, %r0, 100, %r4;"
    assert threads(body, 40).tolist() == [40, 140, 240, 340, 440] + [0] * 35


def test_blocks_and_seeds() -> None:
    """Many blocks in chunks; the report counts each thread's instructions; a seed repeats."""
    np.testing.assert_array_equal(
        threads("add.s32 %r1, %r2, %r0;", 64, 700),
        (np.arange(700)[:, None] + np.arange(64)).ravel(),
    )
    out = np.zeros(64, np.uint32)
    text = kernel(
        "mul.wide.u32 %rd9, %r0, 4;\nadd.s64 %rd9, %rd9, %rd1;\nst.global.u32 [%rd9], %r0;\nbar.sync 0;"
    )
    report = run(text, "k", 1, 64, [out])
    assert (report.instructions, report.barriers) == (64 * 7, 1)
    assert report.written["global"] == 256
    assert report.histogram["st.global.u32"] == 64


def test_lanes_wait_for_their_mates() -> None:
    """A shuffle after divergent code waits until all have come."""
    late = "setp.lt.u32 %p1, %r0, 7;\n@%p1 bra $A;\nbra $B;\n$C: shfl.sync.bfly.b32 %r1|%p2, %r3, 1, 31, -1;\nbra $END;\n"
    late += "$A: mov.u32 %r3, 5;\nbra $C;\n$B: mov.u32 %r3, 6;\nbra $C;\n$END:"
    assert threads(late).tolist() == [5] * 6 + [6, 5] + [6] * 24


def test_lanes_do_not_wait_for_mates_that_exit_later() -> None:
    body = "setp.lt.u32 %p1, %r0, 9;\n@%p1 bra $A;\nbar.warp.sync -1;\nmov.u32 %r1, 9;\nbra $B;\n$A: ret;\n$B:"
    assert threads(body).tolist() == [0] * 9 + [9] * 23


def test_warps_that_left_before_the_barrier() -> None:
    body = "setp.lt.u32 %p1, %r0, 64;\n@%p1 bra $A;\nret;\n$A: bar.sync 0;\nmov.u32 %r1, 9;"
    assert threads(body, 128).tolist() == [9] * 64 + [0] * 64


def test_wrong_arguments() -> None:
    text, x = kernel(""), np.zeros((4, 4), np.float32)
    for arguments, message in [
        ([], "arguments must be 1 for k, got 0"),
        ([np.float32(1)], "argument 0 must have 8 bytes"),
        ([np.broadcast_to(x, (2, 4, 4))], "argument 0 must be C-contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(text, "k", 1, 32, arguments)
    with pytest.raises(ValueError, match="must not overlap"):
        run(kernel("", 2), "k", 1, 32, [x[:2], x[1:]])
    with pytest.raises(ValueError, match="kernel must be one of"):
        run(text, "q", 1, 32, [x])
    with pytest.raises(ValueError, match="block must have"):
        run(text, "k", 1, 2048, [x])
    with pytest.raises(ValueError, match="grid 1 to"):
        run(text, "k", (1, 1 << 16), 32, [x])
    with pytest.raises(ValueError, match=r"shared memory must be at most 49152 bytes .* got 49153"):
        run(kernel(".shared .align 4 .b8 s[1024];"), "k", 1, 32, [x], shared=(47 << 10) + 1)


def test_a_kept_machine_remembers_nothing() -> None:
    """Launch after launch of one kernel: other scalars and arrays, errors, shared memory and
    registers that the last launch has written."""
    shared = """.shared .align 4 .b8 s[128]; cvt.u32.u64 %r3, %rd2;
    mov.u32 %r5, s; shl.b32 %r4, %r0, 2; add.s32 %r4, %r4, %r5;
    setp.eq.u32 %p1, %r3, 0; @%p1 bra $READ; st.shared.u32 [%r4], %r3;
    $READ: ld.shared.u32 %r6, [%r4];
    mul.wide.u32 %rd4, %r0, 4; add.s64 %rd4, %rd4, %rd1; st.global.u32 [%rd4], %r6;"""
    text = kernel(shared, 2)
    for value, x in ((7, np.zeros(32, np.uint32)), (8, np.zeros(40, np.uint32))):
        run(text, "k", 1, 32, [x, np.uint64(value)])
        assert x[:32].tolist() == [value] * 32
        with pytest.raises(PTXError, match=r"ld\.shared.*never written"):
            run(text, "k", 1, 32, [x, np.uint64(0)])
        with pytest.raises(PTXError, match="out of bounds: global byte 124 of argument 0"):
            run(text, "k", 1, 32, [x[:31].copy(), np.uint64(1)])
    register = """setp.eq.s64 %p1, %rd2, 0; @%p1 bra $END; mov.u32 %r9, 3;
    $END: st.global.u32 [%rd1], %r9;"""
    for value, wanted in ((0, 0xABABABAB), (1, 3), (0, 0xABABABAB)):
        run(kernel(register, 2), "k", 1, 1, [x, np.uint64(value)])
        assert x[0] == wanted
    for _ in range(2):  # where the first launch had its array
        with pytest.raises(PTXError, match="out of bounds: global byte -512 of argument 0"):
            run(kernel("st.global.u32 [%rd1+-512], 5;"), "k", 1, 1, [x])


def test_what_is_never_reached_is_known_too() -> None:
    body = "bra $END; add.odd.s32 %r1, %r1, %r1; $END:"
    for _ in range(2):
        with pytest.raises(PTXError, match=r"the instruction add\.odd\.s32"):
            threads(body)
