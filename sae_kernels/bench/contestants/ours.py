"""Contestant ours: this package's modules, functions and FusedStep."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sae_kernels import functional
from sae_kernels.codes import SparseCodes
from sae_kernels.config import ObjectiveConfig, OptimizerConfig
from sae_kernels.nn import (
    BatchTopKConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    SparseAutoencoder,
    TopKConfig,
    build,
)
from sae_kernels.step import FusedStep

from .contestant import LR, Contestant, Task, Tensors, copies

PACKAGE = "sae-kernels"
DIFFERS = (
    "FusedStep: unit-norm decoder with the parallel gradient removed, Adam, loss divided by the "
    "variance (FVU), dead latents counted, no clipping; no AuxK as no latent is dead yet"
)


class Ours(Contestant):
    """Runs FusedStep, the modules under autograd, or the functions on compute-dtype weights."""

    def __init__(self, task: Task, tensors: Tensors) -> None:
        super().__init__(task, tensors)
        self.dtype = getattr(torch, task.dtype)
        backend = task.options.get("backend")
        self.backend = str(backend) if backend else None
        with torch.device(task.device):
            self.sae = build(_config(task, tensors), compute_dtype=self.dtype, backend=self.backend)
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            getattr(self.sae, name).data.copy_(tensors[name])
        if task.mode == "inference":  # weights that no one trains are stored as they are computed
            self.sae = self.sae.to(self.dtype).eval()
        self.codes = SparseCodes(
            tensors["values"], tensors["indices"].to(torch.int32), tensors["W_enc"].shape[0]
        )

    def decode(self) -> torch.Tensor:
        """Reconstruction of the given codes."""
        return functional.decode(self.codes, self.sae.W_dec, self.sae.b_dec, backend=self.backend)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction [B, D] of x."""
        x_hat: torch.Tensor = self.sae(x).x_hat
        return x_hat

    def step(self, x: torch.Tensor) -> object:
        """One call of FusedStep."""
        return self.fused(x, lr=LR)

    @functools.cached_property
    def fused(self) -> FusedStep:
        """The FusedStep with its optimizer states, made when training begins."""
        objective = _objective(self.task, self.sae)
        return FusedStep(self.sae, objective, OptimizerConfig(compute=self.task.dtype))  # type: ignore[arg-type]

    def dense(self, codes: SparseCodes) -> torch.Tensor:
        """Codes as a matrix [B, F]."""
        return codes.to_dense()

    def weights(self) -> Tensors:
        """The module's weights, and its thresholds if it has them."""
        sae: Any = self.sae
        names = (name for name in self.tensors if hasattr(sae, name))
        found = copies(**{name: getattr(sae, name).float() for name in names})
        if self.task.architecture == "jumprelu":
            found |= copies(threshold=sae.thresholds())
        return found


def _config(task: Task, tensors: Tensors) -> SAEConfig:
    F, D = tensors["W_enc"].shape
    if task.architecture == "topk":
        return TopKConfig(D, F, task.k)
    if task.architecture == "batch_topk":
        return BatchTopKConfig(D, F, task.k)
    if task.architecture == "relu":
        return ReLUConfig(D, F)
    threshold, bandwidth = task.options["threshold"], task.options["bandwidth"]
    return JumpReLUConfig(D, F, threshold_init=threshold, bandwidth=bandwidth)


def _objective(task: Task, sae: SparseAutoencoder) -> ObjectiveConfig:
    penalty: dict[str, Any] = {
        "relu": {"sparsity": "l1", "sparsity_coefficient": task.options.get("coefficient", 0.0)},
        "jumprelu": {"sparsity": "l0", "sparsity_coefficient": task.options.get("coefficient", 0)},
    }.get(task.architecture, {})
    plain = {"loss": "fvu", "sparsity": "none", "target_l0": None, "auxk_alpha": 0.0}
    objective: ObjectiveConfig = sae.objective_class(**{**plain, **penalty})
    return objective


contestant = Ours
