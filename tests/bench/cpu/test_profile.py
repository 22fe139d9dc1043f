"""Where a step's time goes: every op of the table is counted, each once."""

from __future__ import annotations

import pytest

from refimpl.bench.cpu.profile import Clock, profile
from refimpl.bench.cpu.rows import TOY_ROWS
from refimpl.ops import REFERENCE, Op


@pytest.mark.parametrize("column", ["reference", "numba_cpu"])
def test_ops_of_a_step(column: str) -> None:
    sizes = TOY_ROWS["step-d128"].sizes
    lines = {line.what: line for line in profile(column, sizes, 2)}
    assert lines["mla"].calls == sizes.layers
    assert lines["moe"].calls == sizes.layers - 1
    assert {"AdamW", "rest of the model", "head_cross_entropy", "router"} <= lines.keys()
    assert all(line.seconds > 0 for line in lines.values())
    assert (lines["moe"].floor > 0) == (column == "numba_cpu")


def test_what_an_op_calls_is_not_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A composite that takes 20 s, in which another op takes 30 s."""
    now = [0.0]
    monkeypatch.setattr("refimpl.bench.cpu.profile.time.perf_counter", lambda: now[0])
    clock = Clock()

    def inner(dy: object, saved: object) -> None:
        now[0] += 30

    table = clock.watch(REFERENCE | {"linear": Op(inner, inner)})

    def outer(dy: object, saved: object) -> None:
        now[0] += 20
        table.linear.backward(dy, saved)

    clock.watch(REFERENCE | {"ffn": Op(outer, outer)}).ffn.backward(None, None)
    assert clock.own == {"linear": 30, "ffn": 20}
