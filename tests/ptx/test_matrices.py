"""Matrices that a warp holds: which lane has which element, by NVIDIA's "PTX ISA" (9.0), "Warp Level
Matrix Instructions"; sums; copies with zeros; what is refused."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ptx import PTXError, run
from ptx.written import INF, NAN, kernel, threads

# Of some lanes: row and column of each element in turn, two to a register (of D: one).
PLACES_OF_A = {
    0: [(0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9)],
    1: [(0, 2), (0, 3), (8, 2), (8, 3), (0, 10), (0, 11), (8, 10), (8, 11)],
    6: [(1, 4), (1, 5), (9, 4), (9, 5), (1, 12), (1, 13), (9, 12), (9, 13)],
    19: [(4, 6), (4, 7), (12, 6), (12, 7), (4, 14), (4, 15), (12, 14), (12, 15)],
    31: [(7, 6), (7, 7), (15, 6), (15, 7), (7, 14), (7, 15), (15, 14), (15, 15)],
}
PLACES_OF_B = {
    0: [(0, 0), (1, 0), (8, 0), (9, 0)],
    1: [(2, 0), (3, 0), (10, 0), (11, 0)],
    6: [(4, 1), (5, 1), (12, 1), (13, 1)],
    19: [(6, 4), (7, 4), (14, 4), (15, 4)],
    31: [(6, 7), (7, 7), (14, 7), (15, 7)],
}
PLACES_OF_D = {
    0: [(0, 0), (0, 1), (8, 0), (8, 1)],
    1: [(0, 2), (0, 3), (8, 2), (8, 3)],
    6: [(1, 4), (1, 5), (9, 4), (9, 5)],
    19: [(4, 6), (4, 7), (12, 6), (12, 7)],
    31: [(7, 6), (7, 7), (15, 6), (15, 7)],
}


# Of all lanes, by the document's formulas, [lane, element].
def places_of_a() -> np.ndarray:
    return np.array(
        [
            [
                (
                    lane // 4 + (8 if i in (2, 3, 6, 7) else 0),
                    lane % 4 * 2 + i % 2 + (8 if i >= 4 else 0),
                )
                for i in range(8)
            ]
            for lane in range(32)
        ]
    )


def places_of_b() -> np.ndarray:
    return np.array(
        [
            [(lane % 4 * 2 + i % 2 + (8 if i >= 2 else 0), lane // 4) for i in range(4)]
            for lane in range(32)
        ]
    )


def places_of_d() -> np.ndarray:
    return np.array(
        [
            [(lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + i % 2) for i in range(4)]
            for lane in range(32)
        ]
    )


def held(matrix: np.ndarray, places: np.ndarray) -> np.ndarray:
    """What each lane holds of the matrix, [lane, element]."""
    return np.ascontiguousarray(matrix[places[..., 0], places[..., 1]])


def at(register: int, pointer: str, size: int) -> str:
    """%rd<register> points to this thread's `size` bytes."""
    return f"mul.wide.u32 %rd{register}, %r0, {size}; add.s64 %rd{register}, %rd{register}, {pointer};\n"


MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
LOADED = (
    at(11, "%rd1", 16)
    + at(12, "%rd2", 8)
    + at(13, "%rd3", 16)
    + at(14, "%rd4", 16)
    + """ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd11];
    ld.global.v2.u32 {%r5, %r6}, [%rd12];
    ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd13];
"""
)
STORED = "st.global.v4.f32 [%rd14], {%f1, %f2, %f3, %f4};"
IN_PLACE = (
    f"{MMA} {{%f1, %f2, %f3, %f4}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%f1, %f2, %f3, %f4}};\n"
)


def multiplied(a: np.ndarray, b: np.ndarray, c: np.ndarray, body: str = IN_PLACE) -> np.ndarray:
    """What each lane holds of d = a b + c, [lane, 4], of what each holds of a, b and c."""
    d = np.zeros((32, 4), np.float32)
    arguments = [
        a.astype(ml_dtypes.bfloat16).view(np.uint16),
        b.astype(ml_dtypes.bfloat16).view(np.uint16),
    ]
    text = kernel(LOADED + body + STORED, 4)
    run(text, "k", 1, 32, [*arguments, c.astype(np.float32), d], uninitialised=[d])
    return d


NUMBERS = np.random.default_rng(3)
A = NUMBERS.permutation(256).reshape(16, 16) - 128.0  # distinct, and exact in bfloat16
B = NUMBERS.permutation(128).reshape(16, 8) - 64.0
C = NUMBERS.permutation(128).reshape(16, 8) * 1000.0
NONE = np.zeros((32, 8))


@pytest.mark.parametrize(
    ("listed", "all_places"),
    [(PLACES_OF_A, places_of_a), (PLACES_OF_B, places_of_b), (PLACES_OF_D, places_of_d)],
)
def test_the_lists_are_the_documents_formulas(listed: dict, all_places: Any) -> None:
    found = all_places()
    assert len(np.unique(found.reshape(-1, 2), axis=0)) == found.size // 2  # each place once
    for lane, places in listed.items():
        assert [(*place,) for place in found[lane].tolist()] == places


def test_a_product_of_distinct_numbers() -> None:
    """Every lane's elements of A, B, C and D."""
    got = multiplied(held(A, places_of_a()), held(B, places_of_b()), held(C, places_of_d()))
    np.testing.assert_array_equal(got, held(A @ B + C, places_of_d()))


@pytest.mark.parametrize("lane", PLACES_OF_A)
def test_one_lane_of_a(lane: int) -> None:
    """A single 1 in A: row r of the product is row c of B, and the others are 0."""
    for i, (row, column) in enumerate(PLACES_OF_A[lane]):
        a, product = np.zeros((32, 8)), np.zeros((16, 8))
        a[lane, i] = 1
        product[row] = B[column]
        got = multiplied(a, held(B, places_of_b()), NONE[:, :4])
        np.testing.assert_array_equal(got, held(product, places_of_d()))


@pytest.mark.parametrize("lane", PLACES_OF_B)
def test_one_lane_of_b(lane: int) -> None:
    """A single 1 in B: column c of the product is column r of A."""
    for i, (row, column) in enumerate(PLACES_OF_B[lane]):
        b, product = np.zeros((32, 4)), np.zeros((16, 8))
        b[lane, i] = 1
        product[:, column] = A[:, row]
        got = multiplied(held(A, places_of_a()), b, NONE[:, :4])
        np.testing.assert_array_equal(got, held(product, places_of_d()))


@pytest.mark.parametrize("lane", PLACES_OF_D)
def test_one_lane_of_d(lane: int) -> None:
    got = multiplied(held(A, places_of_a()), held(B, places_of_b()), held(C, places_of_d()))
    assert got[lane].tolist() == [(A @ B + C)[place] for place in PLACES_OF_D[lane]]


def test_many_warps_at_once() -> None:
    """Each has its own matrices; every third leaves before."""
    numbers = np.random.default_rng(5)
    a, b, c = (numbers.integers(-99, 99, (12, *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
    wanted = np.stack([held(m, places_of_d()) for m in a @ b + c])
    wanted[::3] = 0
    bits = [
        np.stack([held(m, places()) for m in matrices]).astype(dtype)
        for matrices, places, dtype in (
            (a, places_of_a, ml_dtypes.bfloat16),
            (b, places_of_b, ml_dtypes.bfloat16),
            (c, places_of_d, np.float32),
        )
    ]
    leave = """mov.u32 %r2, %ctaid.x; mad.lo.s32 %r0, %r2, 128, %r0;
    shr.u32 %r7, %r0, 5; rem.u32 %r7, %r7, 3; setp.ne.u32 %p1, %r7, 0; @%p1 bra $ON; ret; $ON:"""
    d = np.zeros((12, 32, 4), np.float32)
    given = [x.view(np.uint16) if x.itemsize == 2 else x for x in bits]
    run(kernel(leave + LOADED + IN_PLACE + STORED, 4), "k", 3, 128, [*given, d])
    np.testing.assert_array_equal(d, wanted)


def test_registers_of_d_that_are_also_read() -> None:
    """d may be a's or b's registers, and c's in another order: all are read before one is written."""
    a, b = held(A, places_of_a()), held(B, places_of_b())
    c = held(C, places_of_d())
    wanted = held(A @ B, places_of_d())
    turned = IN_PLACE.rpartition("{")[0] + "{%f4, %f3, %f2, %f1};\n"
    np.testing.assert_array_equal(multiplied(a, b, c, turned), wanted + c[:, ::-1])
    bits = f"""mov.b32 %r7, 0f00000000;
    {MMA} {{%r1, %r2, %r3, %r5}}, {{%r1, %r2, %r3, %r4}}, {{%r5, %r6}}, {{%r7, %r7, %r7, %r7}};
    mov.b32 %f1, %r1; mov.b32 %f2, %r2; mov.b32 %f3, %r3; mov.b32 %f4, %r5;\n"""
    np.testing.assert_array_equal(multiplied(a, b, c, bits), wanted)


ROUNDED = [  # products of which all lanes have the same, c, the sum
    ([1, 2.0**-24], 0, 1),  # half a unit: to the even neighbour
    ([1, 2.0**-24, 2.0**-40], 0, 1 + 2.0**-23),  # above the half: a sum in float32 would lose it
    ([1, 2.0**-23, 2.0**-24], 0, 1 + 2.0**-22),
    ([1, 2.0**-24], 2.0**-40, 1 + 2.0**-23),  # the products are not rounded before c is added
    ([2.0**-24, 2.0**-24], 1, 1 + 2.0**-23),  # c is one more term, not the first of a chain
    ([2.0**30, 1, -(2.0**30)], 0, 1),
    ([1, -1], -0.0, 0.0),
    ([2.0**120, -(2.0**120)], 2.0**-140, 2.0**-140),  # subnormal numbers are kept
    ([2.0**127, 2.0**127], 0, INF),
    ([2.0**127, 2.0**127, -(2.0**127)], 0, 2.0**127),  # no infinity between
    ([INF, 1], -5, INF),
    ([INF, -INF], 0, NAN),
    ([INF], -INF, NAN),
    ([NAN, 1], 0, NAN),
    ([1], NAN, NAN),
    ([-INF], 3, -INF),
]


@pytest.mark.parametrize(("products", "c", "wanted"), ROUNDED)
def test_sums_are_rounded_once(products: list[float], c: float, wanted: float) -> None:
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    a[:, : len(products)] = products
    b[: len(products)] = 1
    got = multiplied(held(a, places_of_a()), held(b, places_of_b()), np.full((32, 4), c))
    np.testing.assert_array_equal(got, np.full((32, 4), wanted, np.float32))


# ldmatrix: the number in matrix m, row r, column c is 0xmrc.
ROWS = 0x100 * np.arange(4)[:, None, None] + 0x10 * np.arange(8)[:, None] + np.arange(8)
PLAIN = {0: 0x0001_0000, 1: 0x0003_0002, 6: 0x0015_0014, 19: 0x0047_0046, 31: 0x0077_0076}
TURNED = {0: 0x0010_0000, 1: 0x0030_0020, 6: 0x0051_0041, 19: 0x0074_0064, 31: 0x0077_0067}
NOWHERE = 0x7FFF_FFF0


def loaded(
    form: str, addresses: Any, rows: np.ndarray = ROWS, before: str = "bar.sync 0;", after: str = ""
) -> np.ndarray:
    """[lane, register] of ldmatrix, of 32 rows of 16 bytes that 32 lanes have stored in turn;
    addresses: each lane's, from the first row on."""
    registers = ["%r11", "%r12", "%r13", "%r14"]
    count = int(form[1])
    out = np.zeros((32, 4), np.uint32)
    body = f""".shared .align 16 .b8 rows[512];
    mov.u32 %r3, rows; shl.b32 %r4, %r0, 4; add.s32 %r4, %r4, %r3;
    {at(11, "%rd1", 16)} {at(12, "%rd2", 4)} {at(13, "%rd3", 16)}
    ld.global.v4.u32 {{%r5, %r6, %r7, %r8}}, [%rd11]; ld.global.u32 %r9, [%rd12]; add.s32 %r9, %r9, %r3;
    st.shared.v4.u32 [%r4], {{%r5, %r6, %r7, %r8}};
    mov.u32 %r11, 0; mov.u32 %r12, 0; mov.u32 %r13, 0; mov.u32 %r14, 0;
    {before}
    ldmatrix.sync.aligned.m8n8.{form}.b16 {{{", ".join(registers[:count])}}}, [%r9];
    {after}
    st.global.v4.u32 [%rd13], {{{", ".join(registers)}}};"""
    given = np.array([*addresses, *[NOWHERE] * (32 - len(addresses))], np.uint32)
    run(kernel(body, 3), "k", 1, 32, [rows.astype(np.uint16), given, out])
    return out


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize(("turn", "wanted"), [("", PLAIN), (".trans", TURNED)])
@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_ldmatrix(count: int, turn: str, wanted: dict[int, int], space: str) -> None:
    """The addresses of matrix m are those of lanes 8m to 8m + 7; no others count."""
    got = loaded(f"x{count}{turn}.{space}", [16 * i for i in range(8 * count)])
    for lane, bits in wanted.items():
        assert got[lane, :count].tolist() == [bits + 0x0100_0100 * m for m in range(count)]
    assert not got[:, count:].any()
    rows = ROWS.swapaxes(1, 2) if turn else ROWS
    np.testing.assert_array_equal(
        got.view(np.uint16).reshape(32, 4, 2)[:, :count].swapaxes(0, 1).reshape(count, 8, 8),
        rows[:count],
    )


def test_rows_in_any_order() -> None:
    """Lane i points to row 5 i + 3 of the 32; one row may be several."""
    order = (5 * np.arange(32) + 3) % 32
    rows = np.arange(32)[:, None] * 0x100 + np.arange(8)
    got = loaded("x4.shared", 16 * order, rows)
    assert got[0].tolist() == [0x0301_0300, 0x0B01_0B00, 0x1301_1300, 0x1B01_1B00]
    assert got[7].tolist() == [0x0807_0806, 0x1007_1006, 0x1807_1806, 0x0007_0006]  # row 1: 8
    assert (
        loaded("x2.trans.shared", [32] * 16, rows)[:, :2]
        == 0x0200_0200 + np.arange(32)[:, None] // 4 * 0x1_0001
    ).all()


FOUR = [16 * i for i in range(32)]
MISTAKES = {
    "out of bounds: shared byte 512 of": ("x4.shared", [*FOUR[:31], 512], {}),
    "thread .9, 0, 0.: 16-byte access out of bounds: shared byte -16": (
        "x2.shared",
        [*FOUR[:9], -16 % 2**32, *FOUR[10:]],
        {},
    ),
    "thread .3, 0, 0.: 16-byte access to shared byte 56 of rows, .* is misaligned": (
        "x1.shared",
        [*FOUR[:3], 56, *FOUR[4:]],
        {},
    ),
    "16-byte access .* misaligned": ("x4.shared", [8 + i for i in FOUR], {}),
    "near no variable": ("x4.shared", FOUR[:24], {}),
    "ldmatrix.*race: reads shared byte 4 of rows, .* which lane 0 of warp 0 of block 0 wrote": (
        "x4.shared",
        FOUR,
        {"before": ""},
    ),
    "ldmatrix.*race: reads shared": ("x1.trans.shared", FOUR, {"before": ""}),
    r"st\.shared.*race: writes shared byte .* which lane .* read": (
        "x1.shared",
        FOUR,
        {
            "after": "setp.gt.u32 %p1, %r0, 0; @%p1 bra $END; st.shared.v4.u32 [%r4], {%r11, %r11, %r11, %r11}; $END:"
        },
    ),
    r"ldmatrix.*never written .* in flight by cp\.async.* at shared byte \d+ of rows": (
        "x4.shared",
        FOUR,
        {"before": "cp.async.cg.shared.global [%r4], [%rd11], 16; bar.sync 0;"},
    ),
    r"ldmatrix.*lanes missing": (
        "x4.shared",
        FOUR,
        {
            "before": "bar.sync 0; setp.lt.u32 %p1, %r0, 16; @%p1 bra $END;",
            "after": "$END: mov.u32 %r4, 0;",
        },
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_of_ldmatrix(message: str) -> None:
    form, addresses, options = MISTAKES[message]
    with pytest.raises(PTXError, match=message):
        loaded(form, addresses, **options)


def test_a_warp_is_enough_to_order_ldmatrix() -> None:
    np.testing.assert_array_equal(
        loaded("x4.shared", FOUR, before="bar.warp.sync -1;"), loaded("x4.shared", FOUR)
    )


@pytest.mark.parametrize(("turn", "lane"), [("", 3), (".trans", 24)])
def test_unwritten_rows(turn: str, lane: int) -> None:
    """Nobody has written the rows' last 4 bytes, columns 6 and 7: the lane is named that gets what
    row 0 has there, 3, or column 6, 24."""
    body = f""".shared .align 16 .b8 rows[128];
    mov.u32 %r3, rows; and.b32 %r4, %r0, 7; shl.b32 %r4, %r4, 4; add.s32 %r4, %r4, %r3;
    mov.u32 %r5, 0; st.shared.v2.u32 [%r4], {{%r5, %r5}}; st.shared.u32 [%r4+8], %r5; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x1{turn}.shared.b16 {{%r1}}, [%r4];"""
    with pytest.raises(
        PTXError, match=rf"thread \({lane}, 0, 0\): reads bytes .* at shared byte 12 of rows"
    ):
        threads(body)


# .sync.aligned: all 32 lanes, together
GATHERED = {
    MMA: f"{MMA} {{%f1, %f1, %f1, %f1}}, {{%r3, %r3, %r3, %r3}}, {{%r3, %r3}}, {{%f1, %f1, %f1, %f1}};",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16": "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [%r4];",
}
SPLIT = {
    "only some lanes come": "@%p1 bra $END; {} $END: mov.u32 %r1, 0;",
    "the others have left": "@%p1 bra $ON; ret; $ON: {}",
    "in both branches": "@%p1 bra $ELSE; {} bra $END; $ELSE: {} $END: mov.u32 %r1, 0;",
    "the others wait elsewhere": "@%p1 bra $ELSE; {} $ELSE: bar.warp.sync -1; mov.u32 %r1, 0;",
    "the others leave afterwards": "@%p1 bra $GO; {} $GO: ret;",
}
START = """.shared .align 16 .b8 rows[128]; mov.u32 %r3, 0; mov.b32 %f1, 0;
    mov.u32 %r4, rows; shl.b32 %r5, %r0, 2; add.s32 %r5, %r5, %r4; st.shared.u32 [%r5], %r0; bar.sync 0;
    setp.lt.u32 %p1, %r0, 13;"""


@pytest.mark.parametrize("opcode", GATHERED)
@pytest.mark.parametrize("split", SPLIT)
def test_a_warp_comes_whole(opcode: str, split: str) -> None:
    body = START + SPLIT[split].replace("{}", GATHERED[opcode])
    with pytest.raises(PTXError, match=rf"`{opcode} .*, thread \(\d+, 0, 0\): lanes missing"):
        threads(body)


@pytest.mark.parametrize("opcode", GATHERED)
def test_a_warp_of_a_block_that_has_fewer_threads(opcode: str) -> None:
    body = f"{START[: START.index('st.shared')]} {GATHERED[opcode]}"
    with pytest.raises(PTXError, match=rf"`{opcode} .*lanes missing: all 32"):
        threads(body, 20)


@pytest.mark.parametrize("opcode", GATHERED)
def test_a_warp_that_has_come_together_again(opcode: str) -> None:
    threads(f"{START} @%p1 bra $ELSE; mov.u32 %r3, 0; $ELSE: {GATHERED[opcode]}")


# cp.async with the size of its source
def copied(
    sizes: list[int], sources: list[int], opcode: str = "cp.async.cg.shared.global", wait: str = "0"
) -> np.ndarray:
    """Each lane's 16 bytes of shared memory, which held 7s, after a copy from its source's byte of
    512 bytes of 1, 2, 3, …"""
    x, y = np.arange(1, 129, dtype=np.uint32), np.zeros((32, 4), np.uint32)
    body = f""".shared .align 16 .b8 buffer[512];
    mov.u32 %r3, buffer; shl.b32 %r4, %r0, 4; add.s32 %r3, %r3, %r4;
    {at(11, "%rd2", 4)} {at(12, "%rd3", 4)} {at(13, "%rd4", 16)}
    ld.global.u32 %r5, [%rd11]; ld.global.u32 %r6, [%rd12]; cvt.s64.s32 %rd5, %r6; add.s64 %rd5, %rd5, %rd1;
    mov.u32 %r7, 7; st.shared.v4.u32 [%r3], {{%r7, %r7, %r7, %r7}};
    {opcode} [%r3], [%rd5], 16, %r5;
    cp.async.commit_group; cp.async.wait_group {wait};
    ld.shared.v4.u32 {{%r8, %r9, %r10, %r11}}, [%r3]; st.global.v4.u32 [%rd13], {{%r8, %r9, %r10, %r11}};"""
    run(
        kernel(body, 4), "k", 1, 32, [x, np.array(sizes, np.uint32), np.array(sources, np.int32), y]
    )
    return y


@pytest.mark.parametrize(
    "opcode",
    [
        "cp.async.cg.shared.global",
        "cp.async.cg.shared.global.L2::128B",
        "cp.async.cg.shared::cta.global",
    ],
)
def test_copies_of_nothing_are_zeros(opcode: str) -> None:
    """Size 0 reads nothing, wherever the address points, even at no multiple of 16."""
    sizes = [16 if lane % 3 else 0 for lane in range(32)]
    nowhere = [-(2**31), 2**31 - 1, -4, 512, 1]
    sources = [16 * lane if size else nowhere[lane % 5] for lane, size in enumerate(sizes)]
    got = copied(sizes, sources, opcode)
    assert got[0].tolist() == got[3].tolist() == got[30].tolist() == [0, 0, 0, 0]
    assert got[1].tolist() == [5, 6, 7, 8]
    assert got[31].tolist() == [125, 126, 127, 128]
    wanted = np.arange(1, 129).reshape(32, 4) * (np.arange(32) % 3 > 0)[:, None]
    np.testing.assert_array_equal(got, wanted)
    assert not copied([0] * 32, [-4] * 32, opcode).any()


WRONG_COPIES = {
    "thread .5, 0, 0.: a source of 8 bytes, not 0 or 16, is not supported": (
        [16] * 5 + [8] + [16] * 26,
        FOUR,
        "0",
    ),
    "a source of 17 bytes": ([17] * 32, FOUR, "0"),
    "thread .7, 0, 0.: 16-byte access out of bounds: global byte 512 of argument 0": (
        [0] * 7 + [16] * 25,
        [0] * 7 + [512] * 25,
        "0",
    ),
    "thread .2, 0, 0.: 16-byte access to global byte 36 .* misaligned": (
        [16] * 32,
        [0, 16, 36, *FOUR[3:]],
        "0",
    ),
    "ld.shared.*in flight": ([0] * 32, FOUR, "1"),  # zeros fly, too
}


@pytest.mark.parametrize("message", WRONG_COPIES)
def test_wrong_copies(message: str) -> None:
    sizes, sources, wait = WRONG_COPIES[message]
    with pytest.raises(PTXError, match=message):
        copied(sizes, sources, wait=wait)


IN_FLIGHT = """.shared .align 16 .b8 buffer[1024];
    mov.u32 %r3, buffer; shl.b32 %r4, %r0, 4; add.s32 %r3, %r3, %r4;
    mul.wide.u32 %rd3, %r0, 0; add.s64 %rd3, %rd3, %rd1; mov.u32 %r5, 0;
    cp.async.cg.shared.global [%r3], [%rd3], 16, %r5; cp.async.commit_group;"""
OVERWRITTEN = {
    "by a store": "st.shared.u32 [%r3+4], %r0;",
    "by a copy": "cp.async.cg.shared.global [%r3], [%rd3], 16, %r5;",
    "behind a barrier": "bar.sync 0; st.shared.u32 [%r3], %r0;",
    "by an atomic": "atom.shared.add.u32 %r6, [%r3], 1;",
    "when another group has been waited for": "add.s32 %r7, %r3, 512; cp.async.cg.shared.global [%r7], [%rd3], 16, %r5; cp.async.commit_group; cp.async.wait_group 1; st.shared.u32 [%r7], %r0;",
}


@pytest.mark.parametrize("how", OVERWRITTEN)
def test_bytes_in_flight_are_not_overwritten(how: str) -> None:
    with pytest.raises(
        PTXError, match=r"overwrites bytes that are still in flight|reads bytes .*in flight"
    ):
        threads(IN_FLIGHT + OVERWRITTEN[how])
    threads(IN_FLIGHT + "cp.async.wait_group 0;" + OVERWRITTEN["by a store"])
    threads(IN_FLIGHT + "cp.async.wait_group 0;" + OVERWRITTEN["by a copy"])


def test_copies_of_several_threads_to_one_place() -> None:
    body = """.shared .align 16 .b8 buffer[16]; mov.u32 %r3, buffer;
    mul.wide.u32 %rd3, %r0, 16; add.s64 %rd3, %rd3, %rd1;
    cp.async.cg.shared.global [%r3], [%rd3], 16;"""
    x = np.zeros(128, np.uint32)
    run(kernel(body), "k", 1, 32, [x])  # the same bytes
    x[31 * 4] = 1
    with pytest.raises(PTXError, match=r"cp\.async.*race: another thread copies other bytes here"):
        run(kernel(body), "k", 1, 32, [x])


def test_shared_memory_above_48_kb() -> None:
    """Dynamic, where the launch has been allowed it; static never."""
    body = """mov.u64 %rd3, dynamic; mul.wide.u32 %rd4, %r0, 4; add.s64 %rd3, %rd3, %rd4;
    st.shared.u32 [%rd3+232320], %r0; ld.shared.u32 %r1, [%rd3+232320];"""
    extra = ".extern .shared .align 16 .b8 dynamic[];"
    most = 227 << 10
    got = threads(body, shared=most, most_shared=most, extra=extra)
    np.testing.assert_array_equal(got, np.arange(32))
    with pytest.raises(PTXError, match=r"out of bounds: shared byte 232444 .* has 232444 bytes"):
        threads(body, shared=most - 4, most_shared=most, extra=extra)
    for shared, allowed, static in (
        (most, {}, 0),
        (most + 1, {"most_shared": most}, 0),
        (most - 15, {"most_shared": most}, 16),
    ):
        with pytest.raises(
            ValueError,
            match=f"at most {allowed.get('most_shared', 49152)} bytes of a block, got {shared + static}",
        ):
            threads(
                f".shared .align 16 .b8 s[{static or 16}];" * bool(static) + body,
                shared=shared,
                extra=extra,
                **allowed,
            )
    with pytest.raises(ValueError, match="at most 49152 bytes of a block, got 49168"):
        threads(".shared .align 16 .b8 s[49168];", most_shared=most)
    threads(".shared .align 16 .b8 s[49152];")
