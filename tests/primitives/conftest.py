"""Every test of a primitive runs on poisoned memory, and on one thread unless it says otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.backends import cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from drawn import Drawn


@pytest.fixture(autouse=True)
def _surroundings(poisoned: None, one_thread: None) -> None:
    """See the fixtures."""


@pytest.fixture(params=["sm_80", "sm_90"])
def emulated_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs the GPU kernels that a test launches emulated, on each architecture."""
    from emulator import library, triton_driver  # Triton need not be installed

    reason = library.unavailable()
    if reason is not None:
        pytest.skip(reason)
    with triton_driver.emulated(triton_driver.ARCHITECTURES[request.param]):
        yield


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch, restore_threads: None) -> Callable[[Drawn], None]:
    """Puts a drawn problem's variant, threads and seed into force."""

    def do(drawn: Drawn) -> None:
        monkeypatch.setenv(cpu.ISA_VARIABLE, drawn.isa)
        torch.set_num_threads(drawn.threads)
        torch.manual_seed(drawn.seed)

    return do
