"""No test's files need to survive a power loss: fsync, which takes milliseconds, does nothing here.
Tests of it put their own in its place."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True, scope="session")
def no_power_loss() -> None:
    os.fsync = lambda descriptor: None
