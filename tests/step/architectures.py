"""Every architecture and option that training knows, as small cases with odd sizes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.nn import (
    BatchTopKConfig,
    CrossLayerBatchTopKConfig,
    CrossLayerJumpReLUConfig,
    CrossLayerTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    SwitchConfig,
    TopKConfig,
)
from sae_kernels.nn import build as build_sae
from sae_kernels.step import FusedStep, dense_pass
from tests.settings import settings
from tests.step.harness import ROUTES, stepping

if TYPE_CHECKING:
    import pytest
    from torch import Tensor

    from sae_kernels.config import TrainConfig
    from sae_kernels.step import AutogradStep
    from tests.step.harness import Route

D, D_OUT, D_LAYER, F, B = 11, 7, 5, 37, 13
# Few enough that all of them take part in AuxK: k_aux is half of the input's width.
DEAD, DEAD_AFTER = slice(-2, None), 10**6


@dataclasses.dataclass(frozen=True)
class Architecture:
    """An SAE and the settings of its training that differ from the defaults."""

    sae: SAEConfig
    train: dict[str, Any] = dataclasses.field(default_factory=dict)

    def settings(self) -> TrainConfig:
        """In fp32 and without AuxK, unless the case says otherwise."""
        plain = {"compute": "float32", "auxk_alpha": 0.0, "dead_after_tokens": DEAD_AFTER}
        return settings(self.sae, **{**plain, "sparsity_warmup_steps": 0, **self.train})

    def can_be_dense(self) -> bool:
        """Whether FusedStep has two ways to do it."""
        config = self.settings()
        return build_sae(self.sae).sums_over_entries(config.objective)


def _topk(**options: Any) -> TopKConfig:
    return TopKConfig(options.pop("d_in", D), F, 3, **options)


def _abstopk(**options: Any) -> TopKConfig:
    return _topk(by_magnitude=True, relu="none", **options)


def _batchtopk(**options: Any) -> BatchTopKConfig:
    return BatchTopKConfig(options.pop("d_in", D), F, options.pop("k", 3), **options)


def _jumprelu(**options: Any) -> JumpReLUConfig:
    return JumpReLUConfig(D, F, bandwidth=0.45, **{"threshold_init": 0.6, **options})


def _switch(**options: Any) -> SwitchConfig:
    return SwitchConfig(
        options.pop("d_in", D), 36, k=3, n_experts=options.pop("n_experts", 4), **options
    )


def _clt(kind: type[SAEConfig], **options: Any) -> SAEConfig:
    layers = {"d_in": D_LAYER, "n_latents": 39, "n_layers": 3, "d_out": 4}
    return kind.from_dict({**layers, **options})


_TRANSCODES = {"d_out": D_OUT, "subtract_b_dec": False}
_LAYERS = {"d_in": D_LAYER, "unit_norm_decoder": False}
_GROUPS = {"groups": (4, 11, F - 15)}
_AUXK = {"auxk_alpha": 0.25}
_FREE = {"unit_norm_decoder": False}


def _penalised(kind: str, **options: Any) -> dict[str, Any]:
    return {"loss": "mse", "sparsity": kind, "sparsity_coefficient": 0.4, **options}


_WEIGHTED = {"sparsity_norm_weighted": True}
_L1, _WEIGHTED_L1 = _penalised("l1"), _penalised("l1", **_WEIGHTED)
_LP = _penalised("lp", steps=40, p_start=0.0, p_steps=5)
_PREACT = {"preact_coefficient": 0.3}
_NO_PREACT = {"preact_coefficient": 0.0}
_RANKED = {"rank_by_decoder_norm": True, "decoder_norm": "joint"}
_JUMPS = {"bandwidth": 0.45, "threshold_init": 0.6}
_BALANCED = {"balance_coefficient": 0.2}

ARCHITECTURES = {
    "topk": Architecture(_topk(), {"clip_norm": 0.5, **_AUXK}),
    "topk-relu-none": Architecture(_topk(relu="none", activation_scale=1.7), {"loss": "mse"}),
    "abstopk": Architecture(_abstopk(), {"clip_norm": 0.5}),
    "abstopk-auxk": Architecture(_abstopk(subtract_b_dec=False), {"multi_topk": True, **_AUXK}),
    "abstopk-ranked": Architecture(_abstopk(rank_by_decoder_norm=True, **_FREE, **_GROUPS)),
    "topk-ranked": Architecture(_topk(rank_by_decoder_norm=True, **_FREE)),
    "topk-raw-input": Architecture(_topk(subtract_b_dec=False)),
    "multi-topk": Architecture(_topk(), {"multi_topk": True, **_AUXK}),
    "multi-topk-relu-none": Architecture(_topk(relu="none"), {"multi_topk": True}),
    "topk-l1": Architecture(_topk(), {"multi_topk": True, **_L1}),
    "batchtopk": Architecture(_batchtopk(), {"clip_norm": 0.5, **_AUXK}),
    "batchtopk-fraction": Architecture(_batchtopk(k=2.7, subtract_b_dec=False)),
    "batchtopk-ranked": Architecture(_batchtopk(k=4.1, rank_by_decoder_norm=True, **_FREE)),
    "jumprelu-raw-l0": Architecture(_jumprelu(log_threshold=False), _penalised("l0")),
    "jumprelu-log-l0": Architecture(_jumprelu(), {**_penalised("l0"), **_AUXK}),
    "jumprelu-raw-tanh": Architecture(
        _jumprelu(log_threshold=False, **_FREE),
        _penalised("tanh", **_WEIGHTED, clip_norm=0.5, **_PREACT),
    ),
    "jumprelu-log-tanh": Architecture(_jumprelu(**_FREE), _penalised("tanh", **_WEIGHTED)),
    "jumprelu-raw-target": Architecture(
        _jumprelu(log_threshold=False), _penalised("target_l0", target_l0=6.0)
    ),
    "jumprelu-log-target": Architecture(
        _jumprelu(), _penalised("target_l0", target_l0=6.0, loss="fvu")
    ),
    "jumprelu-raw-preact": Architecture(
        _jumprelu(log_threshold=False), _penalised("l0", **_PREACT)
    ),
    "jumprelu-log-preact": Architecture(_jumprelu(subtract_b_dec=False), {**_PREACT, **_AUXK}),
    "relu-l1": Architecture(ReLUConfig(D, F), {**_L1, **_AUXK, "clip_norm": 0.5}),
    "relu-weighted-l1": Architecture(ReLUConfig(D, F, **_FREE), {**_WEIGHTED_L1, "clip_norm": 0.5}),
    "relu-lp": Architecture(ReLUConfig(D, F, subtract_b_dec=False), _LP),
    "relu-weighted-lp": Architecture(ReLUConfig(D, F, **_FREE), {**_LP, **_WEIGHTED}),
    "relu-tanh": Architecture(ReLUConfig(D, F), _penalised("tanh", tanh_scale=1.5, loss="fvu")),
    "gated-frozen": Architecture(GatedConfig(D, F), {**_L1, "clip_norm": 0.5}),
    "gated-free": Architecture(GatedConfig(D, F, frozen_decoder=False), {**_L1, **_AUXK}),
    "gated-weighted-lp": Architecture(
        GatedConfig(D, F, subtract_b_dec=False, **_FREE), {**_LP, **_WEIGHTED}
    ),
    "matryoshka-topk-mean": Architecture(_topk(**_GROUPS), _AUXK),
    "matryoshka-topk-sum": Architecture(_topk(**_GROUPS), {"matryoshka": "sum", "loss": "mse"}),
    "matryoshka-topk-random": Architecture(_topk(), {"random_prefixes": 4}),
    "matryoshka-mean": Architecture(_batchtopk(**_GROUPS), {"clip_norm": 0.5}),
    "matryoshka-sum": Architecture(_batchtopk(k=3.3, **_GROUPS), {"matryoshka": "sum", **_AUXK}),
    "matryoshka-random": Architecture(_batchtopk(), {"random_prefixes": 3, "matryoshka": "sum"}),
    "matryoshka-jumprelu-target": Architecture(
        _jumprelu(**_GROUPS), _penalised("target_l0", target_l0=6.0, matryoshka="sum")
    ),
    "matryoshka-jumprelu-l0": Architecture(
        _jumprelu(log_threshold=False, **_GROUPS), {**_penalised("l0", **_PREACT), **_AUXK}
    ),
    "matryoshka-jumprelu-random": Architecture(
        _jumprelu(), _penalised("l0", random_prefixes=4, clip_norm=0.5)
    ),
    "switch": Architecture(_switch(), {**_BALANCED, "loss": "mse", "clip_norm": 0.5}),
    "switch-fvu": Architecture(_switch(activation_scale=0.6), {**_BALANCED, **_AUXK}),
    "switch-unbalanced": Architecture(_switch(n_experts=2)),
    "switch-heaviside": Architecture(_switch(gate="heaviside"), _BALANCED),
    "switch-shared": Architecture(_switch(shared_expert=True), {**_BALANCED, "clip_norm": 0.5}),
    "switch-shared-heaviside": Architecture(
        _switch(n_experts=6, shared_expert=True, gate="heaviside"), _BALANCED
    ),
    "switch-raw-input": Architecture(_switch(subtract_b_dec=False, **_FREE), _BALANCED),
    "switch-l1": Architecture(_switch(), {**_BALANCED, **_L1}),
    "switch-skip-transcoder": Architecture(
        _switch(**_TRANSCODES, **_FREE, skip=True, activation_scale=0.6), _BALANCED
    ),
    "switch-crosscoder": Architecture(_switch(n_layers=2, d_in=D_LAYER), _BALANCED),
    "transcoder": Architecture(_topk(**_TRANSCODES, **_FREE, target_scale=0.6), _AUXK),
    "transcoder-unit-norms": Architecture(_batchtopk(**_TRANSCODES, activation_scale=1.3)),
    "skip-transcoder": Architecture(_topk(**_TRANSCODES, **_FREE, skip=True), {"clip_norm": 0.5}),
    "skip-transcoder-multi": Architecture(
        _topk(**_TRANSCODES, **_FREE, skip=True), {"multi_topk": True, **_AUXK}
    ),
    "skip-matryoshka": Architecture(_batchtopk(**_TRANSCODES, skip=True, **_GROUPS)),
    "skip-relu": Architecture(ReLUConfig(D, F, **_TRANSCODES, skip=True), _L1),
    "skip-gated": Architecture(
        GatedConfig(D, F, **_TRANSCODES, skip=True, frozen_decoder=False), _L1
    ),
    "crosscoder-joint": Architecture(
        _batchtopk(n_layers=2, rank_by_decoder_norm=True, decoder_norm="joint", **_LAYERS), _AUXK
    ),
    "crosscoder-sum": Architecture(
        _batchtopk(n_layers=3, rank_by_decoder_norm=True, decoder_norm="sum", **_LAYERS)
    ),
    "crosscoder-mixed": Architecture(
        _topk(n_layers=3, rank_by_decoder_norm=True, decoder_norm="mixed", **_LAYERS)
    ),
    "crosscoder-unit-norms": Architecture(_topk(n_layers=2, d_in=D_LAYER), {"clip_norm": 0.5}),
    "crosscoder-l1-joint": Architecture(
        ReLUConfig(n_latents=F, n_layers=2, decoder_norm="joint", **_LAYERS), _WEIGHTED_L1
    ),
    "crosscoder-l1-sum": Architecture(
        ReLUConfig(n_latents=F, n_layers=3, decoder_norm="sum", **_LAYERS),
        {**_WEIGHTED_L1, "clip_norm": 0.5, **_AUXK},
    ),
    "crosscoder-l1-mixed": Architecture(
        ReLUConfig(n_latents=F, n_layers=2, decoder_norm="mixed", **_LAYERS), _WEIGHTED_L1
    ),
    "clt-topk": Architecture(_clt(CrossLayerTopKConfig, k=3), {"clip_norm": 0.5}),
    "clt-topk-together": Architecture(
        _clt(CrossLayerTopKConfig, k=2, layers_together=True, **_RANKED), {"loss": "mse"}
    ),
    "clt-topk-relu-none": Architecture(_clt(CrossLayerTopKConfig, k=3, relu="none")),
    "clt-batchtopk": Architecture(
        _clt(CrossLayerBatchTopKConfig, k=2.7, **_RANKED), {"clip_norm": 0.5}
    ),
    "clt-jumprelu-tanh": Architecture(
        _clt(CrossLayerJumpReLUConfig, log_threshold=False, **_JUMPS),
        _penalised("tanh", **_WEIGHTED, clip_norm=0.5, **_PREACT),
    ),
    "clt-jumprelu-l1-sum": Architecture(
        _clt(CrossLayerJumpReLUConfig, decoder_norm="sum", **_JUMPS),
        {**_WEIGHTED_L1, **_NO_PREACT},
    ),
    "clt-jumprelu-target": Architecture(
        _clt(CrossLayerJumpReLUConfig, activation_scale=0.8, target_scale=1.2, **_JUMPS),
        _penalised("target_l0", target_l0=9.0, sparsity_norm_weighted=False, **_NO_PREACT),
    ),
    "causal-crosscoder-strict": Architecture(
        _clt(CrossLayerTopKConfig, d_out=None, k=3, causality="strict", n_latents=26)
    ),
    "causal-crosscoder-none": Architecture(
        _clt(CrossLayerBatchTopKConfig, d_out=None, k=2, causality="none", unit_norm_decoder=True)
    ),
}

# One of each kind; what differs between the others is a formula of a single step.
REPRESENTATIVE = (
    "topk",
    "multi-topk",
    "batchtopk-ranked",
    "jumprelu-log-l0",
    "jumprelu-raw-tanh",
    "jumprelu-log-target",
    "relu-weighted-l1",
    "relu-weighted-lp",
    "gated-free",
    "matryoshka-sum",
    "matryoshka-topk-random",
    "abstopk-auxk",
    "matryoshka-jumprelu-target",
    "switch",
    "switch-shared",
    "skip-transcoder-multi",
    "crosscoder-mixed",
    "crosscoder-unit-norms",
    "crosscoder-l1-sum",
    "clt-topk-together",
    "clt-batchtopk",
    "clt-jumprelu-tanh",
    "causal-crosscoder-strict",
)


def build(case: Architecture, route: type[Route], backend: str | None = None) -> Route:
    """A route in the middle of training: weights of all kinds, latents that are dead."""
    sae = build_sae(case.sae, backend=backend)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in sae.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "threshold" in name:
                p.add_(0.2 * noise)
            elif p.dim() == 1:
                p.copy_(0.3 * noise)
            else:
                # The bound of a softmax grows with its logits.
                size = 0.25 if name == "W_router" else 1.0
                p.copy_(size * noise / p.shape[1] ** 0.5)
        sae.W_dec.mul_(0.6 + torch.rand(len(sae.W_dec), 1, generator=g))
        if case.sae.unit_norm_decoder:
            sae.normalize_decoder_()
    step = stepping(route, sae, case.settings())
    step.dead.since_fired[DEAD] = DEAD_AFTER
    return step


def batch(case: Architecture, n: int = B, seed: int = 0) -> tuple[Tensor, Tensor | None]:
    """Tokens and, of a transcoder, what they are to become."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, case.sae.input_width, generator=g) + 0.3
    y = torch.randn(n, case.sae.output_width, generator=g) - 0.2
    return x, y if case.sae.transcodes else None


def set_dense(step: object, dense: bool) -> None:
    """Takes FusedStep's choice of a pass from it."""
    assert isinstance(step, FusedStep)
    step.dense_next = dense


def route_of(
    case: Architecture, way: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> FusedStep | AutogradStep:
    """FusedStep made to take one of its passes, or the composable route."""
    step: Any = build(case, ROUTES["autograd" if way == "autograd" else "fused"], backend)
    if way != "autograd":
        set_dense(step, way != "sparse")
    if way == "dense-tiles":  # five latents each, and two
        monkeypatch.setattr(dense_pass, "_TILE_BYTES", 4 * B * 5)
    return step
