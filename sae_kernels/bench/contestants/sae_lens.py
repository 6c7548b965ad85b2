"""Contestant sae_lens: SAELens's SAETrainer on our batches."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING

from .contestant import WEIGHTS, Contestant, Task, Tensors, Unable, copies, fill

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

PACKAGE = "sae-lens"
DIFFERS = (
    "dense products of [B, F] codes; Adam on the squared error, the gradients' norm clipped to 1; "
    "decoder rows are not renormalised: codes are scaled by their norms instead; AuxK is on "
    "(coefficient 1), but costs nothing until a latent has been dead for 1000 steps; the host asks "
    "for the number of dead latents at every step, and firing frequencies are counted. bf16 is its "
    "own autocast option"
)

_FOREVER = 10**15
_SAES = {"topk": "TopKTrainingSAE", "batch_topk": "BatchTopKTrainingSAE"}


class SAELens(Contestant):
    """``SAETrainer.fit`` on a TopK or BatchTopK training SAE, all with default settings."""

    def __init__(self, task: Task, tensors: Tensors) -> None:
        super().__init__(task, tensors)
        if task.architecture not in _SAES:
            raise Unable(f"no adapter for {task.architecture} SAEs of sae-lens")
        n_latents, d_in = tensors["W_enc"].shape
        saes, name = import_module("sae_lens.saes"), _SAES[task.architecture]
        config = getattr(saes, f"{name}Config")
        shape = {"d_in": d_in, "d_sae": n_latents, "k": task.k}
        self.sae = getattr(saes, name)(config(**shape, device=task.device))
        parameters = {name: getattr(self.sae, name) for name in WEIGHTS}
        fill(parameters | {"W_enc": self.sae.W_enc.T}, tensors)

    def train(self, batches: Iterator[torch.Tensor]) -> None:
        """Trains by ``SAETrainer.fit``."""
        settings = import_module("sae_lens.config").SAETrainerConfig(
            total_training_samples=_FOREVER,
            train_batch_size_samples=len(self.tensors["values"]),
            lr_end=3e-5,  # it must be given, though a constant rate has no end
            device=self.task.device,
            autocast=self.task.dtype == "bfloat16",
        )
        trainer = import_module("sae_lens.training.sae_trainer").SAETrainer
        with suppress(StopIteration):  # fit asks for the next batch whatever comes
            trainer(settings, self.sae, batches).fit()

    def weights(self) -> Tensors:
        """The module's weights, with the decoder norms folded into the encoder."""
        sae = self.sae
        norms = sae.W_dec.norm(dim=1)
        return copies(
            W_enc=sae.W_enc.T * norms[:, None],
            b_enc=sae.b_enc * norms,
            W_dec=sae.W_dec / norms[:, None],
            b_dec=sae.b_dec,
        )

    def encoder(self) -> torch.Tensor:
        """The encoder's parameter [D, F]."""
        W_enc: torch.Tensor = self.sae.W_enc
        return W_enc

    def rows(self, parameter: torch.Tensor) -> torch.Tensor:
        """Its columns are the latents."""
        return parameter.T


contestant = SAELens
