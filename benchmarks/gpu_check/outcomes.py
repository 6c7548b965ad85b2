"""A pytest plugin: a JSON line per test, at once, with the kernels it tested.

``python -m pytest -p benchmarks.gpu_check.outcomes`` writes to the file that `VARIABLE` names. A
run that is stopped half way has then still said what it knows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Generator

VARIABLE = "SAE_KERNELS_OUTCOMES"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Notes the outcome of a test's call, or of the setup that failed or skipped it."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        module = getattr(item, "module", None)
        line = {
            "test": item.nodeid,
            "kernels": getattr(module, "PRIMITIVES", ()),
            "backend": next((v for n, v in parameters.items() if "backend" in n), "automatic"),
            "outcome": report.outcome,
            "why": report.longreprtext[-600:] if report.outcome == "failed" else "",
        }
        with Path(os.environ[VARIABLE]).open("a") as file:
            file.write(json.dumps(line) + "\n")
    return report
