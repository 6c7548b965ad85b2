"""dictionary_learning 0.1: its dictionaries, their losses, and the update of its trainers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sae_kernels.integrations.adapters import Adapter
from sae_kernels.integrations.dictionary_learning import module, threshold, trainer

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from sae_kernels.integrations.adapters import Installation


def _install(installation: Installation) -> None:
    module.install(installation)
    threshold.install(installation)
    if installation.level == "trainer":
        trainer.install(installation)


def _modules_of(target: Any) -> Iterable[torch.nn.Module]:
    dictionary = importlib.import_module("dictionary_learning.dictionary").Dictionary
    target = getattr(target, "ae", target)
    return [target] if isinstance(target, dictionary) else []


def _optimizers_of(target: Any) -> Iterable[torch.optim.Optimizer]:
    return [target.optimizer] if hasattr(target, "optimizer") else []


ADAPTER = Adapter(
    distribution="dictionary-learning",
    tested=("0.1.0",),
    oldest="0.1",
    below="0.2",
    levels=("module", "trainer"),
    seams=trainer.SEAMS | threshold.SEAMS,
    install=_install,
    modules_of=_modules_of,
    optimizers_of=_optimizers_of,
)
