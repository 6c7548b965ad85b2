"""Faults of one of several ranks: all stop and name it, and the run goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import signal
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import HashStore

from sae_kernels.data import ShardWriter
from sae_kernels.distributed import faults
from sae_kernels.errors import DataError, NonFiniteError, RankError
from sae_kernels.runs import checkpoint
from tests.distributed import runs
from tests.distributed.world import torchrun

if TYPE_CHECKING:
    from pathlib import Path

STEPS, TIMEOUT = 24, 10


def of_exchange() -> Exception:
    """An error that torch.distributed raises."""
    try:
        torch.distributed.all_reduce(torch.ones(1))  # of no process group
    except (RuntimeError, ValueError) as error:
        return error
    raise AssertionError


def test_one_rank_says_whose_error_it_was() -> None:
    store = HashStore()
    one = faults.first_cause(DataError("no such file"), store, 1, 3)
    others = [faults.first_cause(of_exchange(), store, rank, 3) for rank in (0, 2)]
    assert {str(error) for error in (one, *others)} == {"rank 1: no such file"}
    assert [error.said for error in (one, *others)] == [False, True, True]


def test_an_error_of_all_is_said_once() -> None:
    store, error = HashStore(), NonFiniteError.in_step(6)
    each = [faults.first_cause(error, store, rank, 2) for rank in (0, 1)]
    assert [one.said for one in each] == [False, True]
    assert str(each[0]).startswith("rank 0: step 7: expected a finite loss")


def test_an_error_that_names_a_rank_is_passed_on() -> None:
    store = HashStore()
    assert str(faults.first_cause(RankError("rank 1: full"), store, 0, 1)) == "rank 1: full"


def test_a_rank_without_a_word_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "PATIENCE", 0.1)
    found = faults.first_cause(of_exchange(), HashStore(), 0, 2)
    assert str(found).startswith("rank 1: ended without a message (killed, perhaps out of memory)")


def test_a_rank_that_hangs_is_ended_by_its_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by ranks of another machine, nor of another torchrun."""
    monkeypatch.setattr(faults, "PATIENCE", 0.1)
    store = HashStore()
    places = [[platform.node(), os.getppid()], ["elsewhere", os.getppid()], [platform.node(), 1]]
    sleeping = [subprocess.Popen(["sleep", "60"]) for _ in places]
    for rank, (place, process) in enumerate(zip(places, sleeping, strict=True), 1):
        store.set(f"there/{rank}", json.dumps([*place, process.pid]))
    faults.first_cause(of_exchange(), store, 0, 4)
    try:
        assert sleeping[0].wait(10) == -signal.SIGKILL
        assert [process.poll() for process in sleeping[1:]] == [None, None]
    finally:
        for process in sleeping:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("data") / "acts"
    with ShardWriter(folder, 16) as writer:
        writer.write(runs.activations())
    return str(folder)


def settings(acts: str, out: Path, over: str = "latents") -> list[str]:
    """A run whose weights are the same bits on 1, 2 and 4 ranks."""
    flags = {
        "out": out,
        f"{over}-over": 2,
        "blocks": 8,
        "timeout": TIMEOUT,
        "n-latents": 96,
        "k": 6,
        "steps": STEPS,
        "batch-size": 64,
        "checkpoint-every": 4,
        "compute": "float32",
    }
    return ["train", acts, *(part for n, v in flags.items() for part in (f"--{n}", str(v)))]


@pytest.fixture(scope="module")
def straight(acts: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("straight") / "run"
    done = torchrun(2, *settings(acts, out))
    assert done.returncode == 0, done.stderr
    return weights(out)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "sae" / "sae.safetensors")


def assert_same(out: Path, straight: dict[str, torch.Tensor]) -> None:
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, straight[name]), name


def doomed(
    acts: str, out: Path, doom: str, restarts: int = 0, over: str = "latents"
) -> tuple[subprocess.CompletedProcess[str], float]:
    """The end of a run with a fault, and the seconds from it."""
    arguments = [*settings(acts, out, over), *(["--resume"] if restarts else [])]
    return ended(2, arguments, doom, restarts)


def ended(
    size: int, arguments: list[str], doom: str, restarts: int = 0
) -> tuple[subprocess.CompletedProcess[str], float]:
    """The end of a command with a fault, and the seconds from it."""
    module = "tests.distributed.doomed_ranks"
    done = torchrun(size, *arguments, module=module, restarts=restarts, DOOM=doom)
    at = re.search(r"doomed at ([\d.]+)", done.stderr)
    assert at, done.stderr
    return done, time.time() - float(at[1])


def said(done: subprocess.CompletedProcess[str]) -> str:
    """The one message of all ranks."""
    (message,) = re.findall("^sae-kernels: (.*)$", done.stderr, re.MULTILINE)
    return str(message)


FAULTS = [
    ("latents", "1 18 0 SIGKILL", 15, "rank 1: ended without a message"),
    ("latents", "0 18 0 SIGKILL", 15, "rank 0: ended without a message"),
    ("latents", "1 18 0 error", 15, "rank 1: Bug: a wrong turn"),
    ("latents", "1 18 0 nan", 15, "step 19: expected a finite loss"),
    ("latents", "1 18 0 SIGSTOP", TIMEOUT + 15, "rank 1: ended without a message"),
    ("tokens", "1 18 0.002 SIGKILL", 15, "rank 1: ended without a message"),
    ("tokens", "0 18 0 SIGKILL", 15, "rank 0: ended without a message"),
    ("tokens", "1 18 0 nan", 15, "step 19: expected a finite loss"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("over", "doom", "within", "words"), FAULTS)
def test_all_stop_and_another_number_goes_on(
    acts: str,
    tmp_path: Path,
    straight: dict[str, torch.Tensor],
    over: str,
    doom: str,
    within: float,
    words: str,
) -> None:
    out = tmp_path / "run"
    done, seconds = doomed(acts, out, doom, over=over)
    print(f"{doom}: {seconds:.1f} s")
    assert done.returncode == 1
    assert words in said(done)
    assert seconds < within
    for step in checkpoint.steps(out / checkpoint.CHECKPOINTS):
        checkpoint.verify(checkpoint.path_of(out / checkpoint.CHECKPOINTS, step))
    resumed = torchrun(1, "resume", str(out))
    assert resumed.returncode == 0, resumed.stderr
    assert_same(out, straight)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_run(
    acts: str, tmp_path: Path, straight: dict[str, torch.Tensor]
) -> None:
    out = tmp_path / "run"
    done, _ = doomed(acts, out, "1 18 0 SIGKILL", restarts=1)
    assert done.returncode == 0, done.stderr
    assert said(done).startswith("rank 1: ended without a message")
    assert_same(out, straight)


@pytest.mark.slow
def test_a_signal_to_one_saves_all(
    acts: str, tmp_path: Path, straight: dict[str, torch.Tensor]
) -> None:
    out = tmp_path / "run"
    done, _ = doomed(acts, out, "1 17 0 SIGTERM")
    assert done.returncode == 1
    assert said(done).startswith("stopped, checkpoint of step 18 saved")
    checkpoint.verify(checkpoint.path_of(out / checkpoint.CHECKPOINTS, 18))
    assert torchrun(2, "resume", str(out)).returncode == 0
    assert_same(out, straight)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_any_moment(
    acts: str, tmp_path: Path, straight: dict[str, torch.Tensor], seed: int
) -> None:
    draw = random.Random(seed)
    doom = f"{seed % 2} {draw.randrange(STEPS - 4)} {draw.random() * 0.1 + 1e-3} SIGKILL"
    out = tmp_path / "run"
    done, seconds = doomed(acts, out, doom)
    assert done.returncode == 1
    assert said(done).startswith(f"rank {seed % 2}: ended without a message")
    assert seconds < 15
    print(f"{doom}: {seconds:.1f} s, checkpoints {checkpoint.steps(out / checkpoint.CHECKPOINTS)}")
    resumed = torchrun(size := 1 + seed % 3, "resume", str(out))
    assert resumed.returncode == 0, resumed.stderr
    if size < 3:
        assert_same(out, straight)
    for name, tensor in weights(out).items():  # on three ranks sums are within rounding
        torch.testing.assert_close(tensor, straight[name], rtol=0, atol=2e-5)
