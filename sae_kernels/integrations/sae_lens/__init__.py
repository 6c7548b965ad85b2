"""SAELens: its training SAEs, its SAEs at inference and transcoders, and its trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.integrations.adapters import Adapter
from sae_kernels.integrations.sae_lens import shared, threshold, topk, trainer

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from sae_kernels.integrations.adapters import Installation

# The code of what is replaced and of what that stands for, by file: fingerprints of 6.54.12.
_CODE = {
    "topk_sae": {
        "TopK": "ecb41c0dc194",
        "TopKSAE.encode": "4f987ebc3271",
        "TopKSAE.decode": "08b5d8092f73",
        "TopKTrainingSAE.encode_with_hidden_pre": "9268ec295968",
        "TopKTrainingSAE.decode": "08b5d8092f73",
        "TopKTrainingSAE.calculate_topk_aux_loss": "a5383dfcfb67",
        "calculate_topk_aux_acts": "021b5b44afba",
        "act_times_W_dec": "230344f02645",
    },
    "batchtopk_sae": {
        "BatchTopK": "fd6bf7c0c2e8",
    },
    "matryoshka_batchtopk_sae": {
        "MatryoshkaBatchTopKTrainingSAE._iterable_decode": "33dc981b8b25",
    },
    "standard_sae": {
        "StandardSAE.encode": "81f8b2e115a9",
        "StandardTrainingSAE.encode_with_hidden_pre": "c1574e84b434",
    },
    "jumprelu_sae": {
        "Step": "fd54e5914b63",
        "JumpReLU": "8dff4b6c2cca",
        "rectangle": "fac1e1b99a21",
        "JumpReLUSAE.encode": "14afa9cfd3d5",
        "JumpReLUTrainingSAE.encode_with_hidden_pre": "f9cc3bd03332",
        "JumpReLUTrainingSAE.calculate_aux_loss": "f659872b1f30",
        "calculate_pre_act_loss": "41fbf6465817",
    },
    "gated_sae": {
        "GatedSAE.encode": "92bfb6f3f7fc",
        "GatedTrainingSAE.encode_with_hidden_pre": "7b68b17c5559",
        "GatedTrainingSAE.calculate_aux_loss": "889ca6577395",
    },
    "transcoder": {
        "Transcoder.encode": "81f8b2e115a9",
        "JumpReLUTranscoder.encode": "7adfa37fcf79",
    },
}


def _install(installation: Installation) -> None:
    shared.install(installation)
    topk.install(installation)
    threshold.install(installation)
    if installation.level == "trainer":
        trainer.install(installation)


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
    levels=("module", "trainer"),
    seams=trainer.SEAMS
    | {
        f"sae_lens.saes.{file}:{name}": code
        for file, names in _CODE.items()
        for name, code in names.items()
    },
    install=_install,
    modules_of=_modules_of,
    optimizers_of=_optimizers_of,
)
