"""Harvests of some 500 rows that are stopped half-way, in small windows and shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from sae_kernels.harvest import collect, harvest
from tests.harvest.causal import CONTEXT, LAYER, documents, gpt2, tokenizer
from tests.training.same_runs import Stop

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TEXT = documents(40)
LAYERS = ["h.0", "h.1"]


def begin(folder: Path, text: Any = TEXT, layer: Any = LAYER, **options: Any) -> int:
    """A harvest of some 500 rows: a shard ends in every second window, and in its middle."""
    given = {"context_length": CONTEXT, "batch_size": 2, "rows_per_shard": 100, **options}
    model = given.pop("model", None) or gpt2()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(collect, "_WINDOW_ROWS", 60)
        return harvest(model, tokenizer(), text, layer, folder, **given)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stopping(n: int) -> Callable[[int], None]:
    """Stops the harvest once it has computed n rows."""
    seen = 0

    def progress(rows: int) -> None:
        nonlocal seen
        seen += rows
        if seen >= n:
            raise Stop

    return progress


def until(folder: Path, n: int, **options: Any) -> None:
    """A harvest that is stopped after n rows, with the document it was at left half-way."""
    with pytest.raises(Stop):
        begin(folder, progress=stopping(n), **options)


def counted(model: Any) -> list[int]:
    """The tokens of each of the model's forward passes, as they are made."""
    tokens: list[int] = []
    model.transformer.wte.register_forward_pre_hook(lambda _m, args: tokens.append(args[0].numel()))
    return tokens
