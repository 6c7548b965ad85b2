"""Runs that are killed, interrupted, or cannot write: what is left is whole, and goes on."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sae_kernels.runs import checkpoint
from sae_kernels.runs.checkpoint import CHECKPOINTS
from sae_kernels.runs.metrics import read_metrics
from tests.training import doomed
from tests.training.doomed import EVERY, STEPS
from tests.training.same_runs import untimed

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.full  # many processes, one after the other

# Forked from a process that has imported everything and run no kernel: a run starts at once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.doomed"])


@pytest.fixture(scope="module")
def straight() -> Iterator[Path]:
    """The run that nothing happened to."""
    with tempfile.TemporaryDirectory() as folder:
        process = start(doomed.to_the_end, folder)
        process.join()
        assert process.exitcode == 0
        yield Path(folder)


def start(target: Any, *arguments: Any) -> Any:
    process = CONTEXT.Process(target=doomed.quietly, args=(target, *map(str_of, arguments)))
    process.start()
    return process


def str_of(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def newest(folder: Path) -> int:
    """The step of the newest checkpoint; none is damaged, since each appeared whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = checkpoint.newest(folder / CHECKPOINTS)
    return 0 if found is None else checkpoint.verify(found[0]).step


def made(folder: Path) -> int:
    """The steps that the run had made, by its metric lines."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(path) if path.exists() else []
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return len(lines)


def litter(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


def assert_same_as(straight: Path, folder: Path) -> None:
    """The same weights, and the same lines but for the clock."""
    weights = "sae/sae.safetensors"
    assert (folder / weights).read_bytes() == (straight / weights).read_bytes()
    lines = [untimed(read_metrics(f / "metrics.jsonl")) for f in (straight, folder)]
    assert lines[0] == lines[1]


def killed(folder: Path, times: int, seed: int) -> int:
    """Kills the run at random moments; how often it was saving just then."""
    drawn = random.Random(seed)
    saving = 0
    for _ in range(times):
        before = newest(folder)
        process = start(doomed.to_the_end, folder)
        deadline = time.monotonic() + 20
        aim = before + drawn.uniform(0, 3 * EVERY)  # a moment of training, not of starting up
        while process.is_alive() and time.monotonic() < deadline and made(folder) < aim:
            time.sleep(drawn.uniform(0, 0.004))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0)
        saving += bool(litter(folder))
        after, reached = newest(folder), made(folder)
        assert after >= before
        # The last save that was begun may have been under way; the one before it is whole. (The
        # line of a step comes before its save.)
        assert after >= (reached - 1) // EVERY * EVERY - EVERY
        assert len(checkpoint.steps(folder / CHECKPOINTS)) <= 3
        assert len(litter(folder)) <= 1
    return saving


def test_killed_at_random_moments_it_goes_on(straight: Path, tmp_path: Path) -> None:
    killed(tmp_path, times=5, seed=0)
    doomed_end(straight, tmp_path)


@pytest.mark.slow
def test_killed_at_thirty_random_moments_it_goes_on(straight: Path, tmp_path: Path) -> None:
    saving = 0
    for seed in range(6):
        folder = tmp_path / str(seed)
        folder.mkdir()
        saving += killed(folder, times=5, seed=seed)
        doomed_end(straight, folder)
    assert saving, "no kill fell into a save: the test has lost its point"


def doomed_end(straight: Path, folder: Path) -> None:
    process = start(doomed.to_the_end, folder)
    process.join()
    assert process.exitcode == 0
    assert made(folder) == STEPS
    assert litter(folder) == []
    assert len(checkpoint.steps(folder / CHECKPOINTS)) == 2
    assert_same_as(straight, folder)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_a_signal_saves_and_ends(
    straight: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    process = start(doomed.signalled, tmp_path, 17, int(number), 1)
    process.join()
    assert process.exitcode == code  # multiprocessing makes 1 of KeyboardInterrupt
    assert newest(tmp_path) == made(tmp_path) == 17  # the very step, whatever the interval
    assert litter(tmp_path) == []
    doomed_end(straight, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_it_at_once(
    straight: Path, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(doomed.signalled, tmp_path, 17, int(number), 2)
    process.join()
    assert process.exitcode == -number
    assert newest(tmp_path) in (7, 14)  # that of 14 may have been under way
    assert not (tmp_path / "sae").exists()  # nothing was done on the way out
    doomed_end(straight, tmp_path)


def test_a_file_that_cannot_grow(straight: Path, tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    signalled = start(doomed.signalled, folder, 17, int(signal.SIGTERM), 1)
    signalled.join()
    process = start(doomed.with_errors_in, doomed.small_files, folder, log, 30_000)
    process.join()
    assert process.exitcode == 3
    assert "File too large" in log.read_text()
    assert newest(folder) == 17
    assert litter(folder) == []
    doomed_end(straight, folder)


def test_a_full_disk(straight: Path, tmp_path: Path) -> None:
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    size = "size=1000k"  # room for some checkpoints of 140 kB, and then for none
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no small file system to fill: this user may not mount one")
    try:
        folder = disk / "run"
        start(doomed.signalled, folder, 17, int(signal.SIGTERM), 1).join()
        (disk / "other").write_bytes(bytes(1 << 20)[: shutil.disk_usage(disk).free - 50_000])
        process = start(doomed.with_errors_in, doomed.to_the_end, folder, log)
        process.join()
        assert process.exitcode == 3
        assert "No space left on device" in log.read_text()
        assert newest(folder) == 17
        assert litter(folder) == []
        (disk / "other").unlink()
        doomed_end(straight, folder)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory() as open_to_all:  # pytest's own is closed to others
        os.chmod(open_to_all, 0o755)
        folder, log = Path(open_to_all, "run"), Path(open_to_all, "log")
        start(doomed.signalled, folder, 17, int(signal.SIGTERM), 1).join()
        (log).touch()
        log.chmod(0o666)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        process = start(doomed.with_errors_in, doomed.as_nobody, folder, log)
        process.join()
        assert process.exitcode == 3
        assert "Permission denied" in log.read_text()
        assert newest(folder) == 17


def test_a_flush_that_fails(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(doomed.signalled, tmp_path, 17, int(signal.SIGTERM), 1).join()
    real, left = os.fsync, [14]  # the settings' and lines' flushes, and some of the next save's

    def fsync(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(5, "Input/output error")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"):
        doomed.run(str(tmp_path))
    monkeypatch.undo()
    assert left[0] < 0
    assert newest(tmp_path) >= 17
    assert litter(tmp_path) == []
    doomed_end(straight, tmp_path)


def test_a_signal_at_the_last_step_finds_a_finished_run(straight: Path, tmp_path: Path) -> None:
    process = start(doomed.signalled, tmp_path, STEPS, int(signal.SIGTERM), 1)
    process.join()
    assert process.exitcode == 0
    assert (tmp_path / "result.json").exists()
    assert_same_as(straight, tmp_path)
