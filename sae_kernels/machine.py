"""What this machine and installation are, in words; it raises nothing."""

from __future__ import annotations

import platform
from importlib import metadata, util
from pathlib import Path

import torch

from sae_kernels._version import __version__


def cpu_model() -> str:
    """The processor's name, or at least its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = (line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line)
    return next(names, "") or platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Versions of what decides how the kernels run; None for what is not installed."""
    return {
        "sae_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cupy": _version("cupy"),
    }


def _version(module: str) -> str | None:
    if util.find_spec(module) is None:
        return None
    # CuPy's distributions are called after the CUDA that they are built for.
    names = metadata.packages_distributions().get(module, [module])
    try:
        return metadata.version(names[0])
    except metadata.PackageNotFoundError:
        return "unknown"
