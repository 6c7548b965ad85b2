"""The command line as a process of its own: streams, signals, terminals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from sae_kernels.nn import TopKSAE

COMMAND = [sys.executable, "-m", "sae_kernels"]
FOREVER = ["--steps", "100000000", "--batch-size", "64", "--k", "2", "--log-every", "1"]


@pytest.mark.full
def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    ran = subprocess.run(
        [*COMMAND, "eval", "sae", tmp_path], capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 2
    assert ran.stdout == ""
    assert re.fullmatch(r"sae-kernels: .* is not a data set.*\n", ran.stderr)


@pytest.mark.full
def test_ctrl_c_keeps_what_was_learnt(data, tmp_path):
    out = tmp_path / "run"
    command = [*COMMAND, "train", str(data), "--out", str(out), *FOREVER]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = out / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr
    assert TopKSAE.from_pretrained(out / "sae").config.k == 2
    assert metrics.read_text().endswith("}\n")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("no_color", [True, False])
def test_a_terminal_gets_bars_and_no_color_is_honoured(data, tmp_path, no_color):
    import pty

    terminal, end = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {
        "TERM": "xterm-256color",
        **({"NO_COLOR": "1"} if no_color else {}),
    }
    command = [*COMMAND, "train", str(data), "--out", str(tmp_path / "run"), "--k", "2"]
    ran = subprocess.run(
        [*command, "--steps", "3", "--batch-size", "64"],
        stdout=subprocess.PIPE,
        stderr=end,
        env=environment,
        timeout=120,
    )
    os.close(end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert ran.returncode == 0
    assert b"\x1b" not in ran.stdout
    assert "3/3" in shown
    coloured = re.search(r"\x1b\[[0-9;]*(3[0-7]|38;)[0-9;]*m", shown)
    assert (coloured is None) == no_color
