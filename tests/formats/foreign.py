"""What the tests of other tools' formats share: weights that multiply exactly, and our formulas.

Weights and tokens are small whole numbers, so every product and sum is exact in fp64 (and fp32),
whatever its order: what another tool's formula gives must equal ours bit by bit. Only the gated
SAE's exponential is rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from sae_kernels.errors import DataError
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
)
from sae_kernels.testing import assert_bitwise, assert_within, gamma

if TYPE_CHECKING:
    from sae_kernels.formats import Weights

B, D, F, K = 8, 6, 16, 3
F64 = torch.float64


def exact_tensors(config: SAEConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Whole numbers of at most 7 bits, exact in every dtype; decoder rows have norm 2, 4, or 8."""
    g = torch.Generator().manual_seed(seed)

    def whole(size: tuple[int, ...], most: int) -> Tensor:
        return torch.randint(-most, most + 1, size, generator=g).to(dtype)

    tensors = {name: whole(size, 127) for name, size in config.shapes().items()}
    tensors["b_dec"] = whole((config.output_width,), 15)
    tensors["W_dec"] = _rows(config, g).to(dtype)
    if "W_skip" in tensors:
        tensors["W_skip"] = whole(tuple(tensors["W_skip"].shape), 7)
    for name, size in config.shapes().items():
        if name == "threshold":
            wide = torch.float32 if size else F64
            tensors[name] = torch.randint(0, 999, size, generator=g).to(wide)
        if name == "log_threshold":
            tensors[name] = torch.randn(size, generator=g)
        if name == "r_mag":
            tensors[name] = torch.randn(size, generator=g).to(dtype)
    return tensors


def _rows(config: SAEConfig, g: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, (config.n_latents, config.output_width), generator=g) * 2 - 1
    four = torch.rand(signs.shape, generator=g).argsort(dim=1) < 4
    size = 2 ** torch.randint(0, 3, (config.n_latents, 1), generator=g)
    return signs * four * size


def tokens(config: SAEConfig) -> Tensor:
    g = torch.Generator().manual_seed(99)
    return torch.randint(-31, 32, (B, config.d_in), generator=g).to(F64)


def wide(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(F64) for name, tensor in tensors.items()}


def keep_largest(values: Tensor, keys: Tensor, k: int) -> Tensor:
    """Zeros but for the k largest keys of a row; the examples have no ties where that matters."""
    order = keys.sort(dim=1, descending=True)
    cut = order.values[:, k - 1 : k]
    assert ((keys == cut).sum(1) == 1).logical_or(cut[:, 0] <= 0).all(), "a tie: take another seed"
    return torch.zeros_like(values).scatter(
        1, order.indices[:, :k], values.gather(1, order.indices[:, :k])
    )


def formula(config: SAEConfig, tensors: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, F] and reconstruction of our definitions, dense, in fp64."""
    t = wide(tensors)
    centred = x - t["b_dec"] if config.subtract_b_dec else x
    product = centred @ t["W_enc"].T
    h = product + t["b_enc"]
    norms = t["W_dec"].norm(dim=1)
    if isinstance(config, TopKConfig):
        key = h * norms if config.rank_by_decoder_norm else h
        kept = keep_largest(h, key.abs() if config.by_magnitude else key, config.k)
        codes = kept if config.relu == "none" else kept.relu()
    elif isinstance(config, BatchTopKConfig):
        key = h.relu() * norms if config.rank_by_decoder_norm else h.relu()
        codes = h.relu() * (key > t["threshold"])
    elif isinstance(config, JumpReLUConfig):
        log = tensors.get("log_threshold")
        codes = h * (h > (t["threshold"] if log is None else log.exp().to(F64)))
    elif isinstance(config, GatedConfig):
        codes = (h > 0) * (t["r_mag"].exp() * product + t["b_mag"]).relu()
    else:
        assert isinstance(config, ReLUConfig)
        codes = h.relu()
    y = codes @ t["W_dec"] + t["b_dec"]
    return codes, y + x @ t["W_skip"].T if config.skip else y


def assert_same(config: SAEConfig, x: Tensor, t: Any, ours: Any, theirs: Any) -> None:
    """Codes and reconstructions agree: bit by bit, or within the roundings of the exponential."""
    assert ours[0].count_nonzero() > B, "hardly a latent fires"
    codes_budget = budget = torch.zeros(())
    if isinstance(config, GatedConfig):
        w = wide({name: tensor.abs() for name, tensor in t.items()})
        magnitude = (x.abs() + w["b_dec"]) @ w["W_enc"].T * t["r_mag"].to(F64).exp() + w["b_mag"]
        codes_budget = gamma(D + 4, F64) * magnitude
        budget = (codes_budget + gamma(F + 2, F64) * magnitude) @ w["W_dec"]
    assert_within("codes", theirs[0], ours[0], codes_budget)
    assert_within("reconstruction", theirs[1], ours[1], budget)


def assert_equal_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert_bitwise(name, actual[name].reshape(-1), tensor.reshape(-1))
        assert actual[name].shape == tensor.shape


def assert_weights(came: Weights, config: SAEConfig, tensors: dict[str, Tensor]) -> None:
    """Exactly these, and in memory as the kernels want them."""
    assert came.config == config
    assert_equal_tensors(came.tensors, tensors)
    assert all(tensor.is_contiguous() for tensor in came.tensors.values())


def refuses(call: Any, *parts: str, error: type[Exception] = DataError) -> None:
    """The call raises one line that holds every part."""
    with pytest.raises(error) as raised:
        call()
    message = str(raised.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
