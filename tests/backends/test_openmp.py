"""The kernels' threads are torch's: one OpenMP runtime in the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sae_kernels.backends import cpu

LOADED = """
import torch
from sae_kernels.backends import cpu
cpu.module()
for path in sorted({line.split()[-1] for line in open("/proc/self/maps") if "libgomp" in line}):
    print(path)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc: not Linux")
@pytest.mark.skipif(
    cpu.module().build_info()["threads"] != "OpenMP", reason="_C was built without OpenMP"
)
def test_the_kernels_bring_no_openmp_of_their_own() -> None:
    """Two would each keep a thread a core, and spin on them while the other works."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED], capture_output=True, text=True, check=True
    )
    assert len(done.stdout.split()) == 1, done.stdout
