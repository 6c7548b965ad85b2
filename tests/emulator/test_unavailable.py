"""What is missing is said, and never a test that passes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emulator import cuda_kernels, library
from sae_kernels import gpu

ROOT = Path(__file__).parents[2]
TEST = "tests/primitives/test_pick_dead.py"


def test_a_version_of_triton_that_was_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "triton_version", lambda: (3, 9))
    assert (
        library.unavailable() == "the emulator was tried with the launcher of Triton 3.6, found 3.9"
    )
    monkeypatch.setattr(gpu, "triton_version", lambda: None)
    assert "Triton is not installed" in str(library.unavailable())


def test_no_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert library.unavailable() == "no C++ compiler: neither CXX nor c++"
    assert cuda_kernels.unavailable() == "no nvcc in the PATH"


@pytest.mark.full
def test_every_test_is_skipped_with_the_reason() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {
        "PATH": ""
    }
    options = ["-n", "0", "-rs", "-p", "no:cacheprovider", "--emulate", "sm_80"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, TEST],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no C++ compiler" in done.stdout
    assert "skipped" in done.stdout
    assert "passed" not in done.stdout
