"""One truth and one clean port of each type for all tests of a process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from port.examples import TINY, Arrays, clean, parameters, routes_of, write_truth


class Example(NamedTuple):
    folder: Path
    truth: Path
    arrays: Arrays  # of the truth
    ports: dict[str, Arrays]  # clean ones, by type


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    folder = tmp_path_factory.mktemp("port")
    arrays = write_truth(folder / "truth")
    ports = {
        dtype: clean(folder / dtype, parameters(), TINY, dtype, 17, routes_of(arrays))
        for dtype in ("float64", "float32")
    }
    return Example(folder, folder / "truth", arrays, ports)
