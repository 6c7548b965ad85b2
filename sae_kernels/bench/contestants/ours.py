"""Contestant ours: this package's modules, functions and FusedStep."""

from __future__ import annotations

import functools
from typing import Any

import torch

from sae_kernels import functional
from sae_kernels.codes import SparseCodes
from sae_kernels.config import ObjectiveConfig, OptimizerConfig
from sae_kernels.nn import SAEConfig, SparseAutoencoder, architecture, build
from sae_kernels.step import FusedStep

from .contestant import LR, WEIGHTS, Contestant, Task, Tensors, fill

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
        self.backend: str | None = task.options.get("backend")
        with torch.device(task.device):
            self.sae = build(_config(task, tensors), compute_dtype=self.dtype, backend=self.backend)
        fill({name: getattr(self.sae, name) for name in WEIGHTS}, tensors)
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
        return self.fused(x, lr=self.task.options.get("lr", LR))

    @functools.cached_property
    def fused(self) -> FusedStep:
        """The FusedStep with its optimizer states, made when training begins."""
        objective = _objective(self.task, self.sae)
        return FusedStep(self.sae, objective, OptimizerConfig(compute=self.task.dtype))  # type: ignore[arg-type]

    def dense(self, codes: SparseCodes) -> torch.Tensor:
        """Codes as a matrix [B, F]."""
        return codes.to_dense()

    def parts(self) -> Tensors:
        """The module's weights, and its thresholds where it has them."""
        sae: Any = self.sae
        found = {name: getattr(sae, name) for name in self.tensors if hasattr(sae, name)}
        return found | ({"threshold": sae.thresholds()} if hasattr(sae, "thresholds") else {})


def _config(task: Task, tensors: Tensors) -> SAEConfig:
    F, D = tensors["W_enc"].shape
    own: dict[str, Any] = {"k": task.k} if "topk" in task.architecture else {}
    if task.architecture == "jumprelu":
        own["threshold_init"] = task.options["threshold"]
        own["bandwidth"] = task.options["bandwidth"]
    name = task.architecture.replace("_", "")  # batch_topk here, batchtopk in files
    return architecture(name).config_class(D, F, **own)


def _objective(task: Task, sae: SparseAutoencoder) -> ObjectiveConfig:
    plain: dict[str, Any] = {"loss": "fvu", "sparsity": "none", "target_l0": None}
    if task.architecture in (penalties := {"relu": "l1", "jumprelu": "l0"}):
        plain["sparsity"] = penalties[task.architecture]
        plain["sparsity_coefficient"] = task.options.get("coefficient", 0.0)
    objective: ObjectiveConfig = sae.objective_class(**plain, auxk_alpha=0.0)
    return objective


contestant = Ours
