"""Contestant sparsify (EleutherAI): its Trainer, on a model whose activations are our batches."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .contestant import Contestant, Task, Tensors, Unable, copies, fill

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "eai-sparsify"
DIFFERS = (
    "the squared error is divided by the batch's variance; sign descent with schedule-free "
    "averages (signum, its default) keeps one state a weight where Adam keeps two; no clipping, "
    "AuxK off, as is its default; the host reads the loss at every step; encoder gradients go by "
    "way of [B, k, D]. On a GPU its forward pass is always under bf16 autocast and its fp32 "
    "products are TF32. For bf16 on a CPU the same autocast is put around its forward pass; its "
    "decoder is torch's embedding_bag there, as its Triton kernels need a GPU"
)

_LAYER, _FOREVER = "layer", 2**40


class Sparsify(Contestant):
    """``sparsify.Trainer.fit`` as shipped: signum, one sequence of B tokens per batch."""

    def __init__(self, task: Task, tensors: Tensors) -> None:
        super().__init__(task, tensors)
        _check(task)
        if task.device == "cpu":  # read when sparsify is imported
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        self._model = _Model(tensors["b_dec"])
        self._trainer = _trainer(task, tensors, self._model)
        self.sae = self._trainer.saes[_LAYER]
        fill(self.parts(), tensors)
        if (task.device, task.dtype, task.mode) == ("cpu", "bfloat16", "step"):
            autocast = torch.autocast("cpu", torch.bfloat16)
            self.sae.forward = autocast(self.sae.forward)  # as its decorator does on a GPU

    def encode(self, x: torch.Tensor) -> Any:
        """Values, indices and all scores."""
        return self.sae.encode(x)

    def decode(self) -> torch.Tensor:
        """Reconstruction of the given codes."""
        x_hat: torch.Tensor = self.sae.decode(self.tensors["values"], self.tensors["indices"])
        return x_hat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Encode and decode; the module's own forward also computes losses."""
        values, indices, _ = self.sae.encode(x)
        x_hat: torch.Tensor = self.sae.decode(values, indices)
        return x_hat

    def train(self, batches: Iterator[torch.Tensor]) -> None:
        """Trains by ``fit``, which sets b_dec to the mean of the first batch."""
        self._trainer.dataset = _Dataset(batches, self._model)
        with suppress(_OutOfBatchesError):
            self._trainer.fit()

    def dense(self, codes: Any) -> torch.Tensor:
        """Codes as a matrix [B, F]."""
        values, indices, scores = codes
        return torch.zeros_like(scores).scatter(1, indices, values)

    def weights(self) -> Tensors:
        """The module's weights with decoder rows of norm 1, as its trainer normalises them."""
        self.sae.set_decoder_norm_to_unit_norm()
        return super().weights()

    def finished(self) -> Tensors:
        """The averages of a schedule-free optimizer, as they are in its checkpoints."""
        averaging = [each for each in self._trainer.optimizers if hasattr(each, "eval")]
        for optimizer in averaging:
            optimizer.eval()
        found = copies(**self.parts())
        for optimizer in averaging:
            optimizer.train()
        return found

    def parts(self) -> Tensors:
        """The module's weights."""
        encoder, sae = self.sae.encoder, self.sae
        weights = {"W_enc": encoder.weight, "b_enc": encoder.bias}
        return {**weights, "W_dec": sae.W_dec, "b_dec": sae.b_dec}


class _Model(nn.Module):
    """A stand-in for the language model, whose only layer outputs our batch."""

    def __init__(self, like: torch.Tensor) -> None:
        super().__init__()
        self.add_module(_LAYER, nn.Identity())
        self.activations = like[None]  # one token, by which the trainer finds the width
        self.device = like.device
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long)}

    @property
    def base_model(self) -> nn.Module:
        """The module that holds the layers."""
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The current batch as the activations [1, B, D] of one sequence."""
        x: torch.Tensor = self.get_submodule(_LAYER)(self.activations[None])
        return x


class _Dataset:
    """A data set of dummy sequences; reading one passes the next batch to the model."""

    def __init__(self, batches: Iterator[torch.Tensor], model: _Model) -> None:
        self._batches, self._model = batches, model

    def __len__(self) -> int:
        return _FOREVER

    def __getitem__(self, _: int) -> dict[str, torch.Tensor]:
        try:
            self._model.activations = next(self._batches)
        except StopIteration:
            raise _OutOfBatchesError from None
        return {"input_ids": torch.zeros(len(self._model.activations), dtype=torch.long)}

    def select(self, _: range) -> _Dataset:
        """The sequences that remain after an earlier ``fit``."""
        return self


class _OutOfBatchesError(Exception):
    """Raised to leave ``fit`` before it saves to the working directory."""


def _check(task: Task) -> None:
    if task.architecture != "topk":
        raise Unable(f"eai-sparsify has TopK and GroupMax SAEs, none of {task.architecture}")
    if task.device == "cuda" and task.mode == "step":
        own = "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
        if task.dtype != own:
            raise Unable(f"eai-sparsify always trains in {own} on this GPU")


def _trainer(task: Task, tensors: Tensors, model: _Model) -> Any:
    sparsify = import_module("sparsify")
    sae = sparsify.SparseCoderConfig(num_latents=len(tensors["W_enc"]), k=task.k)
    config = sparsify.TrainConfig(
        sae, batch_size=1, hookpoints=[_LAYER], log_to_wandb=False, save_every=_FOREVER
    )
    return sparsify.Trainer(config, _Dataset(iter(()), model), model)


contestant = Sparsify
