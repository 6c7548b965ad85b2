"""``python -m sae_kernels`` with a fault of one rank, in the first attempt of torchrun.

``DOOM`` in the environment is a rank, a step (a batch, if it runs the model for others), seconds
after it begins, and what befalls it then: the name of a signal, "error" or "nan".
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from sae_kernels.cli import main
from sae_kernels.harvest import LiveBatches
from sae_kernels.training.run import TrainingRun

if TYPE_CHECKING:
    from collections.abc import Callable


class Bug(Exception):
    """Of a rank."""


def befall(broken: Any, fault: str) -> None:
    print(f"doomed at {time.time()}", file=sys.stderr, flush=True)
    if fault == "error":
        raise Bug("a wrong turn")
    if fault == "nan":
        broken().data.fill_(float("nan"))
    else:
        os.kill(os.getpid(), signal.Signals[fault])


def doom(rank: str, at: str, after: str, fault: str) -> None:
    """Lets the fault befall this rank, if it is the one, at its step or batch."""
    step, part = TrainingRun.step, LiveBatches.part

    def meet(place: int, broken: Callable[[], Any]) -> None:
        if place == int(at) and float(after):
            threading.Timer(float(after), befall, [broken, fault]).start()
        elif place == int(at):
            befall(broken, fault)

    def doomed_step(self: TrainingRun[Any], *args: Any) -> None:
        meet(self.training.made, lambda: self.training.sae.W_enc)
        step(self, *args)

    def doomed_part(self: LiveBatches) -> Any:
        meet(self.position, lambda: next(self._read[0].parameters()))
        return part(self)

    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        TrainingRun.step = doomed_step  # type: ignore[method-assign]
        LiveBatches.part = doomed_part  # type: ignore[method-assign]


if __name__ == "__main__":
    doom(*os.environ["DOOM"].split())
    sys.exit(main())
