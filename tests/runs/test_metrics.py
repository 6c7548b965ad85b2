"""Metric lines."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

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
