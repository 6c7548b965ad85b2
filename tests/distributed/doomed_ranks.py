"""``python -m sae_kernels`` with a fault of one rank, in the first attempt of torchrun.

``DOOM`` in the environment is a rank, a step, seconds after it begins, and what befalls it then:
the name of a signal, "error" or "nan".
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

from sae_kernels.cli import main
from sae_kernels.training.run import TrainingRun


class Bug(Exception):
    """Of a rank."""


def befall(run: TrainingRun[Any], fault: str) -> None:
    print(f"doomed at {time.time()}", file=sys.stderr, flush=True)
    if fault == "error":
        raise Bug("a wrong turn")
    if fault == "nan":
        run.training.sae.W_enc.data.fill_(float("nan"))
    else:
        os.kill(os.getpid(), signal.Signals[fault])


def doom(rank: str, at_step: str, after: str, fault: str) -> None:
    """Lets the fault befall this rank, if it is the one, at its step."""
    step = TrainingRun.step

    def doomed(self: TrainingRun[Any], *args: Any) -> None:
        if self.training.made == int(at_step):
            if float(after):
                threading.Timer(float(after), befall, [self, fault]).start()
            else:
                befall(self, fault)
        step(self, *args)

    if os.environ["RANK"] == rank and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        TrainingRun.step = doomed  # type: ignore[method-assign]


if __name__ == "__main__":
    doom(*os.environ["DOOM"].split())
    sys.exit(main())
