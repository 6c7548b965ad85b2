"""dictionary_learning of Marks, Karvonen and Mueller: its trainSAE, fed with our batches."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from .contestant import Contestant, Task, Tensors, Unable, copies

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
        self._trainer = _trainer(task, tensors)
        self.sae = self._trainer.ae
        _fill(self.sae, tensors)
        if (task.device, task.dtype) == ("cpu", "bfloat16"):
            # Once an update, not once a loop: an autocast keeps its copies of weights to its end.
            autocast = torch.autocast("cpu", torch.bfloat16)
            self._trainer.update = autocast(self._trainer.update)
        if task.operation == "decode":
            self._given = self.given()

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes, dense, selected as in training."""
        codes: torch.Tensor = self.sae.encode(x, use_threshold=False)
        return codes

    def decode(self) -> torch.Tensor:
        """Reconstruction of the given codes, which are dense as its decoder has them."""
        x_hat: torch.Tensor = self.sae.decode(self._given)
        return x_hat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode and decode."""
        x_hat: torch.Tensor = self.sae.decode(self.encode(x))
        return x_hat

    def parameters(self) -> list[torch.Tensor]:
        """The module's."""
        return list(self.sae.parameters())

    def train(self, batches: Iterator[torch.Tensor]) -> None:
        """``trainSAE``: it sets b_dec to the geometric median of the first batch; the learning rate
        of its first step is 0."""
        import_module("dictionary_learning.training").trainSAE(
            batches,
            [{"trainer": lambda: self._trainer}],
            steps=_FOREVER,
            device=self.task.device,
            autocast_dtype=getattr(torch, self.task.dtype),
        )

    def dense(self, codes: torch.Tensor) -> torch.Tensor:
        """Codes as they are."""
        return codes

    def weights(self) -> Tensors:
        """The module's."""
        encoder, decoder = self.sae.encoder, self.sae.decoder
        return copies(
            W_enc=encoder.weight, b_enc=encoder.bias, W_dec=decoder.weight.T, b_dec=self.sae.b_dec
        )

    def encoder(self) -> torch.Tensor:
        """The module's."""
        rows: torch.Tensor = self.sae.encoder.weight
        return rows


def _trainer(task: Task, tensors: Tensors) -> Any:
    n_latents, d_in = tensors["W_enc"].shape
    trainers = import_module("dictionary_learning.trainers")
    return getattr(trainers, _TRAINERS[task.architecture])(
        steps=_FOREVER,
        activation_dim=d_in,
        dict_size=n_latents,
        k=task.k,
        layer=0,
        lm_name="none",
        device=task.device,
    )


@torch.no_grad()
def _fill(sae: Any, tensors: Tensors) -> None:
    sae.encoder.weight.copy_(tensors["W_enc"])
    sae.encoder.bias.copy_(tensors["b_enc"])
    sae.decoder.weight.copy_(tensors["W_dec"].T)
    sae.b_dec.copy_(tensors["b_dec"])


contestant = DictionaryLearning
