"""Running a model on chunks of tokens and collecting layer outputs as rows."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sae_kernels.errors import ModelError
from sae_kernels.harvest.chunks import Chunk, by_length
from sae_kernels.harvest.limits import check_ids, padding_id, probe
from sae_kernels.harvest.model import input_device, layer_outputs, resolve_layer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class LayerRows:
    """Runs a model on windows of chunks and gives a layer's rows [n, D], one per kept token.

    Rows of several layers are concatenated in the given order; D is the sum of their widths.

    Args:
        model: put in evaluation mode; it stays on its devices.
        tokenizer: for the padding id.
        layers: dotted paths of modules whose output, or its first element, is [batch, length, D].
        batch_size: chunks of full length in a forward pass.
        context_length: tokens in a chunk of full length.
        autocast: run the model in this dtype.

    Attributes:
        layers: as given.
        widths: the width of each layer's output.
        d_in: D.
        device: the model's; of several, that of its embedding, where the rows come together.

    Raises:
        ModelError: an unknown layer, one with another output, or what the model cannot run.
        ValueError: no layers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Sequence[str],
        batch_size: int,
        context_length: int,
        autocast: torch.dtype | None,
    ) -> None:
        if not layers:
            raise ValueError("layer: expected the dotted path of at least one module, got none")
        self._model, self._tokenizer, self.layers = model, tokenizer, tuple(layers)
        self._modules = [resolve_layer(model, layer) for layer in layers]
        self._budget, self._autocast = batch_size * context_length, autocast
        self._pad = padding_id(model, tokenizer)
        self._alone = Lock()  # hooks in a model would meet those of another thread
        self.device = input_device(model)
        # One sequence of full length finds the widths, and errors before any work is done.
        outputs = probe(self._one_sequence, model, layers, context_length)
        self.widths = tuple(rows.shape[1] for rows in outputs)
        self.d_in = sum(self.widths)

    def batches(self, window: list[Chunk]) -> list[list[int]]:
        """The batches in which the model reads a window: the chunks' numbers in it."""
        return list(by_length(window, self._budget))

    def fill(
        self,
        window: list[Chunk],
        out: Tensor,
        progress: Callable[[int], object] | None = None,
        batches: list[list[int]] | None = None,
    ) -> Tensor:
        """Writes a window's rows [n, D] in the order of the text to the start of ``out``.

        Args:
            window: the chunks.
            out: at least as many rows.
            progress: called with the number of new rows.
            batches: some of :meth:`batches`, whose rows alone are written; None: all.
        """
        batches = self.batches(window) if batches is None else batches
        some = sorted(i for batch in batches for i in batch)
        for i in some:
            check_ids(self._model, self._tokenizer, window[i])
        counts = [window[i].rows for i in some]
        pieces = torch.arange(sum(counts), device=out.device).split(counts)
        places = dict(zip(some, pieces, strict=True))
        for batch in batches:
            rows = torch.cat(self._forward([window[i] for i in batch]), dim=1)
            out[torch.cat([places[i] for i in batch])] = rows.to(out.device, out.dtype)
            if progress is not None:
                progress(len(rows))
        return out[: sum(counts)]

    def _one_sequence(self, length: int) -> list[Tensor]:
        """The rows of a sequence of one token, not the padding's, which may have no position."""
        ids = torch.full((length,), int(self._pad == 0))
        return self._forward([Chunk(0, ids, torch.ones(length, dtype=torch.bool), length)])

    def _forward(self, batch: list[Chunk]) -> list[Tensor]:
        """The rows [n, width] of each layer for a batch of chunks, concatenated."""
        ids = pad_sequence(
            [chunk.ids for chunk in batch], batch_first=True, padding_value=self._pad
        )
        kept = pad_sequence([chunk.kept for chunk in batch], batch_first=True)
        lengths = torch.tensor([len(chunk.ids) for chunk in batch])
        attended = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        inputs = {"input_ids": ids.to(self.device), "attention_mask": attended.to(self.device)}
        self._model.eval()
        with (
            self._alone,
            torch.inference_mode(),
            torch.autocast(
                self.device.type, dtype=self._autocast, enabled=self._autocast is not None
            ),
        ):
            outputs = layer_outputs(self._model, self._modules, **inputs)
            for layer, output in zip(self.layers, outputs, strict=True):
                if output.ndim != 3 or output.shape[:2] != ids.shape:
                    raise ModelError(
                        f"{layer}: expected a layer that puts out "
                        f"[{', '.join(map(str, ids.shape))}, D], got {list(output.shape)}; choose "
                        "a whole block of the model"
                    )
            return [output[kept.to(output.device)].to(self.device) for output in outputs]
