"""The stages that come before any kernel runs: the package, and the kernels' cache."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu_check import journal, warm
from benchmarks.gpu_check.processes import end, said
from benchmarks.gpu_check.tasks import TASKS
from sae_kernels.bench.processes import tied

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu_check.bench import Record
    from benchmarks.gpu_check.processes import Place

_ROOT = Path(__file__).parents[2]
_BUILD_S, _COMPILE_S = 240, 45


def install(place: Place) -> Iterator[Record]:
    """Installs the checkout in place, kernels included."""
    command = [sys.executable, "-m", "pip", "install", "-e", "."]
    command += ["--no-build-isolation", "--no-deps"]
    for name in place.todo(["build"]):
        if place.dry:
            why = "a dry run leaves the installation alone"
            yield journal.done(name, "not available", 0, why)
            continue
        if place.finished and _built():
            yield journal.done(name, "passed", 0, "the run that is resumed did it on this machine")
            continue
        log, begin = place.log(name), time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                tied(command),
                cwd=_ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                process.wait(min(_BUILD_S, place.left()))
            except subprocess.TimeoutExpired:
                end(process)
        seconds = time.monotonic() - begin
        outcome, why = "passed", ""
        if process.returncode != 0:
            outcome, why = "failed", f"ended with {process.returncode}; it said: {said(log)}"
            yield {"kind": "failed", "what": name, "task": name, "why": why}
        yield journal.done(name, outcome, seconds, why)


def _built() -> bool:
    check = [sys.executable, "-c", "from sae_kernels import _C; _C.cuda_launch"]
    return not subprocess.run(tied(check), cwd=_ROOT, capture_output=True).returncode


def cache(place: Place) -> Iterator[Record]:
    """Unpacks kernels that were compiled ahead, if they are this machine's; compiles the others."""
    for name in place.todo(["cache"]):
        begin, folder = time.monotonic(), place.folder / "triton"
        found = {"kind": "cache", "task": name, "unpacked": 0, "why": "--warm names no file"}
        if place.warm is not None:
            wrong = warm.mismatches(place.warm)
            found["why"] = "; ".join(wrong)
            if not wrong:
                found["unpacked"] = warm.unpack(place.warm, folder)
        counts: Counter[str] = Counter(found=0, compiled=0)
        # The emulator has a cache of its own.
        names = [] if place.dry else list(TASKS)
        for record in warm.compile_all(names, folder, min(_COMPILE_S, place.left())):
            counts.update({what: record.get(what, 0) for what in counts})
            yield {**record, "task": name}
        yield {**found, **counts}
        yield journal.done(name, "passed", time.monotonic() - begin)
