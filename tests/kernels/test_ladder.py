"""The earlier versions of RMSNorm and cross-entropy: each is right, each step costs less of what it
was made for, and kernels/README.md shows what `python tests/ladder.py` prints."""

from __future__ import annotations

from pathlib import Path

import pytest

from refimpl.check.cases import RandomDraw
from refimpl.kernels import SOURCE
from refimpl.kernels.compile import STORAGE

import ladder
from kernel_support import ON_DEVICE, SHAPES, InterpreterLaunch, compare
from ladder import CROSS_ENTROPY, RMS_NORM, cross_entropy_step, rms_norm_step

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


def test_every_file_is_a_step() -> None:
    files = {f"ladder/{path.stem}" for path in (SOURCE / "ladder").glob("*.cu")}
    assert files == {step.name for step in (*RMS_NORM[:-1], *CROSS_ENTROPY[:-1])}


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


def test_readme_shows_it(rendered: str) -> None:
    assert README.split("<!-- python tests/ladder.py -->\n")[1].split("<!-- end -->")[0] == rendered
