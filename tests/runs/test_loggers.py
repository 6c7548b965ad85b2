"""Loggers: what TensorBoard and Weights & Biases hold afterwards, and that none stops a run."""

from __future__ import annotations

import math
import os
import struct
import subprocess
import sys
import time
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from sae_kernels.runs.loggers import Loggers, open_loggers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LINES = [
    {"step": 10, "tokens": 640, "loss": 0.1 + 0.2, "l0": 4.0, "note": "text", "flag": True},
    {"step": 20, "tokens": 1280, "loss": 1e-20, "l0": 3.5},
    {"step": 30, "tokens": 1920, "loss": math.nan, "l0": 3.25},
]
SETTINGS = {"arch": "topk", "sae": {"k": 4}, "output": {"project": "a project"}}


class Kept:
    """Keeps what it is given, or raises."""

    def __init__(self, fails: str = "") -> None:
        self.lines: list[Mapping[str, Any]] = []
        self.closed, self.fails = 0, fails

    def write(self, line: Mapping[str, Any]) -> None:
        if self.fails == "write" and self.lines:
            raise OSError(28, "No space left on device")
        self.lines.append(line)

    def close(self) -> None:
        self.closed += 1
        if self.fails == "close":
            raise TimeoutError("the service\nis away")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads in a run's folder."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_every_number_of_a_line_is_a_scalar_of_tensorboard(tmp_path: Path) -> None:
    with open_loggers(["tensorboard"], tmp_path, SETTINGS) as loggers:
        for line in LINES:
            loggers.write(line)
    found = scalars(tmp_path)
    assert found.keys() == {"tokens", "loss", "l0"}
    for name, points in found.items():
        assert [step for step, _ in points] == [10, 20, 30]
        expected = [np.float32(line[name]) for line in LINES]
        np.testing.assert_array_equal([value for _, value in points], expected)


def test_what_tensorboard_holds_of_steps_that_are_made_again_is_void(tmp_path: Path) -> None:
    for step, lines in ((0, LINES), (20, [{**LINES[2], "loss": 7.0}])):
        with open_loggers(["tensorboard"], tmp_path, {}, step) as loggers:
            for line in lines:
                loggers.write(line)
    assert [step for step, _ in scalars(tmp_path)["l0"]] == [10, 20, 30]
    assert scalars(tmp_path)["loss"][2] == (30, 7.0)


def records(path: Path) -> Iterator[bytes]:
    """The records of a file of Weights & Biases, which is a LevelDB log after 7 bytes of its own.

    A record of another type than 1 (whole) would be one that is cut in pieces; ours are short.
    """
    content, place = path.read_bytes(), 7
    while place < len(content):
        if 32768 - place % 32768 < 7:  # a block's rest, too short for a header
            place += 32768 - place % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        if kind == 1:
            yield content[place + 7 : place + 7 + size]
        place += 7 + size


def wandb_history(folder: Path) -> list[tuple[str, str, list[dict[str, str]]]]:
    """What each file of Weights & Biases holds: name, project, and lines with values as JSON."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        lines, project = [], ""
        for data in records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            project = record.run.project or project
            if record.HasField("history"):
                items = record.history.item
                lines.append({(i.key or i.nested_key[0]): i.value_json for i in items})
        found.append((path.name, project, lines))
    return found


def ended(path: Path) -> bool:
    """Whether a run's last record is there."""
    from wandb.proto import wandb_internal_pb2

    record = wandb_internal_pb2.Record()
    for data in records(path):
        record.ParseFromString(data)
    return bool(record.HasField("exit"))


@pytest.mark.full
def test_wandb_offline_keeps_lines_and_goes_on_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step, lines in ((0, LINES[:2]), (20, [{"step": 30, "loss": 0.5, "l0": 3.25}])):
        with open_loggers(["wandb"], tmp_path, SETTINGS, step) as loggers:
            for line in lines:
                loggers.write(line)
    assert capfd.readouterr() == ("", "")
    run_id = (tmp_path / "wandb_id.txt").read_text()
    # Its service is a process of its own and may write the file after the run has finished.
    deadline = time.monotonic() + 60
    while not all(ended(path) for path in tmp_path.rglob("*.wandb")):
        assert time.monotonic() < deadline, "the files are not complete after a minute"
        time.sleep(0.1)
    first, second = wandb_history(tmp_path)
    assert first[:2] == second[:2] == (f"run-{run_id}.wandb", "a project")
    held = [(int(line["_step"]), float(line["loss"])) for line in first[2] + second[2]]
    assert held == [(10, 0.1 + 0.2), (20, 1e-20), (30, 0.5)]
    assert "note" not in first[2][0]


def test_a_new_run_in_an_old_folder_has_an_id_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for _ in range(2):
        open_loggers(["wandb"], tmp_path, {}).close()
        ids.append((tmp_path / "wandb_id.txt").read_text())
    assert ids[0] != ids[1]


@pytest.mark.full
def test_wandb_without_a_key_is_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    code = (
        "import sys; from sae_kernels.runs.loggers import open_loggers\n"
        "try: open_loggers(['tensorboard', 'wandb'], sys.argv[1], {})\n"
        "except ValueError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    environment |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")}
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ran.returncode == 0, ran.stderr
    assert "WANDB_MODE=offline" in ran.stdout


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_missing_is_named_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for module in [module for module in sys.modules if "tensorboard" in module]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=rf'pip install "sae-kernels\[{name}\]"'):
        open_loggers([name], tmp_path, {})


def test_an_unknown_name_is_refused_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="got 'tensorbord'; did you mean 'tensorboard'"):
        open_loggers(["tensorbord"], tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_no_loggers_are_fine(tmp_path: Path) -> None:
    loggers = open_loggers([], tmp_path, {})
    loggers.write(LINES[0])
    loggers.close()
    assert list(tmp_path.iterdir()) == []


def test_a_logger_that_raises_is_dropped_and_the_others_go_on() -> None:
    bad, good = Kept(fails="write"), Kept()
    loggers = Loggers({"bad": bad, "good": good})
    loggers.write(LINES[0])
    with pytest.warns(RuntimeWarning, match=r"logger bad .*No space left.*training goes on"):
        loggers.write(LINES[1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loggers.write(LINES[2])
        loggers.close()
    assert good.lines == LINES
    assert (len(bad.lines), bad.closed, good.closed) == (1, 1, 1)


def test_a_logger_that_does_not_finish_keeps_no_other_from_it() -> None:
    bad, good = Kept(fails="close"), Kept()
    loggers = Loggers({"good": good, "bad": bad})
    with pytest.warns(RuntimeWarning, match="logger bad could not finish .*the service is away"):
        loggers.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loggers.close()
    assert (bad.closed, good.closed) == (1, 1)


def test_ctrl_c_in_a_logger_is_no_failure_of_it() -> None:
    class Interrupted(Kept):
        def write(self, line: Mapping[str, Any]) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Loggers({"one": Interrupted()}).write(LINES[0])


def test_what_keeps_a_logger_from_opening_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("in the way")
    with pytest.raises(OSError, match="tensorboard"):
        open_loggers(["tensorboard"], tmp_path, {})
