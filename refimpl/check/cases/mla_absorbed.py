"""Cases of `mla_absorbed`: those of `mla`."""

from __future__ import annotations

from .mla import REGIMES, case

__all__ = ["REGIMES", "case"]
