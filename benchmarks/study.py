"""Shared by the studies: the shape cpu-small, options, results as JSON lines, ratios."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.bench.cases import CPU_SMALL
from sae_kernels.bench.contestants.clock import PeakMemory
from sae_kernels.bench.provenance import provenance
from sae_kernels.bench.timing import Timing, interleaved
from sae_kernels.config import SAEConfig, TrainConfig
from sae_kernels.nn import build
from sae_kernels.runs.metrics import MetricLog, read_metrics
from sae_kernels.step import FusedStep

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

B, D, F, K = CPU_SMALL
ROOT = Path(__file__).parent.parent
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
Record = dict[str, Any]
Records = Iterator[Record]
Runs = dict[str, Callable[[], object]]  # what takes turns, by name


def parser(about: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """Options of a study: ``--out`` and a number for each default, ``--rounds`` for one."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--out", type=Path, help="write the results to this .jsonl file")
    for name, value in defaults.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    return made


def report(command: str, records: Iterable[Record], out: Path | None, **facts: Any) -> None:
    """Prints the provenance and each record as a line of JSON; writes them to a file too."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
    first = {"provenance": provenance(f"python -m benchmarks.{command}"), **facts}
    with nullcontext() if out is None else MetricLog(out) as log:
        for line in itertools.chain([first], records):
            print(json.dumps(line), flush=True)
            if log is not None:
                log.write(line)


def bars(
    groups: Mapping[str, Callable[[str, int], Records]], about: str | None, command: str
) -> None:
    """The command line of groups of bars, each a function of the inputs and the rounds."""
    made = parser(about, rounds=7, threads=2)
    made.add_argument("--only", nargs="+", choices=groups, default=list(groups))
    made.add_argument("--inputs", nargs="+", choices=("zipf", "uniform"), default=["zipf"])
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    kinds = {name: options.inputs if name != "small" else ["uniform"] for name in options.only}
    chosen = (groups[name](kind, options.rounds) for name in options.only for kind in kinds[name])
    report(command, (record for group in chosen for record in group), options.out)


def ratios(case: str, runs: Runs, base: str, rounds: int, untimed: int = 0) -> Records:
    """Times runs in turns and gives the record of each, with its ratio to the base."""
    for name, timing in (times := interleaved(runs, rounds, untimed=untimed)).items():
        yield record(case, name, timing, times[base], base)


def peaks(case: str, runs: Mapping[str, Callable[[], int]], base: str) -> Records:
    """The peak in bytes that each run finds, in a process of its own, with its ratio to the base.

    Args:
        case, base: of the records.
        runs: by name; they return their :func:`peak_of`.
    """
    found = {}
    for name, run in runs.items():
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as own:
            found[name] = own.submit(run).result()
    for name, size in found.items():
        mib, ratio = round(size / 2**20, 1), round(size / max(1, found[base]), 3)
        yield {"case": case, "provider": name, "peak_mib": mib, "ratio": ratio, "base": base}


def peak_of(run: Callable[[], object]) -> int:
    """The bytes that a run takes at its highest, above what was there before.

    Raises:
        OSError: another system than Linux.
    """
    measured = PeakMemory(torch.device("cpu"))
    measured.start()
    run()
    found = measured.stop()
    if found is None:
        raise OSError("memory: expected Linux's /proc/self/clear_refs, it is not there")
    return found


def record(case: str, name: str, timing: Timing, base: Timing, base_name: str) -> Record:
    """A time and its ratio to a base."""
    values = {key: round(value, 3) for key, value in timing._asdict().items()}
    ratio = round(timing.median_ms / base.median_ms, 3)
    return {"case": case, "provider": name, **values, "ratio": ratio, "base": base_name}


def fused(
    config: SAEConfig, W: torch.Tensor, *, make: Any = FusedStep, bias: float = 0.0, **settings: Any
) -> Any:
    """A step on these encoder and decoder rows, in bf16 and without AuxK unless told otherwise."""
    sae = build(config)
    sae.W_enc.data.copy_(W)
    sae.W_dec.data.copy_(W)
    if bias:
        sae.b_enc.data.fill_(bias)
    common = {"compute": "bfloat16", "auxk_alpha": 0.0}
    own = TrainConfig.of(sae.objective_class, **{**common, **settings})
    return make(sae, own.objective, own.optimizer)


def stepping(steps: dict[str, Any], x: torch.Tensor, lr: float) -> Runs:
    """A run for each step: one call on a batch."""
    return {name: partial(step, x, lr=lr) for name, step in steps.items()}


def product(x: torch.Tensor, W: torch.Tensor) -> Callable[[], object]:
    """The encoder's product alone, as torch's library does it, into a buffer."""
    return partial(torch.mm, x, W.t(), out=torch.empty(len(x), len(W), dtype=x.dtype))


def read(path: Path) -> tuple[Record, list[Record]]:
    """A file's provenance and its records."""
    first, *records = read_metrics(path)
    return first["provenance"], records


def commit(facts: Record) -> str:
    """The commit and the day of a result."""
    changes = " with changes" if facts["dirty"] else ""
    return f"commit {facts['commit']}{changes}, {facts['time'][:10]}"
