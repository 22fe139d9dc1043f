"""The earlier versions of RMSNorm, cross-entropy and attention: each is right, each step costs less
of what it was made for, and kernels/README.md shows what `python tests/ladder.py` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from refimpl.check.cases import RandomDraw
from refimpl.kernels import SOURCE
from refimpl.kernels.compile import STORAGE
from refimpl.ops import REFERENCE

import ladder
from kernel_support import ON_DEVICE, SHAPES, InterpreterLaunch, compare
from kernel_support.launches import SMALL
from ladder import (
    ATTENTION,
    CROSS_ENTROPY,
    RMS_NORM,
    attention_step,
    cross_entropy_step,
    rms_norm_step,
)
from support import FULL

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="counts of the interpreter")
README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()


@pytest.fixture(scope="module")
def rendered() -> str:
    return ladder.render()


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize(
    ("op", "step"),
    [("rms_norm", s) for s in RMS_NORM[:-1]] + [("cross_entropy", s) for s in CROSS_ENTROPY[:-1]],
)
def test_every_step_is_right(op: str, step: ladder.Step, storage: str) -> None:
    """The rule of the kernels themselves, on the kernels' own shapes."""
    make = {"rms_norm": rms_norm_step, "cross_entropy": cross_entropy_step}[op]
    for seed in range(2):
        compare(
            op,
            make(InterpreterLaunch(seed), step.name),
            SHAPES[op](RandomDraw(seed)),
            storage,
            seed,
        )


@pytest.mark.parametrize("storage", STORAGE if FULL else ["bfloat16"])
@pytest.mark.parametrize("step", ATTENTION[:-1])
def test_every_step_of_attention_is_right(step: ladder.Step, storage: str) -> None:
    """The same. The first step rounds nothing within, so in bfloat16 too its rule is that of the
    reference; of the second, o is rounded before its row sums are taken, as on tensor cores."""
    algorithm = REFERENCE["attention"] if step == ATTENTION[0] else None
    for seed in range(8, 12) if FULL else (11,):  # several tiles on both sides
        pair = attention_step(InterpreterLaunch(seed), step.name, SMALL)
        case = SHAPES["attention"](RandomDraw(seed))
        compare("attention", pair, case, storage, seed, algorithm=algorithm)


def test_every_file_is_a_step() -> None:
    files = {f"ladder/{path.stem}" for path in (SOURCE / "ladder").glob("*.cu")}
    steps = *RMS_NORM[:-1], *CROSS_ENTROPY[:-1], *ATTENTION[:-1]
    assert files == {step.name for step in steps}


def test_bytes_by_hand() -> None:
    """What the interpreter counts is what the sources say, in bytes an element; a number a row is
    lost in it."""
    w = 2
    y = 2
    x = 2
    dy = 2
    dx = 2  # one read or one write of each, in bfloat16
    twice = 2 * x + w + y + 2 * (dy + w + x) + dx
    column, dw = dy + x, 4 / 32  # one dw for 32 rows
    own = (
        64 * 4 / 1024
    )  # the row's r, which each of 64 threads reads for its part of 1,024 elements
    part = (4 + 4) / 16  # a partial sum of dw, written and read, for 16 rows
    wanted = (
        twice + column + 4 + dw,  # the column's thread reads r for every element
        twice + column + 4 + dw + own,
        twice + column + 4 / 8 + dw + own,  # a chunk's thread, for every 8
        x + w + y + dy + x + w + dx + part + dw + own,
    )
    for step, bytes_ in zip(RMS_NORM, wanted, strict=True):
        assert ladder.rms_norm_cost(step.name).asked == pytest.approx(bytes_, rel=1e-3)
    z = 2
    p = 4
    dz = 2
    five = 5 * 32 / 1024  # sectors of five numbers, for a warp's 1024 logits
    target = 1  # read again for every logit: a warp's sector for 32
    wanted = (
        3 * z + p + p + dz + target,
        2 * z + z + dz + target,
        z + z + dz + target,
        z + z + dz + five,
    )
    for step, bytes_ in zip(CROSS_ENTROPY, wanted, strict=True):
        found = ladder.cross_entropy_cost(step.name)
        assert found.sectors == pytest.approx(bytes_, rel=0.02)
        assert bytes_ <= found.asked  # and of each row's numbers, which all threads read
    exponentials = [ladder.cross_entropy_cost(step.name).exponentials for step in CROSS_ENTROPY]
    assert exponentials == pytest.approx([2, 2, 3, 2 + 1 / 32], rel=0.1)


@pytest.mark.skipif(not FULL, reason="counts attention's steps once more: make test-full")
def test_attention_by_hand() -> None:
    """Bytes a pair of query and key: what is asked for, and what kernels make."""
    length, w = ladder.LENGTH, ladder.ATTENTION_WIDTH
    p = 4
    row = 2 * w  # of q, k, v, o or a gradient
    seen = (length + 1) / (2 * length)  # pairs
    product = 2 * row + p
    mixed = (p + 2) * w + row / length
    forward = (
        1 + p * seen + 1 + p * seen + 3 * p
    )  # the mask twice, and what it shows; sum, division
    backward = 2 * p + 3 * p  # for the row's sum, and for the gradient
    naive = 2 * product + 4 * mixed + forward + backward
    rows = (
        11 * row + 4 + 4 + 2 * (4 + 4)
    )  # own rows, lse and row sums: of dq, two threads read them
    tiles = 3 * 192 * 2 * row  # 64 rows meet 64, the other 64 all 128: forward, dq, dk and dv
    online = rows / length + tiles / length**2 + 8 * seen  # dk reads lse and row sums for each pair
    results = 4 * row / length
    costs = [ladder.attention_cost(step.name) for step in ATTENTION]
    assert costs[0].asked == pytest.approx(naive, rel=1e-9)
    assert costs[1].asked == pytest.approx(online, rel=1e-9)
    assert costs[2].asked <= costs[1].asked
    assert costs[0].made == results + 2 * p
    assert costs[1].made == costs[2].made == results + 8 / length  # lse and row sums
    # a tensor core's instruction is one, whatever it multiplies; accesses are of 16 bytes
    assert costs[2].instructions <= costs[1].instructions / 10
    assert costs[2].accesses <= costs[1].accesses / 3


def test_readme_shows_it(rendered: str) -> None:
    assert README.split("<!-- python tests/ladder.py -->\n")[1].split("<!-- end -->")[0] == rendered
