"""One truth and one clean port of each type for all tests of a process."""

from __future__ import annotations

import pytest

from port.examples import Example, example_of, without_catalogue


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    return example_of(tmp_path_factory.getbasetemp())


@pytest.fixture
def no_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    without_catalogue(monkeypatch)
