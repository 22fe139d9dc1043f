"""Cases of `flash_attention`: those of `attention`, in one block or several."""

from __future__ import annotations

from . import attention
from .draw import Case, Draw, flags

__all__ = ["REGIMES", "case"]

REGIMES = attention.REGIMES | {"one_block", "blocks"}  # that the cases of a run must meet


def case(draw: Draw) -> Case:
    """A drawn case of `flash_attention`, with the regimes that it meets."""
    drawn = attention.case(draw)
    block = draw.choice([1, 2, 3, 128])
    key = drawn.inputs[1]
    drawn.kwargs["block"] = block
    drawn.regimes |= flags(one_block=block == 128, blocks=key is not None and block < key.shape[1])
    return drawn
