"""Command ``sae-kernels accelerate``: a script runs as by Python, with the library on the kernels.

The library is a toy with an adapter of its own; what the real ones do is tested with them.
"""

from __future__ import annotations

import os
import sys
import types
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest

from sae_kernels import integrations
from sae_kernels.integrations.adapters import Adapter, Installation

if TYPE_CHECKING:
    from pathlib import Path

SCRIPT = """
import sys
import toy_beside

print(__name__, sys.argv[1:], toy_beside.f())
if "fail" in sys.argv:
    raise KeyError("theirs")
if "exit" in sys.argv:
    sys.exit(3)
if "say" in sys.argv:
    sys.exit("so long")
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def install(installation: Installation) -> None:
        import toy_beside  # type: ignore[import-not-found]

        def make(original: Any) -> Any:
            def f() -> str:
                installation.ledger.took("f")
                return "fast"

            return f

        installation.patches.replace(toy_beside, "f", make)

    room: Any = types.ModuleType("sae_kernels.integrations.toy_beside")
    version = metadata.version("pytest")
    room.ADAPTER = Adapter(
        "pytest", (version,), "1", "1000", ("module",), {}, install, lambda _: [], lambda _: []
    )
    monkeypatch.setitem(sys.modules, room.__name__, room)
    monkeypatch.setattr(integrations, "_LIBRARIES", ("toy_beside",))
    (tmp_path / "toy_beside.py").write_text("def f():\n    return 'shipped'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_beside", raising=False)
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return os.fspath(path)


def test_a_script_runs_and_the_report_follows(run: Any, script: str) -> None:
    before = sys.argv, list(sys.path)
    ran = run("accelerate", "toy_beside", "--", script, "--own", "x")
    assert (ran.code, ran.out) == (0, "__main__ ['--own', 'x'] fast\n")
    assert "1 x f" in ran.err
    assert (sys.argv, sys.path) == before
    assert sys.modules["toy_beside"].f() == "shipped"


def test_how_a_script_ends_is_how_the_command_ends(run: Any, script: str) -> None:
    ran = run("accelerate", "toy_beside", script, "fail")
    assert ran.code == 1
    assert "KeyError: 'theirs'" in ran.err
    assert ran.err.rstrip().endswith("1 x f"), "the report comes all the same"
    assert run("accelerate", "toy_beside", script, "exit").code == 3
    said = run("accelerate", "toy_beside", script, "say")
    assert said.code == 1
    assert "so long" in said.err


def test_refusals(run: Any, script: str) -> None:
    assert "no such script" in run("accelerate", "toy_beside", "absent.py").refusal()
    assert "did you mean 'toy_beside'" in run("accelerate", "toy_besid", script).refusal()
    refusal = run("accelerate", "toy_beside", "--level", "deep", script).refusal()
    assert "level: expected 'module', 'trainer' or None, got 'deep'" in refusal
