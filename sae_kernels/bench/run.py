"""Running the benchmark: starts, checks and times the workers of each case in turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from sae_kernels.bench import inputs
from sae_kernels.bench.gate import TOKENS, judge
from sae_kernels.bench.outcomes import Outcome, measured, records
from sae_kernels.bench.provenance import provenance
from sae_kernels.bench.results import Record, Results, Writer
from sae_kernels.bench.timing import in_turn
from sae_kernels.bench.workers import WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sae_kernels.bench.cases import Case
    from sae_kernels.bench.contestants.contestant import Task
    from sae_kernels.bench.providers import Provider
    from sae_kernels.data.rows import RowSource

    Show = Callable[[str, int, int | None], None]  # told a stage, what is done of it, its total

_LEAST_ROUNDS = 3
_TURN_S = 0.03  # a turn of a short operation repeats it for so long
_MOST_REPEATS = 50
_LONG_S = 0.5  # a turn of one that takes so long has no untimed run before it
_REST_S = 0.02  # between turns, for the threads of the last one to fall asleep


@dataclass(frozen=True)
class BenchSettings:
    """The settings of a benchmark run."""

    device: str = "cpu"
    threads: int = field(default_factory=torch.get_num_threads)  # of every contestant
    rounds: int = 7  # turns of each contestant, at most
    budget_s: float = 270.0  # of the whole run: if it is short, rounds are fewer and cases left out
    data: RowSource | None = None  # stored activations for cases of "real" popularity


def measure(
    cases: Sequence[Case],
    providers: Sequence[Provider],
    settings: BenchSettings,
    out: Path | None = None,
    tell: Callable[[Record], None] = lambda line: None,
    show: Show = lambda stage, done, total: None,
    command: str = "sae-kernels",
) -> tuple[Results, bool]:
    """Measures cases with providers; each case's lines are written as soon as it is done.

    Args:
        cases, providers, settings: what, who and how.
        out: a file for the lines.
        tell: takes each line, provenance first.
        show: takes the progress.
        command: what was run, without its arguments.

    Returns:
        All that was measured, and whether Ctrl-C ended it.
    """
    facts, interrupted = provenance(command, settings.threads, settings.device), False
    facts |= {"rounds": settings.rounds, "budget_s": settings.budget_s}
    found: list[Record] = []
    with BenchRun(providers, settings, show) as run, ExitStack() as files:
        try:
            for several in run.records(cases):
                if not found:  # by now it is known what every contestant runs on
                    facts["libraries"] = run.libraries
                    tell({"provenance": facts})
                    writer = None if out is None else files.enter_context(Writer(out, facts))
                for record in several:
                    found.append(record)
                    tell(record)
                    if writer is not None:
                        writer.write(record)
        except KeyboardInterrupt:
            interrupted = True
    return Results(facts, found), interrupted


class BenchRun:
    """Measures cases with providers, each in a process of its own.

    Args:
        providers: who takes part, in the order of the tables.
        settings: how.
        show: told what is going on.

    Attributes:
        libraries: package, torch version and differences of each provider seen, by its key.
    """

    def __init__(
        self,
        providers: Sequence[Provider],
        settings: BenchSettings,
        show: Show = lambda stage, done, total: None,
    ) -> None:
        self.providers, self.settings, self._show = providers, settings, show
        self.libraries: dict[str, dict[str, str]] = {}
        self._workers: dict[str, WorkerProcess] = {}
        self._ends = time.monotonic() + settings.budget_s

    def __enter__(self) -> BenchRun:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.kill()
            worker.close()

    def records(self, cases: Sequence[Case]) -> Iterator[list[Record]]:
        """Yields the records of each case when it is done.

        Ctrl-C ends a case early: what was measured of it comes before KeyboardInterrupt goes on.
        """
        for i, case in enumerate(cases):
            self._show("cases", i, len(cases))
            outcomes = [Outcome(provider) for provider in self.providers]
            left = self._ends - time.monotonic()
            interrupted = None
            try:
                if left > 0:
                    self._measure(case, outcomes, time.monotonic() + left / (len(cases) - i))
            except KeyboardInterrupt as error:
                interrupted = error
            why = f"the {self.settings.budget_s:.0f} s were over" if left <= 0 else "interrupted"
            for outcome in measured(outcomes):
                if not outcome.seconds:
                    outcome.end("skipped", why)
            yield records(case, outcomes)
            if interrupted is not None:
                raise interrupted
        self._show("cases", len(cases), len(cases))

    def _measure(self, case: Case, outcomes: list[Outcome], deadline: float) -> None:
        with tempfile.TemporaryDirectory(prefix="sae-kernels-bench-") as folder:
            path, out = Path(folder, "inputs.safetensors"), Path(folder, "came")
            options = inputs.write(case, path, self.settings.data)
            tasks = self._start(case, outcomes, path, options)
            given = load_file(path)
            for outcome in measured(outcomes):
                self._show(f"{case.name}: check", 0, None)
                task = tasks[outcome.provider.key]
                with outcome.guarded():
                    if task.operation != "copy":
                        self._worker(outcome).ask(do="gate", tokens=TOKENS, out=str(out))
                        outcome.error = judge(task, given["x"][:TOKENS], load_file(out), given)
            self._time(case, outcomes, deadline)
            for outcome in measured(outcomes):
                if outcome.provider.operation is None:
                    # Apart from the times: a profiler takes time itself.
                    with outcome.guarded():
                        outcome.phases = self._worker(outcome).ask(do="phases")["measured"]
            for worker in self._workers.values():
                if worker.alive:
                    worker.tell(do="end")

    def _start(
        self, case: Case, outcomes: list[Outcome], path: Path, options: dict[str, float]
    ) -> dict[str, Task]:
        """Sets up all contestants at once, as nothing is timed yet."""
        tasks = {}
        for outcome in outcomes:
            provider = outcome.provider
            why = provider.unable(case, self.settings.device)
            if why is not None:
                outcome.end("unable", why)
                continue
            task = tasks[provider.key] = provider.task(case, self.settings.device, options)
            self._worker(outcome).tell(do="start", task=task._asdict(), inputs=str(path))
        for outcome in measured(outcomes):
            self._show(f"{case.name}: start", 0, None)
            with outcome.guarded():
                self.libraries[outcome.provider.key] = self._worker(outcome).answer()
        return tasks

    def _worker(self, outcome: Outcome) -> WorkerProcess:
        key = outcome.provider.key
        if key in self._workers and not self._workers[key].alive:
            self._workers.pop(key).close()
        if key not in self._workers:
            self._workers[key] = WorkerProcess(outcome.provider, self.settings.threads)
        return self._workers[key]

    def _time(self, case: Case, outcomes: list[Outcome], deadline: float) -> None:
        """Times rounds of turns as the budget allows, after untimed runs of each contestant."""
        for outcome in measured(outcomes):
            self._show(f"{case.name}: warm up", 0, None)
            with outcome.guarded():
                worker = self._worker(outcome)
                if outcome.provider.options.get("compile"):  # which takes memory of its own
                    worker.ask(do="time", untimed=1, times=0)
                answer = worker.ask(do="peak")
                outcome.peak_bytes, outcome.last = answer["measured"], answer["seconds"]
        for round_ in range(self.settings.rounds):
            self._show(f"{case.name}: rounds", round_, self.settings.rounds)
            began = time.monotonic()
            for outcome in in_turn(measured(outcomes), round_):
                with outcome.guarded():
                    self._turn(outcome)
            took = time.monotonic() - began
            # Another round, and the phases after it.
            if round_ + 1 >= _LEAST_ROUNDS and time.monotonic() + 2 * took > deadline:
                break

    def _turn(self, outcome: Outcome) -> None:
        """Times one turn, after an untimed run to fill the caches unless runs are long."""
        time.sleep(_REST_S)
        untimed = int(outcome.last < _LONG_S)
        times = max(1, min(_MOST_REPEATS, round(_TURN_S / max(outcome.last, 1e-6))))
        answer = self._worker(outcome).ask(do="time", untimed=untimed, times=times)
        outcome.last = statistics.median(answer["seconds"])
        outcome.seconds.append(outcome.last)
