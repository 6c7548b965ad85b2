"""Ends of processes: children that end with their parent, and signals that let it clean up.

On Linux the kernel kills them (PR_SET_PDEATHSIG): after SIGKILL nothing of this package runs any
more that could. Run as a script, this file becomes the command that follows on its command line;
it imports nothing but Python's own modules.
"""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


def tied(command: Sequence[str]) -> list[str]:
    """The command for ``subprocess``, killed when this process, or the thread that starts it, ends.

    Elsewhere than on Linux the command as it is: there a child ends when it next reads a pipe of
    its parent's.

    Example:
        >>> import subprocess
        >>> subprocess.run(tied(["echo", "here"]), capture_output=True, text=True).stdout
        'here\\n'
    """
    if sys.platform != "linux":
        return list(command)
    # Not preexec_fn: where there are threads only C may run between fork and exec.
    return [sys.executable, "-I", "-S", __file__, str(os.getpid()), *command]


def die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent ends; at once if that is no longer there."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the kernel knew
            os._exit(1)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP leave the block by SystemExit with 128 + their number; a second one kills.

    Signals that someone else handles or ignores stay as they are, and outside the main thread all.
    """
    replaced: list[signal.Signals] = []

    def leave(number: int, _frame: object) -> None:
        for each in replaced:
            signal.signal(each, signal.SIG_DFL)
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(each) == signal.SIG_DFL:
                signal.signal(each, leave)
                replaced.append(each)
    try:
        yield
    finally:
        for each in replaced:
            signal.signal(each, signal.SIG_DFL)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
