"""Watching a run: what a terminal, a file and a program see of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time

import pytest

from sae_kernels.cli.output import Output, clock
from sae_kernels.cli.progress import describe, follow

LINE = {"step": 3, "loss": 0.1234567, "fvu": 0.08712, "l0": 31.97, "dead_fraction": 0.0125,
        "skipped": 0, "tokens_per_second": 118234.0}  # fmt: skip
NOTE = "loss 0.123 FVU 0.0871 L0 32 dead 1.2% 118k tok/s"
SCRIPT = f"""
import time
from sae_kernels.cli.output import Output
from sae_kernels.cli.progress import follow
output = Output(as_json=False)
with output.progress() as show:
    on_step = follow(output, show, 4000)
    for step in range(2000, 2600):
        time.sleep(0.002)
        on_step(step, {LINE} if step % 10 == 0 else None)
"""


def on_a_terminal(columns: int, **environment: str) -> str:
    """What a pseudo-terminal is sent."""
    import fcntl
    import pty
    import struct
    import termios

    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    known = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES")}
    known |= {"TERM": "xterm-256color", **environment}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stderr=end, env=known)
    os.close(end)
    shown = b""
    while True:
        try:
            part = os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(terminal)
    assert process.wait(60) == 0
    return shown.decode()


@pytest.mark.full
@pytest.mark.parametrize("columns", [80, 140])
def test_a_terminal_shows_one_line_with_the_numbers_and_the_time_left(columns: int) -> None:
    start = time.monotonic()
    shown = on_a_terminal(columns, NO_COLOR="1")
    seconds = time.monotonic() - start
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    # At 4 refreshes a second and the first and last sight, however slow the machine is.
    assert 3 <= len(lines) <= 4 * seconds + 4
    assert all(len(line) <= columns for line in lines)
    last = lines[-1]
    assert re.match(r"train\b.* 2\d\d\d/4000 \d:\d\d left " + re.escape(NOTE), last), last
    assert ("━" in last) == (columns == 140)


@pytest.mark.full
@pytest.mark.parametrize("no_color", [True, False])
def test_no_color_is_honoured(no_color: bool) -> None:
    shown = on_a_terminal(140, **({"NO_COLOR": "1"} if no_color else {}))
    coloured = re.search(r"\x1b\[[0-9;]*(3[0-7]|38;)[0-9;]*m", shown)
    assert (coloured is None) == no_color


def test_a_file_gets_a_line_every_ten_seconds(monkeypatch, capsys) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    output = Output(as_json=False)
    with output.progress() as show:
        on_step = follow(output, show, 1000)
        for step in range(500, 1000):
            on_step(step, LINE if step % 10 == 0 else None)
            now[0] += 0.06  # 30 seconds in all
    seen = capsys.readouterr()
    assert seen.out == ""
    first, *lines = seen.err.splitlines()
    assert first == "train"
    # A look every 0.3 s, the first multiple of a step's 0.06 s beyond 0.25 s; a line in 34 looks.
    assert lines == [
        f"train: 671 of 1,000, {NOTE}, 0:20 left",
        f"train: 841 of 1,000, {NOTE}, 0:10 left",
    ]


def test_beside_json_there_is_nothing_else(capsys) -> None:
    output = Output(as_json=True)
    with output.progress() as show:
        on_step = follow(output, show, 2)
        on_step(0, None)
        on_step(1, LINE)
    seen = capsys.readouterr()
    assert seen.err == ""
    assert [json.loads(line) for line in seen.out.splitlines()] == [{"event": "metrics", **LINE}]


def test_a_step_looks_at_most_four_times_a_second(monkeypatch) -> None:
    now, seen = [0.0], []
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    on_step = follow(Output(as_json=True), lambda *of: seen.append(of), 10_000)
    for step in range(10_000):
        now[0] = step / 1000
        on_step(step, None)
    assert len(seen) == 41  # 10 seconds, and the last step whenever it comes
    assert seen[-1] == ("train", 10_000, 10_000, "")


def test_a_line_says_what_the_run_has() -> None:
    assert describe(LINE) == NOTE
    assert describe({"loss": 2, "kl": 0.5, "skipped": 3}) == "loss 2 KL 0.5 skipped 3"
    assert describe({}) == ""
    nan = float("nan")
    assert describe({"loss": nan, "tokens_per_second": 12.0}) == "loss nan 12 tok/s"


def test_clock() -> None:
    assert [clock(s) for s in (0, 59.4, 59.6, 3599.7, 90061)] == [
        "0:00", "0:59", "1:00", "1:00:00", "25:01:01",
    ]  # fmt: skip
