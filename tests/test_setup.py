"""The installation: which systems it is for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")
def test_windows_is_refused_with_a_way_out() -> None:
    """Signal 0 ends a process there, and folders would not be locked."""
    script = "import runpy, sys; sys.platform = 'win32'; runpy.run_path(sys.argv[1])"
    command = [sys.executable, "-c", script, str(ROOT / "setup.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == (
        "sae-kernels: expected Linux or another POSIX system, got Windows; use WSL 2\n"
    )
    assert "Operating System :: POSIX" in (ROOT / "pyproject.toml").read_text()
