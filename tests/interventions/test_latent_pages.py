"""docs/interventions.md and the pages about latents: their blocks run one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from _pytest.capture import CaptureFixture

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
pytest.importorskip("matplotlib", reason="needs sae-kernels[report]")

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.mark.parametrize(
    ("page", "n_blocks", "end"),
    [
        ("interventions.md", 4, "[False, False, True, False, True, False]\n"),
        ("circuits.md", 3, "\n"),
        ("multidimensional.md", 1, "torch.Size([256, 32])\n"),
        ("diffing.md", 1, "\n"),
    ],
)
def test_a_page_runs(
    page: str,
    n_blocks: int,
    end: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert len(blocks) == n_blocks
    scope: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, page, "exec"), scope)
    assert capsys.readouterr().out.endswith(end)
