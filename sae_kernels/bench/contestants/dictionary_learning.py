"""Contestant dictionary_learning (Marks, Karvonen, Mueller): its trainSAE on our batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import torch

from .contestant import Contestant, Task, Tensors, Unable, fill

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "dictionary-learning"
DIFFERS = (
    "dense products of [B, F] codes; Adam on the squared error, the gradients' norm clipped to 1, "
    "decoder rows renormalised after the step; AuxK is on (1/32), but costs nothing until a latent "
    "has been dead for 10M tokens; the host reads the loss at every step. It autocasts on GPUs "
    "only: for bf16 on a CPU the same autocast is put around each of its updates"
)

_FOREVER = 10**9
_TRAINERS = {"topk": "TopKTrainer", "batch_topk": "BatchTopKTrainer"}


class DictionaryLearning(Contestant):
    """``trainSAE`` with TopKTrainer or BatchTopKTrainer and their defaults."""

    def __init__(self, task: Task, tensors: Tensors) -> None:
        super().__init__(task, tensors)
        if task.architecture not in _TRAINERS:
            raise Unable(f"no adapter for {task.architecture} SAEs of dictionary-learning")
        n_latents, d_in = tensors["W_enc"].shape
        trainers = import_module("dictionary_learning.trainers")
        trainer = getattr(trainers, _TRAINERS[task.architecture])
        sizes = {"activation_dim": d_in, "dict_size": n_latents, "k": task.k, "steps": _FOREVER}
        self._trainer = trainer(**sizes, layer=0, lm_name="none", device=task.device)
        self.sae = self._trainer.ae
        fill(self.parts(), tensors)
        if (task.device, task.dtype) == ("cpu", "bfloat16"):
            # Once per update, as autocast caches its copies of the weights until it exits.
            autocast = torch.autocast("cpu", torch.bfloat16)
            self._trainer.update = autocast(self._trainer.update)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes [B, F], selected as in training."""
        codes: torch.Tensor = self.sae.encode(x, use_threshold=False)
        return codes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction from codes that are selected as in training."""
        x_hat: torch.Tensor = self.sae.decode(self.encode(x))
        return x_hat

    def train(self, batches: Iterator[torch.Tensor]) -> None:
        """Trains by ``trainSAE``.

        It sets b_dec to the geometric median of the first batch; the learning rate of its first
        step is 0."""
        import_module("dictionary_learning.training").trainSAE(
            batches,
            [{"trainer": lambda: self._trainer}],
            steps=_FOREVER,
            device=self.task.device,
            autocast_dtype=getattr(torch, self.task.dtype),
        )

    def parts(self) -> Tensors:
        """The module's weights."""
        weight, bias = self.sae.encoder.weight, self.sae.encoder.bias
        decoder = {"W_dec": self.sae.decoder.weight.T, "b_dec": self.sae.b_dec}
        return {"W_enc": weight, "b_enc": bias, **decoder}


contestant = DictionaryLearning
