"""Every test of a primitive runs on poisoned memory, and on one thread unless it says otherwise."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _surroundings(poisoned: None, one_thread: None) -> None:
    """See the fixtures."""
