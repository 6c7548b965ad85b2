"""Counts what the host does in a call: numbers that do not depend on the machine."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch.utils._python_dispatch import TorchDispatchMode

import sae_kernels

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

_PACKAGE = str(Path(sae_kernels.__file__).parent)


class HostWork(NamedTuple):
    """What a call asks of the host.

    Attributes:
        functions: calls of the package's own Python functions; comprehensions do not count, which
            are functions in some versions of Python only.
        operators: calls of torch's operators outside of the primitives' implementations.
    """

    functions: int
    operators: int


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.n += 1
        return func(*args, **(kwargs or {}))


def host_work(call: Callable[[], object]) -> HostWork:
    """Counts a call's work, in two runs of it."""
    functions = 0

    def notice(frame: FrameType, event: str, argument: object) -> None:
        nonlocal functions
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_PACKAGE):
            functions += not code.co_name.startswith("<")

    before = sys.getprofile()
    sys.setprofile(notice)
    try:
        call()
    finally:
        sys.setprofile(before)
    with _Counting() as counting:
        call()
    return HostWork(functions, counting.n)
