"""A pytest plugin: a JSON line per test, at once, with the kernels it tested.

``python -m pytest -p benchmarks.gpu_check.outcomes`` writes to the file that `VARIABLE` names,
first that a test began, then its outcome. So a run that is stopped half way has said what it knows,
and one that is started again with the same file leaves out what is known. It ends itself with the
first test that loses the GPU's context: nothing after it in that process would mean anything.
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
_LOST = ("CUDA error", "CUDA_ERROR", "AcceleratorError")


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The last line about each test, by its name; the outcome of one under way is "began"."""
    whole = path.read_text().rpartition("\n")[0] if path.exists() else ""
    return {line["test"]: line for line in map(json.loads, whole.splitlines())}


def keep_known(path: Path) -> None:
    """Takes tests out of the file that had begun and not ended when their run was killed."""
    known = [line for line in read(path).values() if line["outcome"] != "began"]
    path.write_text("".join(json.dumps(line) + "\n" for line in known))


def note(path: Path, line: dict[str, Any]) -> None:
    """Appends a line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out tests that have an outcome."""
    known = read(_path())
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in known])
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Notes that a test begins."""
    note(_path(), _about(item, "began"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Notes the outcome of a test's call, or of the setup that failed or skipped it."""
    report = yield
    if report.when == "call" or report.outcome != "passed":
        text = report.longreprtext if report.outcome == "failed" else ""
        note(_path(), {**_about(item, report.outcome), "why": text[-600:]})
        if any(word in text for word in _LOST):
            item.session.shouldstop = "the GPU's context is lost"
    return report


def _path() -> Path:
    return Path(os.environ[VARIABLE])


def _about(item: pytest.Item, outcome: str) -> dict[str, Any]:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return {
        "test": item.nodeid,
        "kernels": getattr(getattr(item, "module", None), "PRIMITIVES", ()),
        "backend": next((v for n, v in parameters.items() if "backend" in n), "automatic"),
        "outcome": outcome,
        "why": "",
    }
