"""How latents spread over layers: shares of squared norms, and their picture."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.analyze import analyze, write_analyses
from sae_kernels.analyze.layers import layer_spread
from sae_kernels.nn import BatchTopKSAE, CrossLayerTopK, TopKSAE

if TYPE_CHECKING:
    from pathlib import Path

L, D, EACH = 3, 4, 5


def test_shares_are_of_squared_norms() -> None:
    clt = CrossLayerTopK(D, L * EACH, n_layers=L, k=2)
    with torch.no_grad():
        clt.W_dec.zero_()
        rows = clt.W_dec.split(clt.config.writers)
        rows[0][:, 0] = 3.0  # the first layer's latents: 9 + 16 of the first two layers
        rows[1][:EACH, 1] = 4.0
        rows[1][EACH + 1 :, 0] = 1.0  # one of the second layer's has no norm
        rows[2][2 * EACH :, 0] = 2.0
    spread = layer_spread(clt)
    assert spread is not None
    expected = torch.tensor([[9 / 25, 16 / 25, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(spread.share, expected)
    both = 1 / ((9 / 25) ** 2 + (16 / 25) ** 2)
    assert spread.effective[:EACH].tolist() == pytest.approx([both] * EACH)
    assert spread.effective[EACH:].tolist() == [0.0, *[1.0] * (2 * EACH - 1)]


def test_an_acausal_crosscoder_is_one_group() -> None:
    sae = BatchTopKSAE(D, EACH, k=2, n_layers=2)  # rows of each layer have unit norm
    spread = layer_spread(sae)
    assert spread is not None
    torch.testing.assert_close(spread.share, torch.full((1, 2), 0.5, dtype=torch.float64))
    torch.testing.assert_close(spread.effective, torch.full((EACH,), 2.0, dtype=torch.float64))


def test_one_layer_has_no_spread() -> None:
    assert layer_spread(TopKSAE(D, EACH, k=2)) is None
    assert analyze(TopKSAE(D, 16, k=2)).spread is None


def test_it_is_written_and_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    found = [analyze(CrossLayerTopK(D, L * EACH, n_layers=L, k=2)), analyze(TopKSAE(D, 16, k=2))]
    files = {path.name for path in write_analyses(found, tmp_path)}
    assert "layers.png" in files
    clt, plain = json.loads((tmp_path / "analysis.json").read_text())["saes"]
    assert len(clt["layers"]["share"]) == L
    assert 1 < clt["layers"]["effective_layers"] < L
    assert "layers" not in plain
