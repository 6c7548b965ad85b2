"""Facts about the machine, which reports and bug reports show."""

from __future__ import annotations

from importlib import metadata
from typing import TYPE_CHECKING

from sae_kernels import machine

if TYPE_CHECKING:
    import pytest


def test_a_version_is_found_without_reading_every_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading them takes half a second of each report, and torch is called as its module is."""

    def read() -> None:
        raise AssertionError("every distribution was read")

    monkeypatch.setattr(metadata, "packages_distributions", read)
    assert machine._version("torch") == metadata.version("torch")
    assert machine._version("no_such_module") is None
