"""docs/interventions.md: its blocks run one after the other, as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from _pytest.capture import CaptureFixture

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "interventions.md"


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 4
    scope: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), scope)
    assert capsys.readouterr().out.endswith("[False, False, True, False, True, False]\n")
