"""What the kernels execute per element, and kernels/README.md's table of it."""

from __future__ import annotations

from pathlib import Path

import pytest

import shares
from kernel_support import ON_DEVICE
from shares import BEFORE, ROWS, blocks_at_once

pytestmark = pytest.mark.skipif(ON_DEVICE, reason="counts of the interpreter")
README = (Path(__file__).parents[2] / "kernels" / "README.md").read_text()


def test_readme_shows_it() -> None:
    shown = README.split("<!-- python tests/shares.py -->\n")[1].split("<!-- end -->")[0]
    assert shown == shares.render()
    assert set(BEFORE) == set(ROWS)


def test_blocks_at_once() -> None:
    """By hand: 65,536 registers, dealt to warps in 256s on four schedulers, and 64 warps."""
    assert blocks_at_once(96, 320) == 2  # 5 warps of 3,072 on each: 20
    assert blocks_at_once(97, 320) == 1  # 4 warps of 3,328 on each: 16
    assert blocks_at_once(128, 512) == 1
    assert blocks_at_once(32, 1024) == 2
    assert blocks_at_once(16, 32) == 32


def test_two_blocks_of_rms_norm() -> None:
    """One block of its backward reads while another computes."""
    assert ROWS["RMSNorm backward"][1]().blocks == 2 > BEFORE["RMSNorm backward"].blocks
