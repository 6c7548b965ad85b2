"""A module of every architecture and variant, small and with odd sizes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sae_kernels.nn import (
    BatchTopKConfig,
    BatchTopKSAE,
    CrossLayerBatchTopKConfig,
    CrossLayerJumpReLUConfig,
    CrossLayerTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    SparseAutoencoder,
    SwitchConfig,
    TopKConfig,
    build,
)

D, D_OUT, F, B = 9, 7, 50, 24
_TRANSCODES = {"d_out": D_OUT, "subtract_b_dec": False}
_FREE = {"unit_norm_decoder": False}
CASES: dict[str, SAEConfig] = {
    "topk": TopKConfig(D, F, 4),
    "topk-relu-none": TopKConfig(D, F, 4, relu="none"),
    "abstopk": TopKConfig(D, F, 4, relu="none", by_magnitude=True),
    "matryoshka-topk": TopKConfig(D, F, 4, groups=(5, 15, 30)),
    "batchtopk": BatchTopKConfig(D, F, k=3.5),
    "batchtopk-ranked": BatchTopKConfig(D, F, k=3.5, rank_by_decoder_norm=True, **_FREE),
    "matryoshka": BatchTopKConfig(D, F, k=3, groups=(10, 40), threshold_rule="sae_lens"),
    "jumprelu-log": JumpReLUConfig(D, F, threshold_init=0.5),
    "jumprelu-raw": JumpReLUConfig(D, F, threshold_init=0.5, log_threshold=False),
    "matryoshka-jumprelu": JumpReLUConfig(D, F, threshold_init=0.5, groups=(5, 15, 30)),
    "relu": ReLUConfig(D, F, subtract_b_dec=False),
    "gated": GatedConfig(D, F),
    "switch": SwitchConfig(D, F, k=4, n_experts=5),
    "switch-heaviside": SwitchConfig(D, F, k=4, n_experts=5, gate="heaviside"),
    "switch-shared": SwitchConfig(D, F, k=4, n_experts=5, shared_expert=True),
    "switch-transcoder": SwitchConfig(D, F, k=4, n_experts=5, **_TRANSCODES, **_FREE),
    "switch-crosscoder": SwitchConfig(D, F, k=4, n_experts=2, n_layers=2),
    "transcoder": TopKConfig(D, F, 4, **_TRANSCODES, **_FREE),
    "transcoder-ranked": BatchTopKConfig(
        D, F, k=3.5, rank_by_decoder_norm=True, **_TRANSCODES, **_FREE
    ),
    "skip-transcoder": TopKConfig(D, F, 4, skip=True, **_TRANSCODES, **_FREE),
    "skip-jumprelu": JumpReLUConfig(D, F, threshold_init=0.5, skip=True, **_TRANSCODES),
    "skip-to-the-input": GatedConfig(D, F, skip=True, subtract_b_dec=False),
    "crosscoder": BatchTopKConfig(
        D, F, k=3, n_layers=2, rank_by_decoder_norm=True, decoder_norm="sum", **_FREE
    ),
    "crosscoder-unit": ReLUConfig(D, F, n_layers=3),
    "clt": CrossLayerTopKConfig(D, F, k=4, n_layers=2, d_out=D_OUT),
    "clt-batchtopk": CrossLayerBatchTopKConfig(D, F, k=2.5, n_layers=2, d_out=D_OUT),
    "clt-jumprelu": CrossLayerJumpReLUConfig(D, F, threshold_init=0.5, n_layers=2, d_out=D_OUT),
    "causal-crosscoder": CrossLayerTopKConfig(D, F, k=4, n_layers=3, causality="strict"),
    "crosscoder-of-transcoders": TopKConfig(D, F, 4, n_layers=2, **_TRANSCODES),
}
each = pytest.mark.parametrize("config", CASES.values(), ids=CASES)


def scaled(config: SAEConfig, scale: float, target_scale: float = 1.0) -> SAEConfig:
    """The same with these scales; the second where there is a target."""
    target_scale = target_scale if config.transcodes else 1.0
    return dataclasses.replace(config, activation_scale=scale, target_scale=target_scale)


def sae_of(config: SAEConfig) -> SparseAutoencoder:
    """Weights as after some training, in evaluation mode."""
    sae, g = build(config), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            p.copy_(p + 0.2 * noise if "threshold" in name else 0.4 * noise)
        sae.W_dec *= 0.5 + torch.rand(len(sae.W_dec), 1, generator=g)
        if isinstance(sae, BatchTopKSAE):
            sae.threshold.fill_(0.61)
    return sae.eval()


def x_of(config: SAEConfig, *shape: int) -> Tensor:
    """Activations."""
    g = torch.Generator().manual_seed(4)
    return torch.randn(*shape, config.input_width, generator=g)
