"""Tests of the emulator need what it needs."""

from __future__ import annotations

import pytest

from emulator import library


@pytest.fixture(autouse=True)
def _emulator() -> None:
    reason = library.unavailable()
    if reason is not None:
        pytest.skip(reason)
