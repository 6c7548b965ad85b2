"""What a call of Triton kernels executes in the emulator: launches, instructions and their PTX."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from triton.runtime.jit import JITFunction

from emulator import library, triton_driver

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest


class Counted(NamedTuple):
    """What a call did, by the names of its kernels."""

    launches: Counter[str]
    instructions: Counter[str]  # of warps
    ptx: dict[str, str]


def counted(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch, sm: int) -> Counted:
    """Runs a call in the emulator."""
    found, launch = Counted(Counter(), Counter(), {}), JITFunction.run

    def note(name: str, ptx: str) -> str:
        found.ptx[name] = ptx
        return ptx

    def counting(self: Any, *args: Any, **options: Any) -> Any:
        before = emulator.emulator_instructions()
        kernel = launch(self, *args, **options)
        found.launches[self.__name__] += 1
        found.instructions[self.__name__] += emulator.emulator_instructions() - before
        return kernel

    with triton_driver.emulated(sm, note), monkeypatch.context() as patch:
        emulator = library.library()
        patch.setattr(JITFunction, "run", counting)
        call()
    return found
