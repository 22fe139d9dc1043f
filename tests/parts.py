"""The tests in parts, for a machine that has no time for all of them."""

from __future__ import annotations

import re
from zlib import crc32

import pytest


def in_part(test: str, part: str) -> bool:
    """Whether a test belongs to the part "2/4", the second of four. Its name decides, so that the
    four are alike in size, and the same everywhere."""
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", part)
    if not found or int(found[1]) > int(found[2]):
        raise pytest.UsageError(f"REFIMPL_TEST_PART: want one like 2/4, got {part!r}")
    return crc32(test.encode()) % int(found[2]) == int(found[1]) - 1
