"""What the kernels' tests share: who executes them, shapes, and the rule for their errors."""

from __future__ import annotations

from .launches import (
    ALL,
    EXECUTED,
    LARGE,
    ON_DEVICE,
    PRETENDED,
    QUICK_TYPES,
    TABLE,
    TABLES,
    TYPES,
    InterpreterLaunch,
    PretendedLaunch,
    make_launch,
    make_table,
    ops_of,
    strided,
    to_device,
    to_host,
    without_a_device,
)
from .rule import DTYPES, HALF_UNIT, LUCK, WIDE, compare, results, rounded
from .shapes import SHAPES, V3

__all__ = [
    "ALL",
    "DTYPES",
    "EXECUTED",
    "HALF_UNIT",
    "LARGE",
    "LUCK",
    "ON_DEVICE",
    "PRETENDED",
    "QUICK_TYPES",
    "SHAPES",
    "TABLE",
    "TABLES",
    "TYPES",
    "V3",
    "WIDE",
    "InterpreterLaunch",
    "PretendedLaunch",
    "compare",
    "make_launch",
    "make_table",
    "ops_of",
    "results",
    "rounded",
    "strided",
    "to_device",
    "to_host",
    "without_a_device",
]
