"""Provenance of a result: machine, versions, commit and command line."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

import torch

from sae_kernels import machine
from sae_kernels.backends import cpu

if TYPE_CHECKING:
    from collections.abc import Sequence

# What lets a machine behave as one with less.
_ISA_LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "SAE_KERNELS_CPU_ISA")
# Where results go and stored data lie is this machine's own business.
_PLACES = ("--out", "--plot", "--data", "--compare", "--scratch", "--warm")


def provenance(command: str, threads: int | None = None, device: str = "cpu") -> dict[str, object]:
    """Collects the machine, versions, commit and command line of a result.

    Args:
        command: what was run, without its arguments.
        threads: of the kernels; default: torch's present number.
        device: "cuda" adds the GPU, its clocks and its driver.
    """
    commit, dirty = machine.checkout()
    return {
        "cpu": machine.cpu_model(),
        "isa": cpu.isa(),
        "threads": threads or torch.get_num_threads(),
        **machine.versions(),
        "commit": commit,
        "dirty": dirty,
        "isa_limits": {name: os.environ[name] for name in _ISA_LIMITS if name in os.environ},
        "malloc": os.environ.get("GLIBC_TUNABLES") or os.environ.get("LD_PRELOAD") or "default",
        "command": " ".join([command, *without_places(sys.argv[1:])]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **(machine.gpu(torch.device(device)) if device == "cuda" else {}),
    }


def without_places(arguments: Sequence[str]) -> list[str]:
    """Removes arguments that are paths, such as ``--out`` and its value.

    Example:
        >>> without_places(["--only", "step", "--out", "here/x.jsonl", "--plot=there"])
        ['--only', 'step']
    """
    pairs = zip(["", *arguments], arguments, strict=False)
    return [a for before, a in pairs if not {before, a.partition("=")[0]} & {*_PLACES}]
