"""Commands of runs of which a rank is doomed, how they end, and what they leave."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from tests.distributed.world import torchrun

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

STEPS = 24


def command(data: list[str], out: Path, timeout: int, **flags: int) -> list[str]:
    """Training whose weights are the same bits on 1, 2 and 4 ranks."""
    every = {
        "out": out,
        "blocks": 8,
        "timeout": timeout,
        "n_latents": 96,
        "k": 6,
        "steps": STEPS,
        "batch_size": 64,
        "checkpoint_every": 4,
        "compute": "float32",
        **flags,
    }
    given = [(f"--{name.replace('_', '-')}", str(value)) for name, value in every.items()]
    return ["train", *data, *(part for each in given for part in each)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "sae" / "sae.safetensors")


def assert_same(out: Path, straight: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, straight[name]), name


def ended(
    size: int, arguments: list[str], doom: str, restarts: int = 0
) -> tuple[subprocess.CompletedProcess[str], float]:
    """The end of a command with a fault, and the seconds from it."""
    module = "tests.distributed.doomed_ranks"
    done = torchrun(size, *arguments, module=module, restarts=restarts, DOOM=doom)
    at = re.search(r"doomed at ([\d.]+)", done.stderr)
    assert at, done.stderr
    return done, time.time() - float(at[1])


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one message of all ranks."""
    (message,) = re.findall("^sae-kernels: (.*)$", done.stderr, re.MULTILINE)
    return str(message)
