"""Runs in processes that are made to fail; the tests look at what is left of them."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, Any

import tomli_w  # noqa: F401  # what the package imports late, nobody may not be able to read
import torch

from sae_kernels.config import OutputConfig
from sae_kernels.nn import TopKConfig
from sae_kernels.training import TrainingResult, train
from tests.settings import settings

if TYPE_CHECKING:
    from collections.abc import Callable

SAE = TopKConfig(24, 192, 6)
STEPS, EVERY = 80, 7
CONFIG = settings(
    SAE, steps=STEPS, batch_size=64, lr=2e-3, compute="float32", dead_after_tokens=3000, log_every=1
)
OUTPUT = OutputConfig(checkpoint_every=EVERY, keep_checkpoints=2)


def data() -> torch.Tensor:
    return torch.randn(3000, 24, generator=torch.Generator().manual_seed(0))


def run(folder: str, on_step: Callable[[int, Any], None] | None = None) -> TrainingResult:
    """The run of all these tests: fresh, or from where it was."""
    return train(SAE, data(), CONFIG, folder=folder, output=OUTPUT, resume=True, on_step=on_step)


def quietly(target: Callable[..., object], *arguments: Any) -> None:
    """Runs in a process of its own, one thread for the kernels; errors go to a file it names."""
    torch.set_num_threads(1)
    try:
        target(*arguments)
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(3)


def to_the_end(folder: str) -> None:
    run(folder)


def with_errors_in(target: Callable[..., object], folder: str, log: str, *more: Any) -> None:
    """The same with standard error in a file."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
    os.dup2(descriptor, 2)
    target(folder, *more)


def signalled(folder: str, step: int, number: int, times: int) -> None:
    """Sends itself a signal after a step, so many times."""

    def on_step(i: int, line: object) -> None:
        if i + 1 == step:
            for _ in range(times):
                os.kill(os.getpid(), number)

    run(folder, on_step)


def small_files(folder: str, limit: int) -> None:
    """No file may grow beyond a limit: what a full disk does, file by file."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run(folder)


def as_nobody(folder: str) -> None:
    """A user who may not write there."""
    if os.getuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    run(folder)
