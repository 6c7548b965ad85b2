"""Models on a GPU: what is harvested there, and that nothing stays behind on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.data import ShardDataset
from sae_kernels.harvest import harvest, layer_device, load_model
from tests.harvest.causal import CONTEXT, documents, gpt2, tokenizer

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_model_is_moved_and_its_rows_come_back(
    device: torch.device, name: str, tmp_path: Path
) -> None:
    gpt2().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = []
    for place in ("cpu", name):
        model, words = load_model(tmp_path / "model", device=place)
        folder = tmp_path / place.replace(":", "")
        n = harvest(model, words, documents(8), ["h.0", "h.1"], folder, context_length=CONTEXT)
        rows.append(ShardDataset(folder / "h.1").rows(0, n).activations)
    assert ShardDataset(folder / "h.1").metadata["device"] == "cuda"
    assert layer_device(model, "h.1") == device
    assert {p.device for p in model.parameters()} == {device}
    torch.testing.assert_close(rows[0], rows[1], rtol=1e-3, atol=1e-3)
