"""A dense step that takes 50 ms longer."""

import time
from typing import Any

from contestants.dense import DIFFERS, PACKAGE, Dense

__all__ = ["DIFFERS", "PACKAGE", "contestant"]


class Slow(Dense):
    def step(self, x: Any) -> Any:
        time.sleep(0.05)
        return super().step(x)


contestant = Slow
