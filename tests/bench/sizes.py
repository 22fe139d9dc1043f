"""Of the rows: those of DeepSeek-V3, and small ones."""

from __future__ import annotations

from refimpl.bench.works import Sizes

V3 = Sizes()
SMALL = Sizes(
    tokens=5, width=40, heads=2, keys=24, values=16, latent=24, rotated=8, sequences=2, hidden=24,
    experts=16, expert_hidden=16, groups=4, keep_groups=2, top_k=3, vocabulary=50, outputs=3,
    length=6, parameters=37,
)  # fmt: skip
