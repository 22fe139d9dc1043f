"""The table of all ops, and the implementations of NumPy alone."""

from __future__ import annotations

from refimpl import ops
from refimpl.ops import IMPLEMENTATIONS, REFERENCE

from support import STEMS


def test_table_matches_names() -> None:
    assert set(REFERENCE) <= set(STEMS)
    for name, pair in REFERENCE.items():
        assert pair.forward is getattr(ops, f"{name}_forward")
        assert pair.backward is getattr(ops, f"{name}_backward")


def test_implementations_replace_what_they_name() -> None:
    """An implementation is the reference but for the op that it is another way to."""
    for name, replaced in {"reference": set(), "flash": {"attention"}, "absorbed": {"mla"}}.items():
        table = IMPLEMENTATIONS[name]
        assert {op for op in REFERENCE if table[op] != REFERENCE[op]} == replaced
