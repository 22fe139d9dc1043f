"""A ring of pieces against attention over whole sequences; softmaxes put together."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.config import Conventions
from refimpl.errors import CouldNotRun
from refimpl.ops import REFERENCE, attention_backward, attention_forward
from refimpl.parallel.grid import Grid
from refimpl.parallel.ranks import Ranks
from refimpl.parallel.ring import ring, together

from drawn_batches import SMALL, cuts
from parallel.threads import in_threads
from support import FULL


@settings(max_examples=300 if FULL else 50, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_against_attention(data: st.DataObject, ranks: int) -> None:
    """Uneven pieces, padding, documents, queries that see nothing, a shared head, large scores."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    b, heads = 2, 2
    length = data.draw(st.integers(ranks, 9))
    shared = data.draw(st.booleans())
    q = data.draw(st.sampled_from([1.0, 30.0])) * rng.normal(size=(b, length, heads, 3))
    k = rng.normal(size=(b, length, 1 if shared else heads, 3))
    v = rng.normal(size=(b, length, 1 if shared else heads, 4))
    do = rng.normal(size=(b, length, heads, 4))
    told = {}
    if data.draw(st.booleans()):
        told["key_mask"] = rng.random((b, length)) < 0.6
    if data.draw(st.booleans()):
        told["segments"] = rng.integers(0, 3, (b, length))
    inner = [x for x in cuts(data, length, ranks) if x]
    ends = [0, *sorted({*inner, length})]
    pieces = [slice(i, j) for i, j in pairwise(ends)]

    def piece(group: object) -> tuple[np.ndarray, ...]:
        op, own = ring(REFERENCE, group).attention, pieces[group.rank]  # type: ignore[attr-defined]
        mine = {name: x[:, own] for name, x in told.items()}
        o, saved = op.forward(q[:, own], k[:, own], v[:, own], scale=0.5, **mine)
        return o, *op.backward(do[:, own], saved)

    found = [np.concatenate(x, axis=1) for x in zip(*in_threads(len(pieces), piece), strict=True)]
    o, saved = attention_forward(q, k, v, scale=0.5, **told)
    for x, wanted in zip(found, (o, *attention_backward(do, saved)), strict=True):
        # scores of up to 200 are rounded by 200 · 2⁻⁵³, and multiplied by numbers of up to 10
        assert np.max(np.abs(x - wanted)) <= 1e-12 * max(np.max(np.abs(wanted)), 1.0)


def test_together() -> None:
    """By hand: scores 0 and log 3 in two blocks; and a query that sees no block."""
    log = [np.array([0.0, -np.inf]), np.array([np.log(3.0), -np.inf])]
    outs = [np.array([8.0, 0.0]), np.array([4.0, 0.0])]
    o, lse = together([x.reshape(1, 2, 1, 1) for x in outs], [x.reshape(1, 1, 2, 1) for x in log])
    assert np.allclose(o.ravel(), [5.0, 0.0], rtol=1e-15)
    assert np.allclose(lse.ravel(), [np.log(4.0), 0.0], rtol=1e-15)


def test_blind_queries_that_read_all() -> None:
    class Alone:
        rank = 0

        def split(self, color: int) -> Alone:
            return self

    hf = replace(SMALL, conventions=Conventions(blind_query="mean"))
    with pytest.raises(CouldNotRun, match=r"^context_parallel must be 1 if blind_query is mean"):
        Ranks(Grid(context=2), Alone()).ops(REFERENCE, hf)  # type: ignore[arg-type]
