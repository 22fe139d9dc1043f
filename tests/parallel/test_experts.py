"""Experts over several ranks against the op that has them all."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from refimpl.ops import REFERENCE
from refimpl.parallel.experts import OwnExperts, spread_experts
from refimpl.parallel.grid import even

from parallel.threads import in_threads
from support import FULL


@settings(max_examples=200 if FULL else 40, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_against_moe(data: st.DataObject, ranks: int) -> None:
    """Uneven tokens and experts, a hot expert, ranks whose experts nobody chooses."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    experts, top_k = data.draw(st.integers(max(ranks, 2), 6)), 2
    d, f = 4, 3
    counts = data.draw(st.lists(st.integers(1, 5), min_size=ranks, max_size=ranks))
    kinds = {
        "drawn": lambda n: rng.permuted(np.tile(np.arange(experts), (n, 1)), axis=1)[:, :top_k],
        "hot": lambda n: np.tile([experts - 1, 0], (n, 1)),
    }
    choose = kinds[data.draw(st.sampled_from(sorted(kinds)))]
    rows = sum(counts)
    x, dy = rng.normal(size=(2, 1, rows, d))
    weights, indices = rng.random((1, rows, top_k)), choose(rows)[None]
    stacks = [rng.normal(size=(experts, *shape)) for shape in ((f, d), (f, d), (d, f))]
    shared = [rng.normal(size=shape) for shape in ((f, d), (f, d), (d, f))]
    if data.draw(st.booleans()):
        shared = [None, None, None]  # type: ignore[list-item]
    starts, ends = even(experts, ranks), np.cumsum([0, *counts])

    def part(group: object) -> tuple[np.ndarray, ...]:
        rank = group.rank  # type: ignore[attr-defined]
        own = slice(ends[rank], ends[rank + 1])
        mine = [OwnExperts(w[starts[rank] : starts[rank + 1]], experts) for w in stacks]
        ops = spread_experts(REFERENCE, group, starts)  # type: ignore[arg-type]
        given = (x[:, own], weights[:, own], *mine, *shared)
        y, saved = ops.moe.forward(*given, indices=indices[:, own], ops=ops)
        return y, *ops.moe.backward(dy[:, own], saved)

    y, saved = REFERENCE.moe.forward(x, weights, *stacks, *shared, indices=indices, ops=REFERENCE)
    wanted = (y, *REFERENCE.moe.backward(dy, saved))
    found = list(zip(*in_threads(ranks, part), strict=True))
    joined = [np.concatenate(found[i], axis=1) for i in range(3)]  # y, dx, dweights
    joined += [np.concatenate(found[i], axis=0) for i in range(3, 6)]  # each rank's experts
    joined += [None if found[i][0] is None else sum(found[i]) for i in range(6, 9)]
    for a, b in zip(joined, wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert np.max(np.abs(a - b)) <= 1e-13 * max(np.max(np.abs(b)), 1.0)
