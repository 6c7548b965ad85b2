"""Model diffing against a dense twin in fp64, and planted latents of both kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sae_kernels.analyze import analyze, diffing, tables, write_analyses
from sae_kernels.analyze.diffing import Difference, difference, latent_scaling
from sae_kernels.nn import BatchTopKSAE, SparseAutoencoder, TopKSAE

if TYPE_CHECKING:
    from pathlib import Path

D, F = 6, 20


def crosscoder(kind: type[SparseAutoencoder]) -> SparseAutoencoder:
    sae = kind(D, F, k=4, n_layers=2, activation_scale=2.0).double()
    sae.b_dec.data.normal_(generator=torch.Generator().manual_seed(1))
    sae.W_dec.data[3, :D] = 0  # the second model's alone
    sae.W_dec.data[7, D:] *= 0.01
    return sae


def dense_scaling(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """By least squares, a latent and a model at a time."""
    with torch.no_grad():
        sae.eval()
        a = sae.encode(x).to_dense()
        x = x * sae.target_scale
        recon = a @ sae.W_dec
        nu = torch.full((2, F), torch.nan, dtype=torch.float64)
        sides = (slice(0, D), slice(D, 2 * D))
        for f in range(F):
            if not a[:, f].any():
                continue
            norms = [float(sae.W_dec[f, side].norm()) for side in sides]
            own = int(norms[1] > norms[0])
            direction = a[:, f, None] * sae.W_dec[f, sides[own]]
            for number in range(2):
                betas = []
                for side in sides:
                    mine = a[:, f, None] * sae.W_dec[f, side]
                    error = x[:, side] - recon[:, side] - sae.b_dec[side] + mine
                    y = recon[:, side] if number else error
                    solved = torch.linalg.lstsq(direction.reshape(-1, 1), y.reshape(-1, 1))
                    betas.append(float(solved.solution))
                nu[number, f] = betas[1 - own] / betas[own]
    return nu[0], nu[1]


@pytest.mark.parametrize("kind", [TopKSAE, BatchTopKSAE])
def test_latent_scaling_is_least_squares_on_dense_codes(
    kind: type[SparseAutoencoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = crosscoder(kind)
    x = torch.randn(150, 2 * D, generator=torch.Generator().manual_seed(0)).double()
    expected = dense_scaling(sae, x)
    if kind is TopKSAE:  # a batch of BatchTopK is not the sum of its parts
        monkeypatch.setattr(diffing, "_BATCH", 64)
    sae.train()
    for got, want in zip(latent_scaling(sae, x), expected, strict=True):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert sae.training


def test_relative_norms() -> None:
    sae = crosscoder(TopKSAE)
    found = difference(sae)
    base, chat = sae.W_dec[:, :D].norm(dim=1), sae.W_dec[:, D:].norm(dim=1)
    expected = ((chat - base) / torch.maximum(base, chat) + 1) / 2
    torch.testing.assert_close(found.relative_norm.double(), expected.detach().double())
    assert found.relative_norm[3] == 1
    assert found.chat_only.nonzero().flatten().tolist() == [3]
    assert found.base_only.nonzero().flatten().tolist() == [7]
    assert found.truly_own is None
    assert found.values()["chat_only"] == found.values()["base_only"] == 1
    for wrong in (TopKSAE(D, F, k=2), TopKSAE(D, F, k=2, n_layers=3)):
        with pytest.raises(ValueError, match="crosscoder of two"):
            difference(wrong)


def test_scaling_tells_a_true_chat_latent_from_apparent_ones() -> None:
    """Latent 0 is the chat model's alone; 1 was shrunk to nothing in base, 2 is said there by 3."""
    directions = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(2)))[0]
    sae = TopKSAE(D, 4, k=4, n_layers=2, subtract_b_dec=False).double()
    W = torch.zeros(4, 2 * D, dtype=torch.float64)
    for latent in range(3):
        W[latent, D:] = directions[latent]  # all seem to be the chat model's
    W[3, :D] = directions[2]
    sae.W_dec.data, sae.W_enc.data = W.clone(), W.clone()
    a = torch.rand(400, 3, generator=torch.Generator().manual_seed(3)).double() + 0.5
    a *= torch.rand(400, 3, generator=torch.Generator().manual_seed(4)).double() < 0.4
    base, chat = a.clone(), a.clone()
    base[:, 0] = 0
    x = torch.cat([base @ directions[:3].double(), chat @ directions[:3].double()], 1)
    found = difference(sae, x)
    assert found.chat_only.tolist() == [True, True, True, False]
    assert found.truly_own is not None
    assert found.truly_own.tolist()[:3] == [True, False, False]
    assert found.nu_error is not None
    assert found.nu_reconstruction is not None
    assert found.nu_error[1] == pytest.approx(1)  # the base model's error holds it
    assert found.nu_reconstruction[2] == pytest.approx(1)  # the base model's other latent says it
    assert found.values()["truly_chat_only"] == 1


def test_a_latent_of_neither_model_counts_nowhere() -> None:
    found = Difference(torch.tensor([torch.nan, 0.5]))
    assert found.values()["shared"] == 1
    assert not (found.base_only | found.chat_only).any()


def test_an_analysis_of_a_crosscoder_of_two_has_its_difference(tmp_path: Path) -> None:
    sae = crosscoder(TopKSAE).float()
    x = torch.randn(100, 2 * D, generator=torch.Generator().manual_seed(0))
    alone, measured = analyze(sae), analyze(sae, x, name="measured")
    assert alone.difference is not None
    assert alone.values()["difference"]["chat_only"] == 1
    assert "truly_chat_only" not in alone.values()["difference"]
    assert measured.difference is not None
    expected = latent_scaling(sae, x)
    torch.testing.assert_close(measured.difference.nu_error, expected[0], equal_nan=True)
    rows = dict(row[:2] for row in tables.comparison([measured]))
    assert rows["  of the second alone"] == "1 (5 %)"
    assert analyze(TopKSAE(D, F, k=2)).difference is None
    pytest.importorskip("matplotlib", reason="needs sae-kernels[report]")
    files = write_analyses([alone, measured], tmp_path)
    assert "difference.png" in [path.name for path in files]
