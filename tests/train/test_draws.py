"""Random numbers by name."""

from __future__ import annotations

from refimpl.train.draws import generator


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
