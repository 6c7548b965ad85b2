"""Options of the pytest-benchmark suites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.bench import cases

if TYPE_CHECKING:
    import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--preset``, as of ``sae-kernels bench``."""
    parser.addoption("--preset", action="append", help=f"one of {', '.join(cases.PRESETS)}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case of the presets."""
    if "case" in metafunc.fixturenames:
        found = cases.chosen(metafunc.config.getoption("--preset") or ["tiny"])
        metafunc.parametrize("case", found, ids=lambda case: case.name)
