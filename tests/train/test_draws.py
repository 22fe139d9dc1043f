"""Random numbers by name."""

from __future__ import annotations

from itertools import pairwise

from refimpl.train.draws import generator, seed_of_rows


def test_names_decide() -> None:
    """The same name gives the same numbers, another name, seed or number others. Pinned: a run
    that is resumed on another machine must draw the same."""

    def drawn(*given: object) -> list[int]:
        return generator(*given).integers(0, 2**30, 4).tolist()  # type: ignore[arg-type]

    assert drawn(0, "order", 1) == drawn(0, "order", 1)
    names = [(0, "order", 1), (1, "order", 1), (0, "tasks", 1), (0, "order", 2), (0, "order", 1, 1)]
    assert len({tuple(drawn(*name)) for name in names}) == len(names)
    assert drawn(0, "order", 1) == PINNED


PINNED = [765175716, 1022452723, 847323720, 253362054]


def test_seeds_of_rows() -> None:
    """Rows that count up from them do not meet, a million rows each; the same again."""
    names = [(seed, what, step) for seed in range(3) for what in ("a", "b") for step in range(50)]
    found = sorted(seed_of_rows(*name) for name in names)
    assert min(b - a for a, b in pairwise(found)) > 10**6
    assert found == sorted(seed_of_rows(*name) for name in names)
