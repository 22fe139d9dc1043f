"""The table by which implementations plug in."""

from __future__ import annotations

from refimpl import ops
from refimpl.ops import REFERENCE


def test_table_matches_names() -> None:
    for name, pair in REFERENCE.items():
        assert pair.forward is getattr(ops, f"{name}_forward")
        assert pair.backward is getattr(ops, f"{name}_backward")
