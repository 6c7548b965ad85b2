"""Files and parts of every architecture: every bit comes back, and only from its own class."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.nn import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    ReLUSAE,
    SAEConfig,
    SparseAutoencoder,
    SwitchSAE,
    TopKSAE,
    build,
    from_weights,
)
from sae_kernels.testing import assert_bitwise
from tests.nn.modules import CASES, B, each, sae_of, x_of

if TYPE_CHECKING:
    from pathlib import Path


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_hold_every_bit(config: SAEConfig, dtype: torch.dtype, tmp_path: Path) -> None:
    sae = sae_of(config).to(dtype)
    sae.save_pretrained(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert type(again) is type(sae)
    assert again.config == config
    assert not again.training
    assert list(again.state_dict()) == list(sae.state_dict())
    for name, t in sae.state_dict().items():
        assert_bitwise(name, again.state_dict()[name].reshape(-1), t.reshape(-1))
    # Close, no more: torch's products (a router, a skip connection) may round otherwise with
    # weights at other addresses.
    x = x_of(config, B).to(dtype)
    torch.testing.assert_close(again(x).x_hat, sae(x).x_hat)
    own = type(sae).from_pretrained(tmp_path)
    torch.testing.assert_close(own(x).x_hat, sae(x).x_hat)


CLASSES = (TopKSAE, BatchTopKSAE, JumpReLUSAE, ReLUSAE, GatedSAE, SwitchSAE)


@pytest.mark.parametrize("wanted", CLASSES)
@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu-log", "relu", "gated", "switch"])
def test_another_architecture_is_refused_by_a_class(
    name: str, wanted: type[SparseAutoencoder], tmp_path: Path
) -> None:
    sae = build(CASES[name])
    sae.save_pretrained(tmp_path)
    if isinstance(sae, wanted):
        wanted.from_pretrained(tmp_path)
        return
    with pytest.raises(TypeError) as error:
        wanted.from_pretrained(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: expected a {wanted.__name__}, got a {type(sae).__name__}; load it with "
        "SparseAutoencoder.from_pretrained"
    )


@each
def test_from_weights_takes_the_tensors_themselves(config: SAEConfig) -> None:
    sae, x = sae_of(config), x_of(config, B)
    weights = {name: t.clone() for name, t in sae.state_dict().items()}
    made = from_weights(config, weights)
    assert not made.training
    assert_bitwise("x_hat", made(x).x_hat, sae(x).x_hat)
    for name, t in weights.items():
        assert made.state_dict()[name].data_ptr() == t.data_ptr()
    made.train()(x)  # what is not among the weights is there all the same
    missing = {name: t for name, t in weights.items() if name != "b_enc"}
    with pytest.raises(RuntimeError, match="b_enc"):
        from_weights(config, missing)
    with pytest.raises(RuntimeError, match="b_other"):
        from_weights(config, {**weights, "b_other": torch.zeros(3)})
    with pytest.raises(RuntimeError, match="size mismatch for W_enc"):
        from_weights(config, {**weights, "W_enc": weights["W_enc"][:, 1:]})
