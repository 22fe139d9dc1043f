"""Numbers as tables show them, with three digits."""

from __future__ import annotations

from .measure import Times

__all__ = ["amount", "digits", "seconds", "time_of"]


def time_of(t: Times | None) -> str:
    """Median and spread."""
    return "–" if t is None else f"{seconds(t.median)} ({seconds(t.low)} … {seconds(t.high)})"


def seconds(x: float) -> str:
    """In µs or ms."""
    unit, scale = ("µs", 1e6) if x < 1e-3 else ("ms", 1e3)
    return f"{digits(x * scale)} {unit}"


def amount(x: float) -> str:
    """In bytes, up to GB."""
    unit, scale = next(
        (u, s) for u, s in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)) if x >= s or s == 1
    )
    return f"{digits(x / scale)} {unit}"


def digits(x: float) -> str:
    """A number in three digits or more."""
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"
