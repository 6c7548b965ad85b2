"""Facts about this machine and installation for reports; what is unknown is None or empty."""

from __future__ import annotations

import functools
import platform
import subprocess
import time
from importlib import metadata, util
from pathlib import Path

import torch

from sae_kernels._version import __version__

_ROOT = Path(__file__).parent
_SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "ecc.mode.current",
    "mig.mode.current",
)


def cpu_model() -> str:
    """The processor's name, or at least its architecture."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = (line.partition(":")[2].strip() for line in text.splitlines() if "model name" in line)
    return next(names, "") or platform.processor() or platform.machine()


@functools.cache
def bf16_slowdown() -> float:
    """Time of torch's bf16 product on this CPU over that of its fp32 one, measured once.

    About 1/5 with AVX-512's bf16 units, less with AMX, and 2.5 to 5 with AVX2 alone.

    Example:
        >>> bf16_slowdown() > 0
        True
    """
    return _product_s(torch.bfloat16) / _product_s(torch.float32)


def _product_s(dtype: torch.dtype) -> float:
    """The least seconds of an encoder's product of 256 tokens."""
    x, W = torch.ones(256, 768, dtype=dtype), torch.ones(8192, 768, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first one sets up
        start = time.perf_counter()
        torch.mm(x, W.T)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def versions() -> dict[str, str | None]:
    """Versions of this package, Python, torch, Triton and CuPy; None for what is not installed."""
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
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        # CuPy's distributions are named after their version of CUDA; finding them reads every one.
        names = metadata.packages_distributions().get(module)
        return metadata.version(names[0]) if names else "unknown"


def checkout() -> tuple[str | None, bool | None]:
    """The git commit that this package runs from, and whether the checkout has changes.

    Both are None where the package is not in a checkout.
    """
    tracked = _output("git", "ls-files", "--", "__init__.py")
    commit = _output("git", "rev-parse", "--short", "HEAD") if tracked else ""
    changes = _output("git", "status", "--porcelain", "--untracked-files=no")
    return commit or None, bool(changes) if commit else None


def gpu(device: torch.device) -> dict[str, object]:
    """Facts about a GPU: name, capability, sizes, CUDA, and nvidia-smi's driver, clocks, limits."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "nvidia_smi": nvidia_smi(),
    }


def nvidia_smi() -> dict[str, str]:
    """Driver version, clocks, power limit, ... of the first GPU; empty without nvidia-smi."""
    out = _output("nvidia-smi", f"--query-gpu={','.join(_SMI_FIELDS)}", "--format=csv,noheader")
    return dict(zip(_SMI_FIELDS, out.partition("\n")[0].split(", "), strict=False)) if out else {}


def _output(*command: str) -> str:
    """The standard output of a program; empty if it is not installed."""
    try:
        done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
