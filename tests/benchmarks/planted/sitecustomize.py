"""Plants faults into the processes of gpu_check that find this folder in PYTHONPATH.

Python imports this file by its name at the start of every process: a kernel that never ends, one
that ends its process and one that is wrong, where the real ones would be called.
"""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace
from typing import Any, NoReturn


def _endless(*_: object) -> NoReturn:
    while True:
        time.sleep(60)  # as if waiting for the device


def _deadly(*_: object) -> NoReturn:
    os.abort()


def _plant() -> None:
    from benchmarks import calls
    from benchmarks.gpu_check.tasks import TASKS

    real = calls.implementation

    def wrong(*inputs: Any) -> Any:
        return real("code_grad", "triton").run(*inputs) + 1

    planted = {"decode_residual": _endless, "row_sqnorm": _deadly, "code_grad": wrong}

    def implementation(primitive: str, backend: str) -> Any:
        if backend == "triton" and primitive in planted:
            return SimpleNamespace(run=planted[primitive])
        return real(primitive, backend)

    calls.implementation = implementation
    name = "oracle decode_residual triton"
    TASKS[name] = TASKS[name]._replace(limit_s=0.5)


if any(argument.startswith("benchmarks.gpu_check") for argument in sys.orig_argv):
    _plant()
