"""A dense step that takes longer: by 50 ms, or by the option "seconds"."""

import time
from typing import Any

from contestants.dense import DIFFERS, PACKAGE, Dense

__all__ = ["DIFFERS", "PACKAGE", "contestant"]


class Slow(Dense):
    def step(self, x: Any) -> Any:
        time.sleep(self.task.options.get("seconds", 0.05))
        return super().step(x)


contestant = Slow
