"""The worker process, which runs one contestant by commands of the parent process.

Commands and replies are JSON, one a line, on standard input and output; what a library prints goes
to standard error. A contestant loops over batches that :func:`_batches` hands out: it is measured
between a batch and the next one it asks for, whoever's loop that is.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from contextlib import nullcontext
from importlib import metadata
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from .clock import Clock, PeakMemory, Phases, clock_of
from .contestant import Contestant, Task, Unable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from typing import TextIO

    from .accelerated import Calls

    Since = Callable[[], Calls | None]


class Ended(Exception):
    """Raised when the parent wants no further batch."""


class Channel:
    """The worker's end of the channel: commands from the parent, replies to it."""

    def __init__(self, source: TextIO, sink: TextIO) -> None:
        self._source, self._sink = source, sink

    def next(self) -> dict[str, Any]:
        """Waits for the next command, without a busy loop."""
        line = self._source.readline()
        if not line:
            sys.exit(0)  # the parent is gone
        command: dict[str, Any] = json.loads(line)
        return command

    def reply(self, **values: Any) -> None:
        """Replies to the last command."""
        print(json.dumps(values), file=self._sink, flush=True)


def main(name: str, threads: int) -> None:
    """Runs a contestant module of this folder until the parent closes the channel."""
    channel = Channel(sys.stdin, os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    try:
        module = importlib.import_module(name if "." in name else f".{name}", __package__)
    except Exception as error:
        channel.next()
        return channel.reply(unable=f"it cannot be imported: {_words(error)}")
    while True:
        command = channel.next()
        if command["do"] == "end":  # of a loop that has failed
            continue
        try:
            _serve(module, command, channel)
        except Ended:
            continue
        except Unable as answer:
            channel.reply(unable=str(answer))
        except Exception as error:
            channel.reply(failed=_words(error))


def _serve(module: Any, command: dict[str, Any], channel: Channel) -> None:
    task = Task(**command["task"])
    device = torch.device(task.device)
    tensors = load_file(command["inputs"], device=task.device)
    x = tensors.pop("x")
    level = task.options.get("accelerate")
    with _acceleration(module, level) as since:
        contestant: Contestant = module.contestant(task, tensors)
        channel.reply(
            torch=torch.__version__,
            package=f"{module.PACKAGE} {metadata.version(module.PACKAGE)}",
            differs=f"under sk.accelerate, level {level}" if level else module.DIFFERS,
        )
        contestant.loop(_batches(contestant, x, device, channel, since))
    raise RuntimeError("the library's loop ended before it was told to")


def _acceleration(module: Any, level: str | None) -> AbstractContextManager[Since]:
    """Accelerates the module's library at a level, if there is one."""
    if level is None:
        return nullcontext(lambda: None)
    from .accelerated import accelerated

    return accelerated(module.__name__.rpartition(".")[2], level)


def _batches(
    contestant: Contestant,
    x: torch.Tensor,
    device: torch.device,
    channel: Channel,
    since: Since,
) -> Iterator[torch.Tensor]:
    """Yields a batch whenever the parent asks to measure one."""
    clock = clock_of(device)
    while True:
        command = channel.next()
        if command["do"] == "end":
            raise Ended
        if command["do"] == "gate":
            yield from gate(contestant, x[: command["tokens"]], command["out"])
            channel.reply()
        elif command["do"] == "time":
            since()  # what came before was not timed
            for _ in range(command["untimed"]):
                yield x
            readings = []
            for _ in range(command["times"]):
                clock.start()
                yield x
                readings.append(clock.stop())
            channel.reply(seconds=[read() for read in readings], calls=since())
        elif command["do"] == "race":
            yield from race(contestant, x, clock, command, channel)
        else:
            of_phases, F = command["do"] == "phases", contestant.tensors["W_enc"].shape[0]
            measure = Phases(device, F) if of_phases else PeakMemory(device)
            measure.start()
            clock.start()
            yield x
            seconds = clock.stop()()
            channel.reply(measured=measure.stop(), seconds=seconds)


def race(
    contestant: Contestant, x: torch.Tensor, clock: Clock, command: dict[str, Any], channel: Channel
) -> Iterator[torch.Tensor]:
    """Yields batch after batch of x [N, D] for some seconds of work, then writes the weights."""
    batch, seconds, steps = command["batch"], 0.0, 0
    batches = x[: len(x) // batch * batch].split(batch)
    while seconds < command["seconds"]:
        clock.start()
        yield batches[(command["first"] + steps) % len(batches)]
        seconds += clock.stop()()
        steps += 1
    found = {name: tensor.contiguous().cpu() for name, tensor in contestant.finished().items()}
    save_file(found, command["out"])
    channel.reply(seconds=seconds, steps=steps)


def gate(contestant: Contestant, x: torch.Tensor, out: str) -> Iterator[torch.Tensor]:
    """Writes the results that the parent checks: codes, reconstruction, and trained weights.

    The first batch may set things up (initial biases, a learning rate of 0), so the weights that
    count are those after it.
    """
    yield x
    task = contestant.task
    with torch.no_grad(), task.autocast():
        found = contestant.weights()
        if task.operation == "decode":
            found["x_hat"] = contestant.decode()[: x.shape[0]].float()
            used = contestant.tensors["indices"][: x.shape[0]].unique()
        else:
            found["codes"] = contestant.dense(contestant.encode(x)).float()
            used = found["codes"].any(0).nonzero().flatten()
        if task.operation in ("sae", "step"):
            found["x_hat"] = contestant.forward(x).float()
    if task.mode == "step":
        before = contestant.trained()[used]
        yield x
        found["moved"] = contestant.trained()[used] - before
    elif task.mode == "backward":
        yield x
        found["moved"] = -contestant.gradient()[used]
    found |= {"used": used, "W_dec": found["W_dec"][used]}  # of the others nothing is asked
    save_file({name: tensor.contiguous().cpu() for name, tensor in found.items()}, out)


def _words(error: Exception) -> str:
    lines = " ".join(str(error).split())
    return f"{type(error).__name__}: {lines[:500]}"
