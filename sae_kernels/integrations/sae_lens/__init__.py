"""SAELens: its training SAEs, its SAEs at inference and transcoders, and its trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.integrations.adapters import Adapter
from sae_kernels.integrations.sae_lens import shared, threshold, topk

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from sae_kernels.integrations.adapters import Installation


def _install(installation: Installation) -> None:
    shared.install(installation)
    topk.install(installation)
    threshold.install(installation)


def _modules_of(target: Any) -> Iterable[torch.nn.Module]:
    from sae_lens.saes.sae import SAE
    from torch.nn import Module

    if isinstance(target, Module):  # an SAE, or a model with SAEs in it
        return [module for module in target.modules() if isinstance(module, SAE)]
    return [trainer.sae for trainer in _trainers_of(target)]


def _optimizers_of(target: Any) -> Iterable[torch.optim.Optimizer]:
    return [trainer.optimizer for trainer in _trainers_of(target)]


def _trainers_of(target: Any) -> list[Any]:
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer
    from sae_lens.training.sae_trainer import SAETrainer

    if isinstance(target, MultiSAETrainer):
        return list(target.trainers.values())
    return [target] if isinstance(target, SAETrainer) else []


ADAPTER = Adapter(
    distribution="sae-lens",
    tested=("6.54.12",),
    oldest="6.0",
    below="7",
    levels=("module",),
    seams={},
    install=_install,
    modules_of=_modules_of,
    optimizers_of=_optimizers_of,
)
