"""The bench's ends: a budget that holds in every phase, and workers that outlive nobody."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sae_kernels.bench import results
from sae_kernels.bench.cases import Shape, step
from sae_kernels.bench.processes import tied
from sae_kernels.bench.providers import Provider
from sae_kernels.bench.run import BenchRun, BenchSettings, measure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HERE = Path(__file__).parent
CASE = step(Shape(64, 32, 256, 4), "uniform")
DENSE = Provider("dense", "float32", "dense", {})
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal is Linux' own")


@pytest.fixture(autouse=True, scope="module")
def planted() -> Iterator[None]:
    """Lets worker processes import the contestants of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        yield


def provider(module: str, **options: Any) -> Provider:
    return Provider("planted", "float32", f"planted.{module}", options)


def test_what_is_known_is_told_at_once_and_every_phase_says_whom_it_is_at(tmp_path: Path) -> None:
    told: list[Any] = []
    gone = Provider("gone", "float32", "dense", {}, operations=())
    results_, ended = measure(
        [CASE],
        [DENSE, gone, provider("failing", how="raises")],
        BenchSettings(threads=1, rounds=2),
        tmp_path / "out.jsonl",
        tell=told.append,
        show=lambda stage, done, total, who: told.append((stage.rpartition(": ")[2], who)),
    )
    assert ended is None
    whom = "dense float32", "planted float32"
    shown = [line for line in told if isinstance(line, tuple)]
    checked = [("check", name) for name in whom]
    assert shown == [
        ("cases", ""),
        *(("start", name) for name in whom),
        *checked,
        ("warm up", whom[0]),
        *[("rounds", whom[0])] * 2,
        ("profile", whom[0]),
        ("cases", ""),
    ]
    lines = [line for line in told if isinstance(line, dict)]
    who = [line.get("provider", "provenance") for line in lines]
    assert who == ["provenance", "gone", "provenance", "planted", "dense"]
    assert told[0] is lines[0]
    assert told.index(lines[1]) < told.index(("start", whom[0]))
    assert told.index(lines[3]) < told.index(("warm up", whom[0]))
    read = results.read(tmp_path / "out.jsonl")
    assert read.records == results_.records
    assert read.provenance["libraries"].keys() == set(whom)
    assert read.provenance["libraries"] == results_.provenance["libraries"]


@pytest.mark.full
@pytest.mark.parametrize("when", [1, 3, 4], ids=["check", "warm up", "rounds"])
def test_one_that_hangs_takes_half_of_the_time_and_is_killed(when: int) -> None:
    began, settings = time.monotonic(), BenchSettings(threads=1, rounds=3, budget_s=24)
    with BenchRun([provider("failing", how="holds", when=when), DENSE], settings) as bench:
        found = {record["provider"]: record for record in bench.records([CASE])}
    assert time.monotonic() - began < settings.budget_s + 3
    assert found["planted"]["status"] == "failed"
    assert "killed, as it gave no answer in" in found["planted"]["reason"]
    assert found["dense"]["status"] == "measured"


@pytest.mark.full
def test_one_that_is_too_slow_for_the_budget_is_left_out_and_the_others_are_not() -> None:
    slow, settings = provider("slow", seconds=6.0), BenchSettings(threads=1, rounds=3, budget_s=40)
    with BenchRun([slow, DENSE], settings) as bench:
        found = {record["provider"]: record for record in bench.records([CASE])}
    assert found["planted"]["status"] == "skipped"
    assert "left out: a run takes 6" in found["planted"]["reason"]
    assert found["dense"]["rounds"] == 3


# Under nohup, or in a shell's background, it would begin with signals that are ignored.
SCRIPT = """
import signal
import sys
from sae_kernels.bench.processes import ended_by_signals
from test_bench_ends import CASE, DENSE, BenchRun, BenchSettings, provider

def show(stage, done, total, who):
    if stage.endswith("warm up"):
        print("busy", *(worker.pid for worker in bench._workers.values()), flush=True)
        if sys.argv[1] == "raises":
            raise ArithmeticError("planted")

signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
with ended_by_signals():
    who = [provider("failing", how="holds", when=3), DENSE]
    with BenchRun(who, BenchSettings(threads=1), show) as bench:
        list(bench.records([CASE]))
"""


@linux
@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.full),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.full),
        pytest.param(signal.SIGINT, -signal.SIGINT, marks=pytest.mark.full),
        pytest.param("raises", 1, marks=pytest.mark.full),
    ],
)
def test_however_it_dies_its_workers_die_with_it(how: Any, code: int) -> None:
    """One of them inside a call that holds Python's lock for an hour, the other waiting."""
    command = [sys.executable, "-c", SCRIPT, str(how)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.stdout is not None
    word, *workers = process.stdout.readline().split()
    assert (word, len(workers)) == ("busy", 2)
    if how != "raises":
        time.sleep(1.0)  # until the call has begun
        process.send_signal(how)
    assert process.wait(10) == code
    _wait_for(lambda: not any(_runs(int(pid)) for pid in workers))


@linux
def test_a_tied_process_is_its_command(tmp_path: Path) -> None:
    script = "import os, sys; print(os.getppid(), sys.argv[1], os.environ['HERE'])"
    command = tied([sys.executable, "-c", script, "a b"])
    environment = {**os.environ, "HERE": "yes"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{os.getpid()} a b yes\n"
    assert subprocess.run(tied([sys.executable, "-c", "exit(3)"]), check=False).returncode == 3


@linux
def test_a_child_whose_parent_died_before_it_was_tied_does_not_start() -> None:
    """The race: the command names a parent that is no longer there."""
    command = tied([sys.executable, "-c", "print('started')"])
    command[command.index(str(os.getpid()))] = str(os.getppid())
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")


def _runs(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status != "Z"  # what nobody has waited for yet runs no more


def _wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end, "not so within 5 s"
        time.sleep(0.05)
