"""Metric lines."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from sae_kernels.errors import DataError
from sae_kernels.runs.metrics import MetricLog, read_metrics

if TYPE_CHECKING:
    from pathlib import Path

LINES = [{"step": 1, "loss": 0.1 + 0.2, "name": "größe"}, {"step": 2, "loss": 1e-300, "ok": True}]


def test_lines_come_back_exactly(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricLog(path) as log:
        for line in LINES:
            log.write(line)
    assert read_metrics(path) == LINES
    assert len(path.read_text(encoding="utf-8").splitlines()) == 2


def test_each_line_is_on_disk_before_the_next_step(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricLog(path) as log:
        for i, line in enumerate(LINES):
            log.write(line)
            assert read_metrics(path) == LINES[: i + 1]


def test_a_killed_process_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    script = (
        "import os, sys\n"
        "from sae_kernels.runs.metrics import MetricLog\n"
        "log = MetricLog(sys.argv[1])\n"
        "for i in range(100): log.write({'step': i})\n"
        "os._exit(9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == 9
    assert [line["step"] for line in read_metrics(path)] == list(range(100))


def test_an_unfinished_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]


def test_a_log_is_appended_to(tmp_path: Path) -> None:
    for line in LINES:
        with MetricLog(tmp_path / "m.jsonl") as log:
            log.write(line)
    assert read_metrics(tmp_path / "m.jsonl") == LINES


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_what_json_lacks_becomes_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "m.jsonl"
    with MetricLog(path) as log:
        log.write({"loss": value, "lr": 1.5})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {"loss": None, "lr": 1.5}


@pytest.mark.parametrize("unfinished", ['{"step": 2, "lo', "x" * 200_000, ""], ids=len)
def test_a_log_goes_on_after_an_unfinished_line(tmp_path: Path, unfinished: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n' + unfinished)
    with MetricLog(path) as log:
        log.write({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_file_that_is_one_unfinished_line_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"st' * 40_000)
    MetricLog(path).close()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("until", range(5))
def test_lines_after_the_step_to_go_on_from_are_dropped(tmp_path: Path, until: int) -> None:
    path = tmp_path / "m.jsonl"
    lines = [{"note": "no step"}, {"step": 1, "loss": 0.1 + 0.2}, {"step": 2}, {"step": 4}]
    with MetricLog(path) as log:
        for line in lines:
            log.write(line)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 5, "lo')
    with MetricLog(path, until=until) as log:
        log.write({"step": until + 1})
    kept = [line for line in lines if line.get("step", 0) <= until]
    assert read_metrics(path) == [*kept, {"step": until + 1}]
    assert whole.startswith(path.read_bytes()[: len(b'{"note": "no step"}\n')])
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_log_that_cannot_be_cut_stays_as_it_was(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk"):
        MetricLog(path, until=1)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_until_of_a_file_that_is_not_there(tmp_path: Path) -> None:
    MetricLog(tmp_path / "m.jsonl", until=3).close()
    assert read_metrics(tmp_path / "m.jsonl") == []


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (b"[1, 2]", "got list"),
        (b"{oops}", "cannot be read"),
        (b"", "cannot be read"),
        (b"\xff{}", "cannot be read"),
        (b"\0\0\0", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(tmp_path: Path, bad: bytes, what: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n' + bad + b'\n{"step": 3}\n')
    before = path.read_bytes()
    for read in (read_metrics, lambda path: MetricLog(path, until=1)):
        with pytest.raises(DataError, match=f"m.jsonl: line 2: expected a JSON object.*{what}"):
            read(path)
    assert path.read_bytes() == before


def test_sync_reaches_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    synced = []
    monkeypatch.setattr("os.fsync", lambda file: synced.append(os.fstat(file).st_size))
    with MetricLog(tmp_path / "m.jsonl") as log:
        log.write({"step": 1})
        log.sync()
    assert synced == [len('{"step": 1}\n')]
