"""One run: workers are started, judged and timed in turns, and each case's records handed on."""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from sae_kernels.bench import inputs
from sae_kernels.bench.contestants.contestant import Unable
from sae_kernels.bench.entrants import Entrant, records
from sae_kernels.bench.gate import TOKENS, WrongResult, judge
from sae_kernels.bench.timing import in_turn
from sae_kernels.bench.workers import Failed, Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sae_kernels.bench.cases import Case
    from sae_kernels.bench.contestants.contestant import Task
    from sae_kernels.bench.providers import Provider
    from sae_kernels.bench.results import Record
    from sae_kernels.data.batches import RowSource

_LEAST_ROUNDS = 3
_TURN_S = 0.03  # a turn of a short operation repeats it for so long
_MOST_REPEATS = 50
_LONG_S = 0.5  # a turn of one that takes so long has no untimed run before it
_REST_S = 0.02  # between turns, for the threads of the last one to fall asleep


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Attributes:
        device: "cpu" or "cuda".
        threads: of every contestant.
        rounds: turns of each contestant, at most.
        budget_s: of the whole run: rounds are fewer, and cases left out, where it is short.
        data: stored activations for cases of "real" popularity.
    """

    device: str = "cpu"
    threads: int = field(default_factory=torch.get_num_threads)
    rounds: int = 7
    budget_s: float = 270.0
    data: RowSource | None = None


class Run:
    """Measures cases with providers.

    Args:
        providers: who takes part, in the order of the tables.
        settings: how.
        show: told what is going on: stage, done, total.

    Attributes:
        libraries: package, torch version and differences of each provider seen, by its key.
    """

    def __init__(
        self,
        providers: Sequence[Provider],
        settings: Settings,
        show: Callable[[str, int, int | None], None] = lambda stage, done, total: None,
    ) -> None:
        self.providers, self.settings, self._show = providers, settings, show
        self.libraries: dict[str, dict[str, str]] = {}
        self._workers: dict[str, Worker] = {}
        self._ends = time.monotonic() + settings.budget_s

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers.values():
            worker.kill()
            worker.close()

    def records(self, cases: Sequence[Case]) -> Iterator[list[Record]]:
        """The records of each case, all at once when it is done.

        Ctrl-C ends a case early: what was measured of it comes before KeyboardInterrupt goes on.
        """
        for i, case in enumerate(cases):
            self._show("cases", i, len(cases))
            entrants = [Entrant(provider) for provider in self.providers]
            left = self._ends - time.monotonic()
            interrupted = None
            if left <= 0:
                _all_out(entrants, "skipped", f"the {self.settings.budget_s:.0f} s were over")
            else:
                try:
                    self._measure(case, entrants, time.monotonic() + left / (len(cases) - i))
                except KeyboardInterrupt as error:
                    interrupted = error
                    untimed = [e for e in entrants if not e.seconds]
                    _all_out(untimed, "skipped", "interrupted")
            yield records(case, entrants)
            if interrupted is not None:
                raise interrupted
        self._show("cases", len(cases), len(cases))

    def _measure(self, case: Case, entrants: list[Entrant], deadline: float) -> None:
        with tempfile.TemporaryDirectory(prefix="sae-kernels-bench-") as folder:
            path = Path(folder) / "inputs.safetensors"
            options = inputs.write(case, path, self.settings.data)
            tasks = self._start(case, entrants, path, options)
            given = load_file(path)
            for entrant in _still_in(entrants):
                self._show(f"{case.name}: check", 0, None)
                self._gate(entrant, tasks[entrant.provider.key], given, Path(folder) / "came")
            self._time(case, entrants, deadline)
            for entrant in _still_in(entrants):
                self._guarded(entrant, self._split)
            for worker in self._workers.values():
                if worker.alive:
                    worker.tell(do="end")

    def _start(
        self, case: Case, entrants: list[Entrant], path: Path, options: dict[str, float]
    ) -> dict[str, Task]:
        """Sets all of them up at once: nothing is timed yet."""
        tasks, told = {}, []
        for entrant in entrants:
            provider = entrant.provider
            why = provider.unable(case, self.settings.device)
            if why is not None:
                entrant.out("unable", why)
                continue
            task = tasks[provider.key] = provider.task(case, self.settings.device, options)
            self._worker(entrant).tell(do="start", task=task._asdict(), inputs=str(path))
            told.append(entrant)
        for entrant in told:
            self._show(f"{case.name}: start", 0, None)
            self._guarded(entrant, self._started)
        return tasks

    def _worker(self, entrant: Entrant) -> Worker:
        key = entrant.provider.key
        worker = self._workers.get(key)
        if worker is None or not worker.alive:
            if worker is not None:
                worker.close()
            worker = self._workers[key] = Worker(entrant.provider, self.settings.threads)
        return worker

    def _started(self, entrant: Entrant) -> None:
        entrant.about = self._worker(entrant).answer()
        self.libraries[entrant.provider.key] = entrant.about

    def _gate(
        self, entrant: Entrant, task: Task, given: dict[str, torch.Tensor], out: Path
    ) -> None:
        if task.operation == "copy":
            return

        def gate(entrant: Entrant) -> None:
            self._worker(entrant).ask(do="gate", tokens=TOKENS, out=str(out))
            entrant.error = judge(task, given["x"][:TOKENS], load_file(out), given)

        self._guarded(entrant, gate)

    def _time(self, case: Case, entrants: list[Entrant], deadline: float) -> None:
        """Rounds of turns, as many as the time allows; the first runs of each do not count."""
        for entrant in _still_in(entrants):
            self._show(f"{case.name}: warm up", 0, None)
            self._guarded(entrant, self._warm_up)
        for round_ in range(self.settings.rounds):
            self._show(f"{case.name}: rounds", round_, self.settings.rounds)
            began = time.monotonic()
            for entrant in in_turn(_still_in(entrants), round_):
                self._guarded(entrant, self._turn)
            took = time.monotonic() - began
            # Another round, and the phases after it.
            if round_ + 1 >= _LEAST_ROUNDS and time.monotonic() + 2 * took > deadline:
                break

    def _warm_up(self, entrant: Entrant) -> None:
        """The memory of a run, and about how long one takes."""
        worker = self._worker(entrant)
        if entrant.provider.options.get("compile"):  # which takes memory of its own
            worker.ask(do="time", untimed=1, times=0)
        answer = worker.ask(do="peak")
        entrant.peak_bytes, entrant.last = answer["measured"], answer["seconds"]

    def _turn(self, entrant: Entrant) -> None:
        """What is timed follows an untimed run, unless it is long: caches were others'."""
        time.sleep(_REST_S)
        untimed = int(entrant.last < _LONG_S)
        times = max(1, min(_MOST_REPEATS, round(_TURN_S / max(entrant.last, 1e-6))))
        answer = self._worker(entrant).ask(do="time", untimed=untimed, times=times)
        entrant.last = statistics.median(answer["seconds"])
        entrant.seconds.append(entrant.last)

    def _split(self, entrant: Entrant) -> None:
        """The phases, which are measured apart: a profiler takes time itself."""
        if entrant.provider.operation is None:
            entrant.phases = self._worker(entrant).ask(do="phases")["measured"]

    def _guarded(self, entrant: Entrant, do: Callable[[Entrant], object]) -> None:
        """A contestant that cannot, fails or is wrong is out; the others go on."""
        try:
            do(entrant)
        except Unable as answer:
            entrant.out("unable", str(answer))
        except WrongResult as error:
            entrant.out("refused", str(error))
        except Failed as error:
            entrant.out("failed", str(error))


def _still_in(entrants: list[Entrant]) -> list[Entrant]:
    return [entrant for entrant in entrants if entrant.status == "measured"]


def _all_out(entrants: list[Entrant], status: str, reason: str) -> None:
    for entrant in _still_in(entrants):
        entrant.out(status, reason)
