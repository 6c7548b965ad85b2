"""Contestants that raise, die, hang or give up, by the option "how"."""

import os
import time
from typing import Any

from contestants.contestant import Unable
from contestants.dense import DIFFERS, PACKAGE, Dense

__all__ = ["DIFFERS", "PACKAGE", "contestant"]


class Failing(Dense):
    def step(self, x: Any) -> Any:
        how = self.task.options["how"]
        if how == "raises":
            raise ArithmeticError("planted failure")
        if how == "dies":
            os._exit(3)
        if how == "hangs":
            time.sleep(3600)
        if how == "unable":
            raise Unable("planted inability")
        return super().step(x)


contestant = Failing
