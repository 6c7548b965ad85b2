"""Where and how a result was measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import sae_kernels
from sae_kernels import machine
from sae_kernels.backends import cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROOT = Path(sae_kernels.__file__).parent
_ASKED = (
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
# Where results go and stored data lie is this machine's own business.
_PLACES = ("--out", "--plot", "--data", "--compare")


def provenance(command: str, threads: int | None = None) -> dict[str, object]:
    """The machine, the versions, the commit and the command line.

    Args:
        command: what was run, without its arguments.
        threads: of the kernels; default: torch's present number.
    """
    commit = _commit()
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "cpu": machine.cpu_model(),
        "isa": cpu.isa(),
        "threads": threads or torch.get_num_threads(),
        **machine.versions(),
        "commit": commit,
        "dirty": bool(changes) if commit else None,
        "malloc": os.environ.get("GLIBC_TUNABLES") or os.environ.get("LD_PRELOAD") or "default",
        "command": " ".join([command, *without_places(sys.argv[1:])]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def gpu_provenance(device: torch.device) -> dict[str, object]:
    """The GPU, its driver, and the clocks and limits it runs at just now."""
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
    """What the driver says about the first GPU; empty without the program."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return {}
    first = done.stdout.partition("\n")[0].split(", ")
    return dict(zip(_ASKED, first, strict=False))


def without_places(arguments: Sequence[str]) -> list[str]:
    """The arguments but for paths: ``--out`` and the like lose their values.

    Example:
        >>> without_places(["--only", "step", "--out", "here/x.jsonl", "--plot=there"])
        ['--only', 'step']
    """
    kept, is_place = [], False
    for argument in arguments:
        if is_place:
            is_place = False
        elif argument in _PLACES:
            is_place = True
        elif argument.partition("=")[0] not in _PLACES:
            kept.append(argument)
    return kept


def _commit() -> str | None:
    """Of the checkout that this package lies in; None where it is installed apart from one."""
    if not _git("ls-files", "--", "__init__.py"):
        return None
    return _git("rev-parse", "--short", "HEAD") or None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return ""
    return done.stdout.strip()
