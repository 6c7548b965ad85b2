"""Modules of every architecture compute their formulas, in every scale and shape."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from sae_kernels.nn import (
    BatchTopKSAE,
    CrossLayer,
    GatedSAE,
    ReLUConfig,
    SAEConfig,
    SparseAutoencoder,
    SwitchSAE,
    build,
)
from sae_kernels.testing import (
    DenseSpec,
    assert_bitwise,
    assert_same_selection,
    assert_within,
    dense_loss,
    gamma,
)
from sae_kernels.testing.dense import decoder_norm
from tests.nn.modules import CASES, B, D, F, each, sae_of, scaled, x_of
from tests.nn.switch_spec import dense_switch
from tests.step.cross_layer import whole

if TYPE_CHECKING:
    from pathlib import Path


def _exact(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and reconstruction by the dense oracle on scaled activations, and |terms| of h."""
    config = sae.config
    p = {name: t.detach().double() for name, t in sae.named_parameters()}
    if isinstance(sae, SwitchSAE):
        dense = dense_switch(sae.config, p, x.double() * config.activation_scale)
        return dense.codes, dense.x_hat, dense.size
    if isinstance(sae, CrossLayer):
        p |= {name: whole(config, name, p[name]) for name in ("W_enc", "W_dec")}
    kind, k = config.architecture.removeprefix("cross_layer_"), getattr(config, "k", 0)
    if isinstance(sae, BatchTopKSAE):  # in evaluation every key above the threshold
        kind, norms = "jumprelu", torch.ones(F).double()
        if config.rank_by_decoder_norm:
            norms = decoder_norm(p["W_dec"], config.decoder_norm, config.n_layers)
        p["threshold"] = sae.threshold / norms
    spec = DenseSpec(
        kind,  # type: ignore[arg-type]
        k=k,
        relu=getattr(config, "relu", "after") != "none",
        by_magnitude=getattr(config, "by_magnitude", False),
        subtract_b_dec=config.subtract_b_dec,
        bandwidth=0.1,
        n_sources=getattr(config, "n_sources", 1),
    )
    x = x.double() * config.activation_scale
    y = x.new_zeros(len(x), config.output_width)
    result = dense_loss(spec, p, x, y)
    b_dec = p["b_dec"].abs() if config.subtract_b_dec else 0
    size = (x.abs() + b_dec) @ p["W_enc"].abs().T + p["b_enc"].abs()
    if isinstance(sae, GatedSAE):
        size = p["r_mag"].exp() * (size + p["b_enc"].abs()) + p["b_mag"].abs()
    return result.codes, result.y_hat, size


def _assert_is(sae: SparseAutoencoder, of: SparseAutoencoder, x: Tensor, scale: float) -> None:
    """``sae`` is the function of ``of``, whose codes are as many times larger."""
    codes, y_hat, size = _exact(of, x)
    x_hat, came = sae(x)
    got = came.to_dense()
    # D products, two biases, the scales and exps; a gated size on top of them.
    budget = gamma(x.shape[1] + 16, torch.float32) * size / scale
    kept = codes != 0
    assert_within("codes", got[kept], codes[kept] / scale, budget[kept])
    assert not got[~kept].any()
    W_dec, b_dec = of.decoder_rows().detach().double().abs(), of.b_dec.detach().double().abs()
    terms = (size * kept) @ W_dec + b_dec
    if of.config.skip:
        inputs = x.double().abs() * of.config.activation_scale
        terms = terms + inputs @ of.W_skip.detach().double().abs().T
    n = 2 * x.shape[1] + F + 24
    budget = gamma(n, torch.float32) * terms / of.target_scale
    assert_within("x_hat", x_hat, y_hat / of.target_scale, budget)
    assert 1 < float(kept.sum(1).double().mean()) < F / 1.5


@each
@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.7, 0.3)], ids=["unscaled", "scaled"])
def test_modules_are_their_formulas(config: SAEConfig, scales: tuple[float, float]) -> None:
    sae = sae_of(scaled(config, *scales))
    _assert_is(sae, sae, x_of(config, B), 1.0)


@each
@pytest.mark.parametrize("scale", [3.7, 0.23])
def test_folded_is_the_same_function_of_raw_activations(config: SAEConfig, scale: float) -> None:
    sae = sae_of(scaled(config, scale, 1.9))
    folded = sae.folded()
    assert folded.config == scaled(config, 1.0)
    assert not folded.training
    _assert_is(folded, sae, x_of(config, B), scale)


@each
def test_a_scale_that_is_a_power_of_two_folds_exactly(config: SAEConfig) -> None:
    sae, x = sae_of(scaled(config, 4.0, 0.5)), x_of(config, B)
    (x_hat, codes), (folded_x_hat, folded) = sae(x), sae.folded()(x)
    assert_bitwise("latents", folded.indices, codes.indices)
    assert_bitwise("values", 4 * folded.values, codes.values)
    assert_bitwise("x_hat", folded_x_hat, x_hat)


@each
def test_folding_leaves_the_module_as_it_is(config: SAEConfig) -> None:
    sae = sae_of(scaled(config, 3.7, 1.9)).train()
    before = {name: t.clone() for name, t in sae.state_dict().items()}
    folded = sae.folded()
    assert folded.training
    with torch.no_grad():
        for p in folded.parameters():
            p.zero_()
    for name, t in sae.state_dict().items():
        assert_bitwise(name, t.reshape(-1), before[name].reshape(-1))


@each
def test_without_a_scale_folding_changes_nothing(config: SAEConfig) -> None:
    sae = sae_of(config)
    for name, t in sae.folded().state_dict().items():
        assert_bitwise(name, t.reshape(-1), sae.state_dict()[name].reshape(-1))


@each
def test_what_is_saved_reads_raw_activations(config: SAEConfig, tmp_path: Path) -> None:
    sae = sae_of(scaled(config, 3.7, 1.9))
    sae.save_pretrained(tmp_path)
    _assert_is(SparseAutoencoder.from_pretrained(tmp_path), sae, x_of(config, B), 3.7)


@each
def test_a_deepcopy_is_equal_and_apart(config: SAEConfig) -> None:
    sae = sae_of(config)
    sae.compute_dtype = torch.bfloat16
    twin, x = copy.deepcopy(sae), x_of(config, 6)
    assert_bitwise("x_hat", twin(x).x_hat, sae(x).x_hat)
    assert twin.config == sae.config
    with torch.no_grad():
        for t in twin.state_dict().values():
            t.zero_()
    for name, t in sae.state_dict().items():
        assert t.any(), name
    assert copy.deepcopy(sae.folded())(x).x_hat.shape == (6, config.output_width)


@each
@pytest.mark.parametrize("leading", [(), (0,), (2, 3)], ids=str)
def test_any_leading_shape(config: SAEConfig, leading: tuple[int, ...]) -> None:
    sae, x = sae_of(config), x_of(config, *leading)
    out = sae(x)
    assert out.x_hat.shape == (*leading, config.output_width)
    assert out.codes.batch_shape == leading
    rows = x.reshape(-1, config.input_width)
    for i, row in enumerate(rows):
        got, alone = out.x_hat.reshape(len(rows), -1)[i], sae(row).x_hat
        if config.skip:  # whose product is torch's, and may be added up in another order
            torch.testing.assert_close(got, alone, rtol=1e-5, atol=1e-5)
        else:
            assert_bitwise("row", got, alone)


@each
def test_decoder_rows_are_normalised_by_layer(config: SAEConfig) -> None:
    sae = sae_of(config)
    sae.normalize_decoder_()
    norms = sae.decoder_norms()
    assert norms.shape == (F, config.n_layers)
    if isinstance(sae, CrossLayer):
        norms = sae.row_coefficients(norms)
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=1e-6, atol=0)
    x = x_of(config, 5)
    sae(x).x_hat.square().sum().backward()
    sae.remove_parallel_gradient_()
    grad, rows = (
        t.unflatten(1, (config.row_parts, -1)) for t in (sae.W_dec.grad, sae.W_dec.detach())
    )
    terms = (grad.abs() * rows.abs()).sum(2)
    along = (grad.double() * rows.double()).sum(2)
    # The sum, what is taken away, and a row whose norm is not quite 1: a sum's rounding each.
    budget = 2 * gamma(3 * rows.shape[2] + 8, torch.float32) * terms
    assert_within("along", along, 0 * along, budget)


@pytest.mark.parametrize(
    ("kind", "expected"), [("joint", 5.0), ("sum", 7.0), ("mixed", 5.0 + 7.0 / 10)]
)
def test_a_latent_of_several_layers_weighs(kind: Any, expected: float) -> None:
    sae = build(ReLUConfig(2, 1, n_layers=2, decoder_norm=kind))
    with torch.no_grad():
        sae.W_dec.copy_(torch.tensor([[3.0, 0.0, 0.0, 4.0]]))
    assert sae.decoder_norms().tolist() == [[3, 4]]
    assert float(sae.latent_norms(sae.decoder_norms().detach())) == pytest.approx(
        expected, rel=1e-6
    )


def test_a_batch_is_selected_in_training_and_a_token_in_evaluation() -> None:
    sae, x = sae_of(CASES["batchtopk"]), x_of(CASES["batchtopk"], B)
    codes = sae.train().encode(x)
    assert codes.values.numel() == int(3.5 * B)
    p = {name: t.detach().double() for name, t in sae.named_parameters()}
    h = (x.double() - p["b_dec"]) @ p["W_enc"].T + p["b_enc"]
    flat = codes.tokens.long() * F + codes.indices.long()
    size = (x.abs() + sae.b_dec.abs()) @ sae.W_enc.abs().T + sae.b_enc.abs()
    band = gamma(D + 4, torch.float32) * size.detach().double()
    assert_same_selection("batch", flat[None], h.view(1, -1), int(3.5 * B), band.view(1, -1))
    assert sae.encode(x, k=1.0).values.numel() == B


def test_a_skip_connection_needs_the_input_to_decode() -> None:
    sae, x = sae_of(scaled(CASES["skip-transcoder"], 2.0, 3.0)), x_of(CASES["skip-transcoder"], 4)
    codes = sae.encode(x)
    assert_bitwise("x_hat", sae.decode(codes, x), sae(x).x_hat)
    with pytest.raises(ValueError, match="x: expected the input of the SAE"):
        sae.decode(codes)
