"""Contestants that raise, die, hang or give up, by the option "how", in the step "when"."""

import ctypes
import os
import time
from typing import Any

from contestants.contestant import Unable
from contestants.dense import DIFFERS, PACKAGE, Dense

__all__ = ["DIFFERS", "PACKAGE", "contestant"]


class Failing(Dense):
    steps = 0

    def step(self, x: Any) -> Any:
        self.steps += 1
        how = self.task.options["how"] if self.steps == self.task.options.get("when", 1) else ""
        if how == "raises":
            raise ArithmeticError("planted failure")
        if how == "dies":
            os._exit(3)
        if how == "hangs":
            time.sleep(3600)
        if how == "holds":  # no thread of Python's runs again
            ctypes.PyDLL(None).sleep(3600)
        if how == "unable":
            raise Unable("planted inability")
        return super().step(x)


contestant = Failing
