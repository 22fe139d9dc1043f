"""`make test-full` in parts: each test is in one of them."""

from __future__ import annotations

import pytest

from parts import in_part


def test_every_test_is_in_one_part() -> None:
    names = [f"tests/test_parts.py::test_{i}" for i in range(1000)]
    found = [[name for name in names if in_part(name, f"{i}/4")] for i in (1, 2, 3, 4)]
    assert sorted(name for part in found for name in part) == sorted(names)
    assert all(200 < len(part) < 300 for part in found)
    assert [name for name in names if in_part(name, "1/1")] == names


@pytest.mark.parametrize("part", ["0/4", "5/4", "4", "1/0", "a/b", "1/4 "])
def test_parts_that_are_none(part: str) -> None:
    with pytest.raises(pytest.UsageError, match="want one like 2/4, got"):
        in_part("a test", part)
