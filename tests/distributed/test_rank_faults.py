"""Faults of one of several ranks: all stop and name it, and the run goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import platform
import random
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
import torch
from torch.distributed import HashStore

from sae_kernels.data import ShardWriter
from sae_kernels.distributed import faults
from sae_kernels.errors import DataError, NonFiniteError, RankError
from sae_kernels.runs import checkpoint
from tests.distributed import runs
from tests.distributed.doomed_runs import STEPS, assert_same, command, ended, said, weights
from tests.distributed.world import torchrun

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT = 10


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


@pytest.fixture(scope="module")
def straight(acts: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("straight") / "run"
    done = torchrun(2, *command([acts], out, TIMEOUT, latents_over=2))
    assert done.returncode == 0, done.stderr
    return weights(out)


def doomed(
    acts: str, out: Path, doom: str, restarts: int = 0, over: str = "latents"
) -> tuple[subprocess.CompletedProcess[str], float]:
    """The end of a run with a fault, and the seconds from it."""
    arguments = command([acts], out, TIMEOUT, **{f"{over}_over": 2})
    arguments += ["--resume"] if restarts else []
    return ended(2, arguments, doom, restarts)


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


TIERS = [pytest.mark.full, *[pytest.mark.slow] * (len(FAULTS) - 1)]  # one is in .ci/run


@pytest.mark.parametrize(
    ("over", "doom", "within", "words"),
    [pytest.param(*fault, marks=tier) for fault, tier in zip(FAULTS, TIERS, strict=True)],
)
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
