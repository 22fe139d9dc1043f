"""Adverse inputs for every op: odd dims, values off neutral, and the corners where wrong backwards
like to hide.

`CASES[op](draw)` makes one `Case`. Shapes, flags and a seed are drawn from a `Draw`: hypothesis's
in the tests, a plain random generator in ``refimpl verify``; there, tokens come from real text.
Each case names the regimes it hit, and `REGIMES[op]` lists those that a run must hit in all. Both
are those of the op's own file, in reading order.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from ... import ops
from ...ops import AnyOp, Op, Ops
from . import (
    attention,
    balance_loss,
    cross_entropy,
    embedding,
    ffn,
    flash_attention,
    grpo,
    head_cross_entropy,
    linear,
    log_prob,
    mla,
    mla_absorbed,
    moe,
    mtp,
    preference_loss,
    rms_norm,
    rope,
    router,
    swiglu,
)
from .draw import Case, Draw, RandomDraw
from .model import model_case, model_grpo_case, model_variant

__all__ = [
    "CASES",
    "REGIMES",
    "Case",
    "Draw",
    "RandomDraw",
    "model_case",
    "model_grpo_case",
    "model_variant",
    "pair_of",
]


def _op(file: ModuleType) -> str:
    return file.__name__.rpartition(".")[2]


_FILES = (  # in reading order
    linear,
    embedding,
    rms_norm,
    swiglu,
    ffn,
    rope,
    attention,
    flash_attention,
    mla,
    mla_absorbed,
    router,
    balance_loss,
    moe,
    cross_entropy,
    log_prob,
    head_cross_entropy,
    mtp,
    grpo,
    preference_loss,
)
# by op, a function that draws a case
CASES: dict[str, Callable[[Draw], Case]] = {_op(file): file.case for file in _FILES}
# by op, the regimes that a run must meet
REGIMES: dict[str, set[str]] = {_op(file): file.REGIMES for file in _FILES}


def pair_of(op: str, table: Ops | None = None) -> AnyOp:
    """The op's forward and backward: from the table of an implementation, else by name from
    `refimpl.ops`."""
    if table is not None and op in table:
        return table[op]
    return Op(getattr(ops, f"{op}_forward"), getattr(ops, f"{op}_backward"))
