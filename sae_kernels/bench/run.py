"""Running the benchmark: starts, checks and times the workers of each case in turns."""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from sae_kernels.bench import inputs
from sae_kernels.bench.gate import TOKENS, judge
from sae_kernels.bench.outcomes import Outcome, OutOfTime, measured, records
from sae_kernels.bench.provenance import provenance
from sae_kernels.bench.results import Record, Results, Writer
from sae_kernels.bench.timing import in_turn
from sae_kernels.bench.workers import LIMIT_S, Failed, WorkerProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sae_kernels.bench.cases import Case
    from sae_kernels.bench.contestants.contestant import Task
    from sae_kernels.bench.providers import Provider
    from sae_kernels.data.rows import RowSource

    # Told a stage, what is done of it, its total, and which contestant it is at.
    Show = Callable[[str, int, int | None, str], None]

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
    show: Show = lambda stage, done, total, who: None,
    command: str = "sae-kernels",
) -> tuple[Results, BaseException | None]:
    """Measures cases with providers; every line is told and written as soon as it is known.

    Args:
        cases, providers, settings: what, who and how.
        out: a file for the lines.
        tell: takes each line, provenance first.
        show: takes the progress.
        command: what was run, without its arguments.

    Returns:
        All that was measured, and the KeyboardInterrupt or SystemExit that ended it early, which
        the caller raises when it has shown that; None if nothing did.
    """
    facts, ended = provenance(command, settings.threads, settings.device), None
    facts |= {"rounds": settings.rounds, "budget_s": settings.budget_s}
    found: list[Record] = []
    with ExitStack() as stack:
        writer = None if out is None else stack.enter_context(Writer(out, facts))
        tell({"provenance": facts})
        run = stack.enter_context(BenchRun(providers, settings, show))
        try:
            for record in run.records(cases):
                lines = [record]
                if run.libraries != facts.get("libraries", {}):
                    facts["libraries"] = dict(run.libraries)
                    lines.insert(0, {"provenance": {"libraries": facts["libraries"]}})
                found.append(record)
                for line in lines:
                    tell(line)
                    if writer is not None:
                        writer.write(line)
        except (KeyboardInterrupt, SystemExit) as error:
            ended = error
    return Results(facts, found), ended


class BenchRun:
    """Measures cases with providers, each in a process of its own.

    The budget begins with the object. No answer of a contestant is waited for longer than half of
    what is left of it, so that one that hangs leaves time for the others.

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
        show: Show = lambda stage, done, total, who: None,
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

    def records(self, cases: Sequence[Case]) -> Iterator[Record]:
        """Yields each record when it is known: of a contestant that ends early then, else by case.

        Ctrl-C ends a case early: what was measured of it comes before KeyboardInterrupt goes on,
        and so with SystemExit.
        """
        for i, case in enumerate(cases):
            self._show("cases", i, len(cases), "")
            outcomes = [Outcome(provider) for provider in self.providers]
            waiting, ended = list(outcomes), None
            try:
                # The case's share of the time ends its rounds, if not the case.
                share = time.monotonic() + self._left() / (len(cases) - i)
                for _ in self._measure(case, outcomes, share):
                    over = [outcome for outcome in waiting if outcome.status != "measured"]
                    waiting = measured(waiting)
                    yield from records(case, outcomes, over)
            except (KeyboardInterrupt, SystemExit) as error:
                ended = error
            for outcome in measured(waiting):
                if not outcome.seconds:
                    outcome.end("skipped", str(self._over()) if ended is None else "interrupted")
            yield from records(case, outcomes, waiting)
            if ended is not None:
                raise ended
        self._show("cases", len(cases), len(cases), "")

    def _measure(self, case: Case, outcomes: list[Outcome], share: float) -> Iterator[None]:
        """Measures a case; yields after each contestant's part of a phase."""
        with tempfile.TemporaryDirectory(prefix="sae-kernels-bench-") as folder:
            path, out = Path(folder, "inputs.safetensors"), Path(folder, "came")
            tasks: dict[str, Task] = {}
            yield from self._start(case, outcomes, path, tasks)
            given = load_file(path) if tasks else {}
            for outcome in self._each(case, outcomes, "check"):
                task = tasks[outcome.provider.key]
                with outcome.guarded():
                    if task.operation != "copy":
                        self._ask(outcome, do="gate", tokens=TOKENS, out=str(out))
                        outcome.error = judge(task, given["x"][:TOKENS], load_file(out), given)
                yield
            for outcome in self._each(case, outcomes, "warm up"):
                with outcome.guarded():
                    if outcome.provider.options.get("compile"):  # which takes memory of its own
                        self._ask(outcome, do="time", untimed=1, times=0)
                    answer = self._ask(outcome, do="peak")
                    outcome.peak_bytes, outcome.last = answer["measured"], answer["seconds"]
                yield
            self._leave_out_the_slowest(outcomes)
            yield
            self._time(case, outcomes, share)
            for outcome in self._each(case, outcomes, "profile"):
                # Apart from the times: a profiler takes time itself, which need not be there.
                if outcome.provider.operation is None and 4 * outcome.last < self._left():
                    with suppress(Failed, OutOfTime):
                        outcome.phases = self._ask(outcome, do="phases")["measured"]
            for worker in self._workers.values():
                if worker.alive:
                    worker.tell(do="end")

    def _start(
        self, case: Case, outcomes: list[Outcome], path: Path, tasks: dict[str, Task]
    ) -> Iterator[None]:
        """Sets up all contestants at once, as nothing is timed yet; notes their tasks."""
        for outcome in outcomes:
            why = outcome.provider.unable(case, self.settings.device)
            if why is not None:
                outcome.end("unable", why)
                yield
        if self._left() <= 0 or not measured(outcomes):
            return
        options = inputs.write(case, path, self.settings.data)
        for outcome in measured(outcomes):
            task = outcome.provider.task(case, self.settings.device, options)
            tasks[outcome.provider.key] = task
            self._worker(outcome).tell(do="start", task=task._asdict(), inputs=str(path))
        for outcome in self._each(case, outcomes, "start"):
            with outcome.guarded():
                answer = self._worker(outcome).answer(self._limit_s())
                self.libraries[outcome.provider.key] = answer
            yield

    def _each(self, case: Case, outcomes: list[Outcome], phase: str) -> Iterator[Outcome]:
        """The outcomes that are still being measured, each shown as a phase comes to it."""
        for outcome in measured(outcomes):
            if self._left() > 0:
                self._show(f"{case.name}: {phase}", 0, None, outcome.provider.key)
                yield outcome

    def _worker(self, outcome: Outcome) -> WorkerProcess:
        key = outcome.provider.key
        if key in self._workers and not self._workers[key].alive:
            self._workers.pop(key).close()
        if key not in self._workers:
            self._workers[key] = WorkerProcess(outcome.provider, self.settings.threads)
        return self._workers[key]

    def _ask(self, outcome: Outcome, **command: Any) -> dict[str, Any]:
        return self._worker(outcome).ask(self._limit_s(), **command)

    def _left(self) -> float:
        """Seconds left of the budget."""
        return self._ends - time.monotonic()

    def _limit_s(self) -> float:
        """The most seconds that the next answer may take."""
        if self._left() <= 0:
            raise self._over()
        return min(LIMIT_S, self._left() / 2)

    def _over(self) -> OutOfTime:
        return OutOfTime(f"the {self.settings.budget_s:.0f} s of the budget were over")

    def _leave_out_the_slowest(self, outcomes: list[Outcome]) -> None:
        """Leaves out the slowest until the least rounds of the others fit in the budget."""
        left = self._left()
        while (taking := measured(outcomes)) and left > 0:
            # One more, as no answer may take more than half of what is left.
            least = (_LEAST_ROUNDS + 1) * sum(map(_turn_s, taking))
            if least <= left:
                break
            slowest = max(taking, key=_turn_s)
            slowest.end(
                "skipped",
                f"left out: a run takes {slowest.last:.3g} s, and {_LEAST_ROUNDS} rounds with it "
                f"would not fit in the {left:.0f} s that are left of the budget",
            )

    def _time(self, case: Case, outcomes: list[Outcome], share: float) -> None:
        """Times rounds of turns as the budget allows."""
        took = sum(map(_turn_s, measured(outcomes)))
        for round_ in range(self.settings.rounds):
            # Another round, and the phases after it.
            enough = round_ >= _LEAST_ROUNDS and time.monotonic() + 2 * took > share
            if enough or 2 * took > self._left():
                break
            began = time.monotonic()
            for outcome in in_turn(measured(outcomes), round_):
                of = self.settings.rounds
                self._show(f"{case.name}: rounds", round_, of, outcome.provider.key)
                with outcome.guarded():
                    self._turn(outcome)
            took = time.monotonic() - began

    def _turn(self, outcome: Outcome) -> None:
        """Times one turn, after an untimed run to fill the caches unless runs are long."""
        time.sleep(_REST_S)
        untimed = int(outcome.last < _LONG_S)
        answer = self._ask(outcome, do="time", untimed=untimed, times=_repeats(outcome))
        outcome.last = statistics.median(answer["seconds"])
        outcome.seconds.append(outcome.last)
        outcome.hear(answer["calls"])


def _repeats(outcome: Outcome) -> int:
    return max(1, min(_MOST_REPEATS, round(_TURN_S / max(outcome.last, 1e-6))))


def _turn_s(outcome: Outcome) -> float:
    """Estimated seconds of a turn, from the time of the last run."""
    return (int(outcome.last < _LONG_S) + _repeats(outcome)) * outcome.last + _REST_S
