"""TopKSAE computes its formula in every variant, in whatever shape and dtype it is asked."""

from __future__ import annotations

import copy
import dataclasses
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.testing import assert_bitwise, assert_same_selection, assert_within, gamma

D, F, K = 24, 100, 9
VARIANTS: dict[str, dict[str, Any]] = {
    f"b_dec-{subtract}-relu-{relu}-rank-{rank}-scale-{scale}": {
        "subtract_b_dec": subtract,
        "relu": relu,
        "rank_by_decoder_norm": rank,
        "activation_scale": scale,
    }
    for subtract, relu, rank, scale in product(
        (True, False), ("after", "before", "none"), (False, True), (1.0, 3.7)
    )
}


def _sae(**options: Any) -> TopKSAE:
    """Weights as after some training: nothing tied, nothing zero, norms that differ."""
    sae = TopKSAE(TopKConfig(D, F, K, **options))
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=g))
        sae.b_enc -= 1.5
        sae.W_dec *= 0.5 + torch.rand(F, 1, generator=g)
    return sae


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(4))


def _dense(sae: TopKSAE, x: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """The formulas in fp64 given the selection, and the sums of absolute terms for the bounds."""
    config = sae.config
    W_enc, b_enc, W_dec, b_dec = (
        getattr(sae, name).detach().double() for name in ("W_enc", "b_enc", "W_dec", "b_dec")
    )
    x = x.double() * config.activation_scale
    centred = x - b_dec if config.subtract_b_dec else x
    h = centred @ W_enc.T + b_enc
    size = (x.abs() + b_dec.abs()) @ W_enc.abs().T + b_enc.abs()
    rank = W_dec.norm(dim=1) if config.rank_by_decoder_norm else torch.ones(F).double()
    mask = torch.zeros_like(h).scatter(1, indices.long(), 1.0)
    f = mask * (h if config.relu == "none" else h.clamp(min=0))
    return {
        "key": h * rank,
        # D products, b_enc, the scale, the centring, and the norm (D squares, a root) and product.
        "key_budget": gamma(2 * D + 8, torch.float32) * size * rank,
        "f": f,
        "f_budget": gamma(D + 4, torch.float32) * size * mask,
        "x_hat": (f @ W_dec + b_dec) / config.activation_scale,
        "x_hat_budget": gamma(D + K + 6, torch.float32)
        * ((size * mask) @ W_dec.abs() + b_dec.abs())
        / config.activation_scale,
    }


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_variants_are_their_formulas(options: dict[str, Any]) -> None:
    sae, x = _sae(**options), _x(40)
    x[:10] *= 0.01  # so short that fewer than K latents are positive
    x_hat, codes = sae(x)
    want = _dense(sae, x, codes.indices)
    assert_same_selection("codes", codes.indices, want["key"], K, want["key_budget"])
    assert_within("values", codes.to_dense(), want["f"], want["f_budget"])
    assert_within("x_hat", x_hat, want["x_hat"], want["x_hat_budget"])
    if options["relu"] == "none":
        assert (codes.values < 0).any()
    else:
        assert (codes.values == 0).any()


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_folded_is_the_same_function_of_raw_activations(options: dict[str, Any]) -> None:
    sae, x = _sae(**options), _x(40)
    folded = sae.folded()
    assert folded.config == dataclasses.replace(sae.config, activation_scale=1.0)
    x_hat, codes = folded(x)
    want = _dense(sae, x, codes.indices)
    scale = sae.config.activation_scale
    # As the bounds above: the folded biases carry one rounding more, which these have to spare.
    assert_same_selection("codes", codes.indices, want["key"], K, want["key_budget"])
    assert_within("x_hat", x_hat, want["x_hat"], want["x_hat_budget"])
    assert_within("values", codes.to_dense(), want["f"] / scale, want["f_budget"] / scale)


def test_before_and_after_relu_are_the_same_function() -> None:
    x = _x(30)
    (a, codes_a), (b, codes_b) = (_sae(relu=relu)(x) for relu in ("before", "after"))
    assert_bitwise("x_hat", a, b)
    assert_bitwise("values", codes_a.values, codes_b.values)


@pytest.mark.parametrize("leading", [(), (1,), (0,), (5, 3), (2, 0, 3), (2, 1, 3)], ids=str)
def test_any_leading_shape(leading: tuple[int, ...]) -> None:
    sae, x = _sae(), _x(*leading)
    x_hat, codes = sae(x)
    flat = [sae(row) for row in x.reshape(-1, D)]
    assert x_hat.shape == x.shape
    assert codes.indices.shape == codes.values.shape == (*leading, K)
    for i, (row, row_codes) in enumerate(flat):
        assert_bitwise("row", x_hat.reshape(-1, D)[i], row)
        assert_bitwise("indices", codes.indices.reshape(-1, K)[i], row_codes.indices)


@pytest.mark.parametrize("scale", [1.0, 3.7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_activations(dtype: torch.dtype, scale: float) -> None:
    """Only the input and the output are rounded: in between it is the fp32 SAE."""
    sae, x = _sae(activation_scale=scale), _x(20).to(dtype)
    x_hat, codes = sae(x)
    assert x_hat.dtype == dtype
    assert codes.values.dtype == torch.float32
    exact, exact_codes = sae(x.float())
    assert_bitwise("x_hat", x_hat, exact.to(dtype))
    assert_bitwise("values", codes.values, exact_codes.values)


def test_scaling_large_fp16_activations_does_not_overflow() -> None:
    sae = _sae(activation_scale=4.0)
    assert sae(30_000 * torch.ones(2, D, dtype=torch.float16)).codes.values.isfinite().all()


def test_bf16_compute_rounds_operands_only() -> None:
    sae, x = _sae(), _x(20)
    sae.compute_dtype = torch.bfloat16
    x_hat, codes = sae(x)
    assert x_hat.dtype == codes.values.dtype == torch.float32
    rounded = copy.deepcopy(sae)
    with torch.no_grad():
        rounded.W_dec.copy_(sae.W_dec.bfloat16())
    want = rounded.double().decode(codes)
    sizes = codes.to_dense().double() @ rounded.W_dec.abs() + rounded.b_dec.abs()
    assert_within("x_hat", x_hat, want.detach(), gamma(K + 2, torch.float32) * sizes.detach())


@pytest.mark.parametrize("k", [1, 20, F])
def test_encode_with_another_k(k: int) -> None:
    sae, x = _sae(), _x(11)
    codes = sae.encode(x, k=k)
    want = TopKSAE(dataclasses.replace(sae.config, k=k))
    want.load_state_dict(sae.state_dict())
    assert_bitwise("indices", codes.indices, want.encode(x).indices)
    assert codes.k == k


@pytest.mark.parametrize("k", [0, F + 1, -1])
def test_encode_refuses_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: .*got {k}"):
        _sae().encode(_x(3), k=k)


def test_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"x: expected shape \[\.\.\., {D}\]"):
        _sae()(torch.zeros(3, D + 1))


def test_deepcopy_is_independent_and_equal() -> None:
    sae = _sae(activation_scale=2.0)
    sae.compute_dtype = torch.bfloat16
    twin, x = copy.deepcopy(sae), _x(6)
    assert_bitwise("x_hat", twin(x).x_hat, sae(x).x_hat)
    with torch.no_grad():
        twin.W_enc.zero_()
    assert sae.W_enc.any()


def test_state_dict_round_trip_is_bitwise_and_strict() -> None:
    sae = _sae()
    other = TopKSAE(sae.config, seed=9)
    other.load_state_dict(sae.state_dict())
    assert list(sae.state_dict()) == ["W_enc", "b_enc", "W_dec", "b_dec"]
    for name, tensor in sae.state_dict().items():
        assert_bitwise(name, other.state_dict()[name], tensor)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({"W_enc": sae.W_enc.data})


def test_decoder_constraints_work_on_the_parameters() -> None:
    sae = _sae()
    with torch.no_grad():
        sae.W_dec[3] = 0
    sae.normalize_decoder_()
    norms = sae.W_dec.detach().double().norm(dim=1)
    want = torch.ones(F)
    want[3] = 0  # a row of zeros has no direction to keep
    assert_within("norms", norms, want, gamma(D + 3, torch.float32))
    with pytest.raises(RuntimeError, match="call backward"):
        sae.remove_parallel_gradient_()
    x = _x(10)
    (sae(x).x_hat - x).square().sum().backward()
    grad, rows = sae.W_dec.grad.double().clone(), sae.W_dec.detach().double()
    along = (grad * rows).sum(1, keepdim=True)
    sae.remove_parallel_gradient_()
    budget = gamma(D + 3, torch.float32) * (
        grad.abs() + (grad * rows).abs().sum(1, keepdim=True) * rows.abs()
    )
    assert_within("gradient", sae.W_dec.grad, grad - along * rows, budget)


def test_initial_b_dec_is_the_median_in_the_scale_of_training() -> None:
    x = torch.tensor([[1.0] * D, [1.0] * D, [7.0] * D])
    sae = TopKSAE(TopKConfig(D, F, K, activation_scale=3.0))
    sae.initialise_b_dec_(x)
    assert sae.b_dec.tolist() == pytest.approx([3.0] * D, rel=1e-4)


def test_autocast_sets_the_dtype_of_the_operands() -> None:
    sae, x = _sae(), _x(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = sae(x)
    sae.compute_dtype = torch.bfloat16
    assert_bitwise("values", under.codes.values, sae(x).codes.values)


def test_repr_names_the_configuration() -> None:
    assert repr(_sae()) == f"TopKSAE(d_in={D}, n_latents=100, k=9)"
