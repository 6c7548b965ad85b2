"""Runs measurements in a process of its own: ``python -m benchmarks.gpu_check.measure GROUP ...``.

A kernel that fails takes its process's CUDA context with it, and one that hangs takes the process.
So the process ends with the first group that fails, and `measurements` starts another for the rest.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.calls import GPU_BACKENDS
from benchmarks.gpu_check import epilogue, kernels, steps
from benchmarks.gpu_check.bench import Bench, Record
from sae_kernels import primitives
from sae_kernels.bench.processes import tied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


class Group(NamedTuple):
    """Measurements that belong together.

    Attributes:
        run: yields their records.
        least_s: not begun with less time than this left.
        most_s: stopped after it.
    """

    run: Callable[[Bench], Iterator[Record]]
    least_s: float = 10
    most_s: float = 60


def _group(run: Callable[..., Iterator[Record]], *arguments: str | int, **times: float) -> Group:
    return Group(lambda bench: run(bench, *arguments), **times)


def _selection(name: str) -> dict[str, Group]:
    return {
        f"select-{name}-{backend}": _group(kernels.select, name, backend)
        for backend in GPU_BACKENDS
    }


# By importance: whether it is right, then what was never measured, then what others can be told.
# What may fail alone is a group alone.
GROUPS: dict[str, Group] = {
    **{f"repeats-{name}": _group(kernels.repeats, name) for name in primitives.NAMES},
    "repeats-step": _group(steps.repeats),
    "rates": _group(kernels.device_rates),
    **_selection("gpu-small"),
    "step-gpu-small": _group(steps.step, "gpu-small"),
    **_selection("gpu-mid"),
    "step-gpu-mid": _group(steps.step, "gpu-mid"),
    "routed-8": _group(kernels.routed, "gpu-small", 8),
    "routed-32": _group(kernels.routed, "gpu-small", 32),
    "decode": _group(kernels.decode_both_ways),
    "hot": _group(steps.hot),
    "wide-split-master": _group(steps.wide, "split-master", least_s=30, most_s=90),
    "dense-gpu-small": _group(steps.dense, "gpu-small", least_s=30, most_s=90),
    "dense-gpu-mid": _group(steps.dense, "gpu-mid", least_s=30, most_s=90),
    "graph-gpu-small": _group(steps.graph, "gpu-small"),
    "epilogue-gpu-small": _group(epilogue.costs, "gpu-small"),
    "epilogue-gpu-mid": _group(epilogue.costs, "gpu-mid"),
    "residual": _group(kernels.decode_residual),
    "rows": _group(kernels.rows),
    "transpose": _group(kernels.transpose),
    "topk-gpu-small": _group(kernels.torch_topk, "gpu-small"),
    "topk-gpu-mid": _group(kernels.torch_topk, "gpu-mid"),
    "wide-encoder-copy": _group(steps.wide, "encoder-copy-only", least_s=30, most_s=90),
}


def measurements(names: list[str], dry: bool, deadline: float) -> Iterator[Record]:
    """The records of these groups, run until ``time.monotonic()`` reaches the deadline."""
    todo = list(names)
    while todo:
        for record in _process(todo, dry, deadline):
            if record["kind"] == "done":
                todo.remove(record["group"])
            else:
                yield record


def _process(todo: list[str], dry: bool, deadline: float) -> Iterator[Record]:
    """One process over some groups, as far as it gets; it is told when to stop and made to."""
    command = [sys.executable, "-m", "benchmarks.gpu_check.measure", *todo]
    command += ["--seconds", f"{deadline - time.monotonic():.1f}"] + ["--dry"] * dry
    process = subprocess.Popen(
        tied(command),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    out, err = process.stdout, process.stderr
    assert out is not None
    assert err is not None
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.extend(err), daemon=True)
    reader.start()
    group, alarm = todo[0], _alarm(process, GROUPS[todo[0]].most_s + 60)  # its start included
    for line in out:
        if not line.startswith("{"):
            continue  # somebody else's print
        record = json.loads(line)
        if record["kind"] == "started":
            alarm.cancel()
            group = record["group"]
            alarm = _alarm(process, GROUPS[group].most_s)
        elif record["kind"] == "end":
            group = ""
        else:
            yield record
    alarm.cancel()
    process.wait()
    if group:
        reader.join(5)
        why = "".join(errors)[-1500:].strip() or f"ended with {process.returncode}, no message"
        if process.returncode == -signal.SIGKILL:
            why = f"killed after its {GROUPS[group].most_s:.0f} s; {why}"
        yield {"kind": "failed", "group": group, "why": why}
        yield {"kind": "done", "group": group}


def _alarm(process: subprocess.Popen[str], seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, lambda: os.killpg(process.pid, signal.SIGKILL))
    timer.daemon = True
    timer.start()
    return timer


def main() -> None:
    """Prints a JSON line per record; ends with the first group that fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="+", choices=GROUPS)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--dry", action="store_true")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    bench = Bench(torch.device("cpu" if options.dry else "cuda"), options.dry)
    if options.dry:
        torch.set_num_threads(1)
    for name in options.groups:
        left = deadline - time.monotonic()
        if left < GROUPS[name].least_s and not options.dry:
            why = f"{left:.0f} s are left, it takes at least {GROUPS[name].least_s:.0f} s"
            _print({"kind": "skipped", "group": name, "what": name, "why": why})
            _print({"kind": "done", "group": name})
            continue
        _print({"kind": "started", "group": name})
        torch.manual_seed(0)
        for record in GROUPS[name].run(bench):
            _print({**record, "group": name} | ({"dry": True} if options.dry else {}))
        _settle(bench)
        _print({"kind": "done", "group": name})
    _print({"kind": "end"})


def _settle(bench: Bench) -> None:
    """Lets a failure show in the group that caused it, and hands the next one empty memory."""
    gc.collect()
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def _print(record: Record) -> None:
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
