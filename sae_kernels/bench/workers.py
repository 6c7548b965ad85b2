"""The parent's side of a worker process: starting it, sending commands, and timeouts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.bench.contestants.contestant import Unable
from sae_kernels.bench.processes import tied

if TYPE_CHECKING:
    from sae_kernels.bench.providers import Provider

LIMIT_S = 300.0  # an answer that takes longer is not waited for, whatever the budget
_FOLDER = Path(__file__).parent
# The folder of contestants as a package of its own: appended, so that it hides nobody's module.
_START = (
    "import sys; sys.path.append(sys.argv[1]); from contestants.worker import main; "
    "main(sys.argv[2], int(sys.argv[3]))"
)


class Failed(Exception):
    """Raised when a contestant raised, died or did not answer in time."""


class WorkerProcess:
    """A worker process that runs one contestant.

    Args:
        provider: the contestant's.
        threads: of its products and kernels.
    """

    def __init__(self, provider: Provider, threads: int) -> None:
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # OMP_WAIT_POLICY is left alone: with passive waiting a library of many small operations
        # took 2.5 times as long. Threads go to sleep by themselves after some milliseconds.
        self._limit: float | None = None  # in seconds, of the answer that it was killed for
        command = [str(provider.python), "-c", _START, str(_FOLDER), provider.module, str(threads)]
        self._process = subprocess.Popen(
            tied(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": str(threads)},
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

    def tell(self, **command: Any) -> None:
        """Sends a command; :meth:`answer` waits for the reply."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()

    def answer(self, limit_s: float) -> dict[str, Any]:
        """Waits for the reply to the last command; kills the process if that takes too long.

        Raises:
            Unable, Failed: with the contestant's message.
        """
        assert self._process.stdout is not None
        alarm = threading.Timer(limit_s, self._end_late, [limit_s])
        alarm.daemon = True
        alarm.start()
        line = self._process.stdout.readline()
        alarm.cancel()
        if not line:
            raise Failed(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "unable" in answer:
            raise Unable(answer["unable"])
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def ask(self, limit_s: float, **command: Any) -> dict[str, Any]:
        """Sends a command and waits for the reply."""
        self.tell(**command)
        return self.answer(limit_s)

    def _end_late(self, limit_s: float) -> None:
        self._limit = limit_s
        self.kill()

    def kill(self) -> None:
        """Kills the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Asks the process to exit, and kills it if it does not."""
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self._errors.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        why = f"; its last line: {lines[-1][:300]}" if lines else ""
        if self._limit is not None:
            return f"killed, as it gave no answer in {self._limit:.3g} s{why}"
        if code == -signal.SIGKILL:
            return f"killed by the system, which may have run out of memory{why}"
        return f"its process ended with {code}{why}"
