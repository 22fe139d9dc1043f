"""Memory: what is shared, in flight, read-only, atomic; races."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ptx import PTXError, run
from ptx.memory import Arena, Order
from ptx.written import kernel, threads


@pytest.mark.parametrize("kind", ["u32", "b32"])
def test_shared_memory(kind: str) -> None:
    """Static and dynamic, by addresses of 32 and of 64 bits, of numbers and of mere bits."""
    body = """
    .shared .align 4 .b8 buffer[256];
    mov.u32 %r3, buffer; shl.b32 %r4, %r0, 2; add.s32 %r5, %r3, %r4;
    st.shared.u32 [%r5], %r0;
    mov.u64 %rd3, dynamic; mul.wide.u32 %rd4, %r0, 4; add.s64 %rd3, %rd3, %rd4;
    st.shared.u32 [%rd3], 100;
    bar.sync 0;
    xor.b32 %r6, %r4, 252; add.s32 %r6, %r6, %r3; ld.shared.u32 %r7, [%r6];
    ld.shared.u32 %r8, [%rd3]; add.s32 %r1, %r7, %r8;"""
    body = body.replace("shared.u32", f"shared.{kind}")
    extra = ".extern .shared .align 16 .b8 dynamic[];"
    np.testing.assert_array_equal(
        threads(body, 64, 2, shared=256, extra=extra), np.tile(163 - np.arange(64), 2)
    )
    with pytest.raises(
        PTXError,
        match=r"out of bounds: shared byte 128 of dynamic shared memory, which has 128 bytes",
    ):
        threads(body, 64, shared=128, extra=extra)


def test_bits_are_extended_by_zeros() -> None:
    """From narrow memory into a wide register; from the bits of a float to those of an integer."""
    body = """ld.global.b8 %h1, [%rd2]; cvt.u32.u16 %r1, %h1; ld.global.b16 %r2, [%rd2];
    ld.global.nc.b32 %f1, [%rd3]; st.global.b32 [%rd1], %r1; st.global.b32 [%rd1+4], %r2;
    st.global.b32 [%rd1+8], %f1;"""
    out = np.zeros(3, np.uint32)
    narrow = np.full(2, -1, np.int8)
    run(kernel(body, 3), "k", 1, 1, [out, narrow, np.ones(1, np.float32)])
    assert out.tolist() == [0xFF, 0xFFFF, 0x3F800000]


def test_a_place_between_multiples_of_16_bytes() -> None:
    """An array lies there as it lies here: a view one number further is misaligned for 16 bytes."""
    body = "ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd2]; st.global.u32 [%rd1], %r4;"
    numbers = np.arange(12, dtype=np.uint32)
    first = -(numbers.ctypes.data // 4) % 4  # the first at a multiple of 16 bytes
    out = np.zeros(1, np.uint32)
    run(kernel(body, 2), "k", 1, 1, [out, numbers[first : first + 4]])
    assert out[0] == first + 3
    with pytest.raises(PTXError, match=r"16-byte access to global byte 0 of .* is misaligned"):
        run(kernel(body, 2), "k", 1, 1, [out, numbers[first + 1 : first + 5]])


def test_addresses_of_32_bits_wrap_around() -> None:
    """A register below zero and an offset above it meet within shared memory."""
    body = """
    .shared .align 4 .b8 buffer[128];
    mov.u32 %r3, buffer; shl.b32 %r4, %r0, 2; add.s32 %r5, %r3, %r4;
    st.shared.u32 [%r5], %r0; bar.sync 0;
    sub.s32 %r6, %r5, 512; ld.shared.u32 %r1, [%r6+512];"""
    np.testing.assert_array_equal(threads(body), np.arange(32))


@pytest.mark.parametrize("atom", ["atom", "atom.relaxed.gpu"])
def test_atomics(atom: str) -> None:
    """Each thread sees another number; threads come in a random order; f32 flushes in global memory
    alone."""
    target, seen = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    tail = "mul.wide.u32 %rd9, %r0, 4;\nadd.s64 %rd9, %rd9, %rd2;\nst.global.u32 [%rd9], %r3;"
    run(kernel(f"{atom}.global.add.u32 %r3, [%rd1], 2;\n{tail}", 2), "k", 1, 32, [target, seen])
    assert target[0] == 64
    assert seen.tolist() != sorted(seen.tolist()) == [*range(0, 64, 2)]
    out = np.zeros(2, np.float32)
    body = """.shared .align 4 .b8 sum[4]; setp.eq.u32 %p1, %r0, 0; @%p1 bra $A; ret; $A:
    mov.u64 %rd2, sum; st.shared.f32 [%rd2], 0f00000000; mov.b32 %f1, 5;
    atom.global.add.f32 %f3, [%rd1], %f1; atom.shared.add.f32 %f3, [%rd2], %f1;
    ld.shared.f32 %f2, [%rd2]; st.global.f32 [%rd1+4], %f2;"""
    run(kernel(body.replace("atom.", f"{atom}.")), "k", 1, 32, [out])
    assert out.view(np.uint32).tolist() == [0, 5]


def test_vector_stores_race_in_any_element() -> None:
    """All blocks write {0, the block's number} to one place: the first element agrees, the second
    doesn't."""
    text = kernel("mov.u32 %r2, %ctaid.x; mov.u32 %r3, 0; st.global.v2.u32 [%rd1], {%r3, %r2};")
    with pytest.raises(PTXError, match="race"):
        run(text, "k", 700, 1024, [np.zeros(2, np.uint32)])


def test_races_are_those_of_the_definition() -> None:
    """Random reads, writes and barriers at one place, by several lanes at once: the four reads and
    the write that are remembered find a race exactly where one with all earlier accesses finds
    it."""

    class Race(Exception):
        pass

    def fail(wrong: np.ndarray, message: Any) -> None:
        raise Race

    rng = np.random.default_rng(11)
    warps = 2
    found = 0
    for _ in range(1500):
        order, span = Order(2, warps), rng.choice([64, 128])  # of one block or of two
        arena = Arena("global", 0, 4, order, True, fail)
        position = arena.add("x", 4)
        arena.allocate(1)
        arena.valid.fill(True)
        past: list[tuple[int, int, bool]] = []  # thread, time, whether it wrote
        for _ in range(16):
            order.now += 1
            kind = rng.choice(["read"] * 6 + ["write", "warp", "warp", "warp", "block"])
            if kind == "warp":
                order.warp_time[rng.integers(0, 2 * warps)] = order.now
            elif kind == "block":
                order.block_time[rng.integers(0, 2)] = order.now
            else:
                threads = rng.choice(
                    span, 1 if kind == "write" else rng.integers(1, 4), replace=False
                )
                threads = np.unique(
                    threads // 30 * 30 + threads % 2
                )  # few lanes, so that they meet again
                race = any(
                    other != thread
                    and (wrote or kind == "write")
                    and not (other // 64 == thread // 64 and time < order.block_time[thread // 64])
                    and not (other // 32 == thread // 32 and time < order.warp_time[thread // 32])
                    for other, time, wrote in past
                    for thread in threads
                )
                verify = arena.check_read if kind == "read" else arena.check_write
                arguments = [
                    np.full(len(threads), position),
                    4,
                    threads,
                    *([False] if kind == "read" else []),
                ]
                if race:
                    found += 1
                    with pytest.raises(Race):
                        verify(*arguments)
                    break
                verify(*arguments)
                past += [(int(thread), order.now, kind == "write") for thread in threads]
    assert 300 < found < 1400


COPY = """
    .shared .align 16 .b8 buffer[512];
    mov.u32 %r3, buffer; shl.b32 %r4, %r0, 4; add.s32 %r3, %r3, %r4; mul.wide.u32 %rd3, %r0, 16;
    add.s64 %rd4, %rd3, %rd1;
    cp.async.cg.shared.global [%r3], [%rd4], 16;
    cp.async.commit_group;
    {wait}
    ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r3];
    add.s64 %rd5, %rd3, %rd2;
    st.global.v4.u32 [%rd5], {{%r5, %r6, %r7, %r8}};"""


def test_asynchronous_copies() -> None:
    """Bytes land at the wait; without it they may not be read."""
    x = np.arange(128, dtype=np.uint32)
    y = np.zeros_like(x)
    run(kernel(COPY.format(wait="cp.async.wait_group 0;"), 2), "k", 1, 32, [x, y])
    np.testing.assert_array_equal(y, x)
    for wait in ("", "cp.async.wait_group 1;"):
        with pytest.raises(PTXError, match=r"ld\.shared.*in flight by cp\.async"):
            run(kernel(COPY.format(wait=wait), 2), "k", 1, 32, [x, x.copy()])


def test_a_copy_lands_at_the_wait() -> None:
    """Its neighbour may read it behind a barrier after the wait, not after the start."""
    x = np.arange(128, dtype=np.uint32)
    y = np.zeros_like(x)
    turn = "xor.b32 %r4, %r4, 16; mov.u32 %r3, buffer; add.s32 %r3, %r3, %r4;"
    run(
        kernel(COPY.format(wait=f"cp.async.wait_group 0; bar.sync 0; {turn}"), 2),
        "k",
        1,
        32,
        [x, y],
    )
    np.testing.assert_array_equal(y.reshape(16, 2, 4), x.reshape(16, 2, 4)[:, ::-1])
    early = kernel(COPY.format(wait=f"bar.sync 0; cp.async.wait_group 0; {turn}"), 2)
    with pytest.raises(PTXError, match=r"ld\.shared.*race: reads shared byte"):
        run(early, "k", 1, 32, [x, y])


def test_read_only_memory() -> None:
    x = np.zeros(1, np.uint32)
    with pytest.raises(PTXError, match=r"ld\.global\.nc of memory that this kernel writes"):
        run(kernel("st.global.u32 [%rd1], 5; ld.global.nc.f32 %f1, [%rd1];"), "k", 1, 1, [x])
    x.flags.writeable = False
    with pytest.raises(PTXError, match="write to read-only memory: global byte 0 of argument 0"):
        run(kernel("st.global.u32 [%rd1], 5;"), "k", 1, 1, [x])
