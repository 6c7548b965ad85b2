"""The emulator of tests/emulator in place of a GPU, for runs without one."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sae_kernels import backends

if TYPE_CHECKING:
    from collections.abc import Iterator

ARCHITECTURE = 90
BACKENDS = "triton,cuda,reference"
TESTS = Path(__file__).parents[2] / "tests"


def unavailable() -> str | None:
    """The reason why there can be no dry run here, or None."""
    _find()
    from emulator import library

    reason: str | None = library.unavailable()
    return reason


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside the block the kernels for GPUs run on CPU tensors; CUDA C++ where nvcc is there."""
    _find()
    from emulator import cuda_kernels, triton_driver

    with contextlib.ExitStack() as stack:
        stack.enter_context(triton_driver.emulated(ARCHITECTURE))
        if cuda_kernels.unavailable() is None:
            stack.enter_context(cuda_kernels.emulated(ARCHITECTURE))
        # Chosen by itself would be the host's backend, for the tensors are the host's.
        stack.enter_context(backends.use(BACKENDS))
        yield


def driver_library() -> None:
    """Lets Triton link its launchers where there is no driver: the emulator has the same names."""
    _find()
    from emulator import library

    library.library()


def _find() -> None:
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
