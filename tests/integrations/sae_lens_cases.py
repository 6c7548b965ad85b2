"""SAEs, batches and runs of SAELens for the tests of its adapter."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sae_lens", reason="needs SAELens: python -m benchmarks.peer_tests sae_lens")

import torch
from sae_lens import saes
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

B, D, F, K = 96, 24, 320, 6
JUMP = {
    "jumprelu_init_threshold": 0.05,
    "jumprelu_bandwidth": 0.1,
    "l0_coefficient": 0.1,
    "target_l0": 15.0,
    "pre_act_loss_coefficient": 3e-3,
}
# Each way to train, as (class, settings).
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("TopK", {"k": K}),
    "topk by value": ("TopK", {"k": K, "rescale_acts_by_decoder_norm": False}),
    "topk uncentred": ("TopK", {"k": K, "apply_b_dec_to_input": False}),
    "batchtopk": ("BatchTopK", {"k": 5.5}),
    "matryoshka": ("MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": [40, 160, F]}),
    "matryoshka aux": (
        "MatryoshkaBatchTopK",
        {"k": K, "matryoshka_widths": [40, 160, F], "use_matryoshka_aux_loss": True},
    ),
    "jumprelu": ("JumpReLU", JUMP),
    "jumprelu quadratic": ("JumpReLU", JUMP | {"jumprelu_sparsity_loss_mode": "quadratic"}),
    "jumprelu tanh": ("JumpReLU", JUMP | {"jumprelu_sparsity_loss_mode": "tanh"}),
    "jumprelu to the input": ("JumpReLU", JUMP | {"jumprelu_ste_to_input": True}),
    "standard": ("Standard", {"l1_coefficient": 0.1}),
    "standard p": ("Standard", {"l1_coefficient": 0.1, "lp_norm": 2.0}),
    "gated": ("Gated", {"l1_coefficient": 0.1}),
}
RARE = 2.4  # off the biases of encoders with a threshold: some 2 % of the latents fire


def make(kind: str, *, dtype: str = "float32", training: bool = True, **more: Any) -> Any:
    """An SAE with weights that no term of a gradient is zero for."""
    name, settings = TRAINED[kind]
    name += "TrainingSAE"
    config = getattr(saes, name + "Config")(d_in=D, d_sae=F, dtype=dtype, **settings, **more)
    return fill(getattr(saes, name)(config))


def fill(sae: Any) -> Any:
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name in ("b_enc", "b_gate", "b_mag", "b_dec", "r_mag"):
                p.copy_(0.1 * noise(*p.shape))
        sae.W_dec.copy_(0.1 * noise(*sae.W_dec.shape) * noise(F, 1).exp())
        sae.W_enc.copy_(0.1 * noise(*sae.W_enc.shape))
        bias = getattr(sae, "b_gate", None)
        bias = sae.b_enc if bias is None else bias
        if not hasattr(sae.cfg, "k"):
            bias.sub_(RARE)
    return sae


def batches(n: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(48, D, generator=generator)
    found = []
    for _ in range(n):
        chosen = (torch.rand(B, 48, generator=generator) < 0.1).float()
        found.append((chosen @ directions + 0.1 * torch.randn(B, D, generator=generator)).to(dtype))
    return found


def sparse_from_the_start(sae: Any, x: torch.Tensor) -> None:
    """The first call of an encoder with a threshold is SAELens'; the rule then knows the part."""
    if not hasattr(sae.cfg, "k"):
        with torch.no_grad():
            sae.encode(x)


def gradients(sae: Any, x: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """All losses and gradients of one training forward pass with dead latents."""
    dead = torch.arange(F) % 7 == 0
    step = TrainStepInput(
        sae_in=x,
        dead_neuron_mask=dead,
        coefficients={"l0": 0.3, "l1": 0.2},
        n_training_steps=0,
        is_logging_step=False,
    )
    sae.zero_grad()
    out = sae.training_forward_pass(step)
    # What a loss on the codes themselves asks for: the gradient through the decoder's norms too.
    (out.loss + 0.01 * out.feature_acts.abs().sum()).backward()
    losses = {name: float(value.detach()) for name, value in out.losses.items()}
    return losses, {name: p.grad.clone() for name, p in sae.named_parameters()}


class Run:
    """20 steps of SAELens' own trainer and what it logged."""

    def __init__(self, kind: str, order: torch.Tensor | None = None, **options: Any) -> None:
        sae, self.data = make(kind), batches(20)
        if order is not None:  # the same SAE with its inputs in another order
            self.data = [x[:, order] for x in self.data]
            with torch.no_grad():
                sae.W_enc.copy_(sae.W_enc[order].clone())
                sae.W_dec.copy_(sae.W_dec[:, order].clone())
                sae.b_dec.copy_(sae.b_dec[order].clone())
        self.start = {name: p.detach().clone() for name, p in sae.named_parameters()}
        config = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=B,
            lr=1e-3,
            lr_end=1e-4,
            device="cpu",
            dead_feature_window=3,
        )
        self.trainer = SAETrainer(config, sae, iter(()), **options)
        self.sae, self.logged = sae, []

    def steps(self, n: int = 20) -> Run:
        for x in self.data[:n]:
            out = self.trainer.step(x)
            self.trainer.n_training_steps += 1
            samples = self.trainer.n_training_samples
            self.logged.append(self.trainer.build_train_step_log_dict(out, samples))
        return self

    def weights(self, order: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        found = {name: p.detach().clone() for name, p in self.sae.named_parameters()}
        if order is not None:
            back = order.argsort()
            found["W_enc"], found["b_dec"] = found["W_enc"][back], found["b_dec"][back]
            found["W_dec"] = found["W_dec"][:, back]
        return found


INFERENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("TopKSAE", {"k": K}),
    "topk by norm": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "standard": ("StandardSAE", {}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
    "layer norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "transcoder": ("Transcoder", {"d_out": 16}),
    "skip transcoder": ("SkipTranscoder", {"d_out": 16}),
    "jumprelu transcoder": ("JumpReLUTranscoder", {"d_out": 16}),
    "jumprelu skip transcoder": ("JumpReLUSkipTranscoder", {"d_out": 16}),
}


def at_inference(kind: str) -> Any:
    name, settings = INFERENCE[kind]
    if "Transcoder" in name:
        settings = settings | {"apply_b_dec_to_input": False}
    sae = fill(getattr(saes, name)(getattr(saes, name + "Config")(d_in=D, d_sae=F, **settings)))
    with torch.no_grad():
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(torch.linspace(-0.2, 0.4, F))
        if hasattr(sae, "W_skip"):
            sae.W_skip.copy_(torch.eye(16, D))
    return sae
