"""The race: every trainer on the same tokens by the same clock, judged on held-out tokens.

All start from the same weights, and each trains by its own loop, with the learning rate, warm-up
and extra losses that it has by default (ours and plain torch at the learning rate of `TrainConfig`,
without a schedule, as the clock ends the race and not a number of steps). They take turns: at marks
on the clock, each twice as late as the one before, a trainer hands over its weights, and the plain
formula on these gives the fraction of variance unexplained (FVU) of tokens that nobody trains on.
The clock of a trainer runs while it works on a batch, its first one included, and stands while
others work or its weights are judged.
"""

from __future__ import annotations

import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file

from sae_kernels.bench import inputs
from sae_kernels.bench.contestants.contestant import Unable
from sae_kernels.bench.provenance import provenance
from sae_kernels.bench.timing import in_turn
from sae_kernels.bench.workers import LIMIT_S, Failed, WorkerProcess
from sae_kernels.config import TrainConfig
from sae_kernels.functional import decode, encode_topk

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sae_kernels.bench.cases import Case
    from sae_kernels.bench.contestants.contestant import Tensors
    from sae_kernels.bench.providers import Provider
    from sae_kernels.bench.results import Record
    from sae_kernels.bench.run import BenchSettings, Show

MARKS = 12
HELD_OUT = 4096
BATCHES = 64  # of random tokens; stored ones are all used
_MOST = 1 << 28  # elements of tokens held in memory


class Finish(NamedTuple):
    """How a trainer did.

    Attributes:
        provider, dtype: who.
        steps_per_second: over the whole race.
        fvu: at its last mark.
        seconds: until it reached the FVU that the worst of all ends with.
    """

    provider: str
    dtype: str
    steps_per_second: float
    fvu: float
    seconds: float


def race(
    case: Case,
    providers: Sequence[Provider],
    settings: BenchSettings,
    tell: Callable[[Record], None] = lambda line: None,
    show: Show = lambda stage, done, total, who: None,
    command: str = "sae-kernels",
) -> list[Record]:
    """Races trainers for equal shares of a budget; returns the record of each mark.

    Args:
        case: of a TopK training step: the shape, and the tokens' distribution.
        providers: who takes part; those of an operation, such as rates of the machine, do not.
        settings: device, threads, budget and, for a case of "real" popularity, stored tokens.
        tell: takes each line as soon as it is known, provenance first.
        show: takes the progress.
        command: what was run, without its arguments.

    Raises:
        ValueError: another case, or too few stored tokens.
    """
    if (case.operation, case.architecture) != ("step", "topk"):
        raise ValueError(f"--race: expected a training step of a TopK SAE, got {case.name}")
    facts = provenance(command, settings.threads, settings.device)
    tell({"provenance": facts | {"budget_s": settings.budget_s, "held_out": HELD_OUT}})
    found: list[Record] = []
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sae-kernels-race-")))
        held_out = _write(case, folder / "inputs.safetensors", settings)
        racers = _started(case, providers, settings, folder, stack, tell)
        share = settings.budget_s / max(1, len(racers))
        for mark in range(MARKS):
            until = share * 2.0 ** (mark + 1 - MARKS)
            for name in in_turn(list(racers), mark):
                show("race", mark, MARKS, name)
                if racers[name].seconds >= until:
                    continue  # its last batch took longer than to this mark
                try:
                    record = racers[name].train(until, held_out)
                except (Unable, Failed) as error:
                    failed = _facts(case, racers.pop(name).provider, "failed")
                    record = failed | {"reason": str(error)}
                found.append(record)
                tell(record)
    return found


class _Racer:
    """A trainer's process and its clock."""

    def __init__(self, case: Case, provider: Provider, worker: WorkerProcess, out: Path) -> None:
        self.case, self.provider, self._worker, self._out = case, provider, worker, out
        self.seconds, self.steps = 0.0, 0

    def train(self, until: float, held_out: torch.Tensor) -> Record:
        """Trains until its clock shows so many seconds; the record of its FVU then."""
        command = {"do": "race", "batch": self.case.shape.B, "first": self.steps}
        command |= {"seconds": until - self.seconds, "out": str(self._out)}
        answer = self._worker.ask(2 * LIMIT_S + 2 * until, **command)
        self.seconds += answer["seconds"]
        self.steps += answer["steps"]
        fvu = judged(load_file(self._out), held_out, self.case.shape.K)
        done = {"seconds": self.seconds, "steps": self.steps, "fvu": fvu}
        return _facts(self.case, self.provider, "measured") | done


def _facts(case: Case, provider: Provider, status: str) -> Record:
    """The fields of a record that stay the same from mark to mark."""
    who = {"provider": provider.name, "dtype": provider.dtype, "status": status}
    return {**case.facts(), **who}


def judged(weights: Tensors, x: torch.Tensor, k: int) -> float:
    """The FVU of tokens [N, D] by the plain formula on a trainer's weights."""
    W_enc, b_enc, W_dec, b_dec = (weights[n] for n in ("W_enc", "b_enc", "W_dec", "b_dec"))
    wrong = 0.0
    for rows in x.split(1024):
        x_hat = decode(encode_topk(rows, W_enc, b_enc, k, b_dec=b_dec), W_dec, b_dec)
        wrong += float((x_hat - rows).double().square().sum())
    return wrong / float((x - x.mean(0)).double().square().sum())


def finishes(records: Sequence[Record]) -> list[Finish]:
    """How each trainer did, the first to reach the worst last FVU first.

    The time between two marks is interpolated, FVU and seconds on logarithmic scales.
    """
    lines = curves(records)
    if not lines:
        return []
    goal = max(line[-1]["fvu"] for line in lines.values())
    found = [
        Finish(*who, line[-1]["steps"] / line[-1]["seconds"], line[-1]["fvu"], _reached(line, goal))
        for who, line in lines.items()
    ]
    return sorted(found, key=lambda finish: finish.seconds)


def curves(records: Sequence[Record]) -> dict[tuple[str, str], list[Record]]:
    """The records of each trainer that was measured, in the order of its clock."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record["status"] == "measured" and math.isfinite(record["fvu"]):
            found.setdefault((record["provider"], record["dtype"]), []).append(record)
    return found


def _reached(line: Sequence[Record], goal: float) -> float:
    """The second at which a trainer's FVU first was as good as a goal that it reaches."""
    before: Record | None = None
    for record in line:
        if record["fvu"] <= goal:
            if before is None:
                break  # at its first mark already: not later than then
            fall = math.log(before["fvu"] / record["fvu"])
            share = math.log(before["fvu"] / goal) / fall if fall > 0 else 1.0
            took = math.log(record["seconds"] / before["seconds"])
            return float(before["seconds"] * math.exp(share * took))
        before = record
    return float(record["seconds"])


def _write(case: Case, path: Path, settings: BenchSettings) -> torch.Tensor:
    """Writes the tokens to train on and the weights to start from; returns held-out tokens."""
    B, D, F, K = case.shape
    if settings.data is None:
        n = max(2 * B, min(BATCHES * B, _MOST // D)) + HELD_OUT
        x, W = inputs.activations(case.popularity, n, D, F, K)
        # The rows that tokens are made of are no place to start from.
        W = torch.nn.functional.normalize(
            torch.randn(F, D, generator=torch.Generator().manual_seed(1)), dim=1
        )
    else:
        n = min(settings.data.n_tokens, _MOST // D)
        if n < HELD_OUT + 2 * B:
            raise ValueError(
                f"--race: expected at least {HELD_OUT + 2 * B:,} tokens in --data, got {n:,}"
            )
        x, W = (
            settings.data.rows(0, n).activations.float(),
            inputs.activations("uniform", 1, D, F, K)[1],
        )
    train = x[:-HELD_OUT]
    tensors = {"x": train, "W_enc": W, "W_dec": W.clone()}
    tensors |= {"b_enc": torch.zeros(F), "b_dec": torch.zeros(D)}
    # SAELens takes its batch size from these codes.
    tensors |= {"values": torch.zeros(B, K), "indices": torch.zeros(B, K, dtype=torch.long)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return x[-HELD_OUT:]


def _started(
    case: Case,
    providers: Sequence[Provider],
    settings: BenchSettings,
    folder: Path,
    stack: ExitStack,
    tell: Callable[[Record], None],
) -> dict[str, _Racer]:
    """Starts those who can take part; tells of the others why not."""
    racers: dict[str, _Racer] = {}
    libraries: dict[str, Any] = {}
    # For libraries without a trainer's defaults: the plateau of ours.
    plateau = TrainConfig(steps=1, warmup_steps=0, decay_fraction=0.0)
    options = {"lr": plateau.learning_rate(0, case.shape.F)}
    for provider in providers:
        if provider.operation is not None:
            continue
        try:
            if (why := provider.unable(case, settings.device)) is not None:
                raise Unable(why)
            worker = WorkerProcess(provider, settings.threads)
            stack.callback(worker.close)
            stack.callback(worker.kill)
            task = provider.task(case, settings.device, options)._asdict()
            path = str(folder / "inputs.safetensors")
            libraries[provider.key] = worker.ask(LIMIT_S, do="start", task=task, inputs=path)
        except (Unable, Failed) as error:
            tell(_facts(case, provider, "unable") | {"reason": str(error)})
        else:
            out = folder / f"{len(racers)}.safetensors"
            racers[provider.key] = _Racer(case, provider, worker, out)
    tell({"provenance": {"libraries": libraries}})
    return racers
