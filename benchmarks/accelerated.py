"""A pytest plugin that accelerates a library for all of a run: ``ACCELERATE=LIBRARY:LEVEL``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import sae_kernels as sk

if TYPE_CHECKING:
    import pytest

_running: list[Any] = []


def pytest_sessionstart(session: pytest.Session) -> None:
    """Accelerates, before a test is collected."""
    library, level = os.environ["ACCELERATE"].split(":")
    _running.append(sk.accelerate(library, level=level))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the report."""
    for run in _running:
        terminalreporter.write_line(str(run.report()))
        run.undo()
