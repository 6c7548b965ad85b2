"""Some latents of an SAE alone: exactly what encoding all of them gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_kernels import encode_topk
from sae_kernels.functional import preactivations
from sae_kernels.nn import BatchTopKSAE, SAEConfig, TopKSAE
from sae_kernels.testing import assert_bitwise
from tests.nn.modules import CASES, F, each, sae_of, scaled, x_of

LATENTS = [41, 3, 0, 3, 49, 17]


@each
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_codes_are_columns_of_the_whole(config: SAEConfig, training: bool) -> None:
    sae, x = sae_of(scaled(config, 1.5)).train(training), x_of(config, 3, 7)
    codes = sae.encode(x)
    fired = torch.ones_like(codes.values) if not sae.drops_zeros else (codes.values != 0).float()
    for latents in (LATENTS, torch.tensor(LATENTS), [5], []):
        came = sae.encode_latents(x, latents)
        assert_bitwise("codes", came.float(), codes.columns(latents))
        wanted = codes.with_values(fired).columns(latents) != 0
        assert torch.equal(sae.fires(x, latents), wanted)
    assert bool(sae.fires(x, range(F)).any())
    assert sae.encode_latents(x[0, 0], LATENTS).shape == (len(LATENTS),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_preactivations_are_what_is_selected_from(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, W, b, b_dec = torch.randn(4, 9), torch.randn(F, 9), torch.randn(F), torch.randn(9)
    x, W, b_dec = x.to(dtype), W.to(dtype), b_dec.to(dtype)
    x[1, 2], W[3, 1], b[17] = torch.nan, torch.inf, -torch.inf
    whole = encode_topk(x, W, b, F, b_dec=b_dec, relu=False).to_dense()
    assert_bitwise("h", preactivations(x, W, b, LATENTS, b_dec=b_dec), whole[:, LATENTS])
    assert_bitwise("h of none", preactivations(x, W, None, []), whole[:, []])


def test_preactivations_have_the_gradients_of_the_product() -> None:
    torch.manual_seed(0)
    leaves = [torch.randn(*s, dtype=torch.float64) for s in ((4, 9), (F, 9), (F,))]
    x, W, b = (t.requires_grad_() for t in leaves)
    seed = torch.randn(4, len(LATENTS), dtype=torch.float64)
    came = torch.autograd.grad((preactivations(x, W, b, LATENTS) * seed).sum(), (x, W, b))
    dense = (x @ W.T + b)[:, LATENTS]
    for one, other in zip(came, torch.autograd.grad((dense * seed).sum(), (x, W, b)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


def test_a_token_without_a_positive_one_is_not_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, encoded = TopKSAE(8, 32, k=4), []
    with torch.no_grad():
        sae.b_enc[5] = -100.0
    encode = sae.encode

    def noted(x: torch.Tensor, **options: Any) -> Any:
        encoded.append(x.shape[0])
        return encode(x, **options)

    monkeypatch.setattr(sae, "encode", noted)
    x = torch.randn(6, 8)
    assert not sae.fires(x, [5]).any()
    assert encoded == []
    positive = sae.preactivations(x, [7])[:, 0] > 0
    sae.fires(x, [5, 7])
    assert encoded == [int(positive.sum())]
    assert 0 < encoded[0] < 6


def test_a_batch_decides_together_in_training() -> None:
    config = CASES["batchtopk"]
    sae, x = sae_of(config), x_of(config, 9)
    assert isinstance(sae, BatchTopKSAE)
    alone = sae.fires(x, LATENTS)
    assert not torch.equal(sae.train().fires(x, LATENTS), alone)


@pytest.mark.parametrize("name", ["topk", "relu", "topk-relu-none"])
def test_refusals(name: str) -> None:
    sae, x = sae_of(CASES[name]), x_of(CASES[name], 2)
    for function in (sae.encode_latents, sae.fires, sae.preactivations):
        with pytest.raises(ValueError, match="latents: expected numbers from 0 to 49"):
            function(x, [50])
        with pytest.raises(TypeError, match="latents: expected a list of whole numbers"):
            function(x, torch.ones(F) > 0)
        with pytest.raises(ValueError, match="x: expected shape"):
            function(x[:, 1:], [3])
