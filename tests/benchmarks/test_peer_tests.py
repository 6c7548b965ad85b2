"""The runner of tests in another library's environment."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from benchmarks import peer_tests
from sae_kernels.bench.environments import PEERS, python_of

if TYPE_CHECKING:
    from pathlib import Path

TESTS = """
import pytest

def test_passes():
    import sae_kernels

def test_fails():
    assert False

@pytest.mark.skip
def test_is_skipped():
    pass

@pytest.mark.parametrize("x", [1, 2])
def test_of_one(x):
    assert x == 1
"""


def test_it_runs_pytest_there_and_reads_what_passed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_tests, "python_of", lambda _: sys.executable)
    (tmp_path / "test_theirs.py").write_text(TESTS)
    results = tmp_path / "results.xml"
    code = peer_tests.run("sae_lens", [f"--junitxml={results}"], tmp_path)
    assert code == 1
    assert peer_tests.passed(results) == {
        "test_theirs::test_passes",
        "test_theirs::test_of_one[1]",
    }


def test_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="expected a checkout with a folder tests, found none"):
        peer_tests.suite("sae_lens", tmp_path, "module", [])
    monkeypatch.setattr(peer_tests, "python_of", lambda _: None)
    with pytest.raises(SystemExit, match="sae_lens: expected its environment, found none"):
        peer_tests.run("sae_lens", [], tmp_path)


@pytest.mark.parametrize("lost", [False, True])
def test_a_test_that_acceleration_loses_fails_the_comparison(
    lost: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tests").mkdir()
    body = "import os\n\ndef test_a():\n    pass\n\n"
    if lost:
        body += "def test_b():\n    assert 'ACCELERATE' not in os.environ\n"
    (tmp_path / "tests" / "test_x.py").write_text(body)
    monkeypatch.setattr(peer_tests, "python_of", lambda _: sys.executable)
    monkeypatch.setattr(peer_tests, "SHIMS", {})
    monkeypatch.setattr(peer_tests, "ACCELERATED", "benchmarks")  # a plugin that does nothing
    assert peer_tests.suite("sae_lens", tmp_path, "module", []) == int(lost)
    assert ("lost    tests.test_x::test_b" in capsys.readouterr().out) == lost


@pytest.mark.slow
@pytest.mark.parametrize("library", PEERS)
def test_our_tests_pass_in_its_environment(library: str) -> None:
    if python_of(library) is None:
        pytest.skip(f"no environment of {library}: sae-kernels bench --setup-peers {library}")
    command = [sys.executable, "-m", "benchmarks.peer_tests", library]
    done = subprocess.run(command, cwd=peer_tests.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
