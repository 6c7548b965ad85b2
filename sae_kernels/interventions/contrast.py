"""Contrastive directions: mean differences of activations between paired prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sae_kernels.errors import ModelError
from sae_kernels.harvest.model import input_device
from sae_kernels.harvest.splice import clean_logits, frozen, record
from sae_kernels.harvest.tokens import TokenBatch
from sae_kernels.io.files import publish
from sae_kernels.io.tensor_files import read_safetensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sae_kernels.nn.inference import AnySAE


class LatentCosines(NamedTuple):
    """Latents whose decoder rows lie closest to a direction.

    Attributes:
        latents: int64 [k], the closest first.
        cosines: [k], of decoder row and direction.
    """

    latents: Tensor
    cosines: Tensor


def contrast(
    model: nn.Module,
    layers: Sequence[str],
    positive: TokenBatch | Tensor | Mapping[str, Tensor],
    negative: TokenBatch | Tensor | Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The mean difference of layers' outputs between paired prompts, at their last tokens.

    ``v = mean_i(x(positive_i) - x(negative_i))``: contrastive activation addition (Panickssery et
    al., arXiv 2312.06681) steers with it, see :func:`steer`.

    Args:
        model: a causal transformers model; left as it was.
        layers: dotted paths.
        positive, negative: as many prompts each, a pair a row: token ids [B, S], or what a
            tokenizer gives, padded on either side. The two may differ in length.

    Returns:
        By layer, the direction [D] in fp32 (fp64 for fp64), on the layer's device.

    Raises:
        ModelError: an unknown layer, or one that puts out no tensor [B, S, D].
        ValueError: not as many positive as negative prompts; one layer in place of a list.

    Example:
        >>> import pytest
        >>> transformers = pytest.importorskip("transformers")
        >>> config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> contrast(model, ["h.0"], torch.tensor([[1, 2]]), torch.tensor([[1, 3]]))["h.0"].shape
        torch.Size([8])
    """
    if isinstance(layers, str):
        raise ValueError(f"layers: expected a list of paths of layers, got {layers!r}")
    pair = [TokenBatch.of(prompts) for prompts in (positive, negative)]
    counts = [len(batch.input_ids) for batch in pair]
    if counts[0] != counts[1]:
        raise ValueError(
            f"expected as many positive as negative prompts, a pair a row, got {counts[0]} and "
            f"{counts[1]}"
        )
    sides = [_last_tokens(model, layers, batch) for batch in pair]
    return {layer: (sides[0][layer] - sides[1][layer]).mean(0) for layer in layers}


def _last_tokens(model: nn.Module, layers: Sequence[str], batch: TokenBatch) -> dict[str, Tensor]:
    """Outputs [B, D] of layers at each row's last attended token."""
    batch = batch.to(input_device(model))
    with frozen(model), torch.no_grad(), record(model, tuple(layers)) as outputs:
        clean_logits(model, batch)
    columns = torch.arange(batch.input_ids.shape[1], device=batch.input_ids.device)
    last = torch.where(batch.attention_mask, columns, -1).amax(1)
    rows = torch.arange(len(last), device=last.device)
    found = {}
    for layer in layers:
        if layer not in outputs:
            raise ModelError(
                f"{layer}: expected a layer that runs, it did not; choose a whole block"
            )
        x = outputs[layer]
        found[layer] = x[rows.to(x.device), last.to(x.device)]
        found[layer] = found[layer].to(torch.promote_types(x.dtype, torch.float32))
    return found


def save_directions(path: str | Path, directions: Mapping[str, Tensor]) -> None:
    """Writes directions by layer, [D] each, to a safetensors file that appears whole."""
    tensors = {layer: vector.detach().cpu().contiguous() for layer, vector in directions.items()}
    publish(Path(path), lambda partial: save_file(tensors, partial))


def load_directions(path: str | Path) -> dict[str, Tensor]:
    """Reads the directions that :func:`save_directions` wrote, on the CPU.

    Raises:
        DataError: a missing or damaged file.
        ValueError: a tensor in it that is no direction.
    """
    directions = read_safetensors(Path(path))
    for layer, vector in directions.items():
        if vector.dim() != 1 or not vector.is_floating_point():
            raise ValueError(
                f"{path}: {layer}: expected a direction [D], got {vector.dtype} "
                f"{list(vector.shape)}"
            )
    return directions


def closest_latents(sae: AnySAE, vector: Tensor, k: int = 10) -> LatentCosines:
    """The latents whose decoder rows have the largest cosines with a direction [D].

    Raises:
        ValueError: a direction of another width.

    Example:
        >>> from sae_kernels.nn import TopKSAE
        >>> sae = TopKSAE(8, 32, k=4)
        >>> closest_latents(sae, sae.W_dec[5], k=2).latents[0].item()
        5
    """
    width = sae.config.output_width
    if vector.shape != (width,):
        raise ValueError(f"vector: expected a direction [{width}], got {list(vector.shape)}")
    W = sae.decoder_rows().detach()
    norms = torch.linalg.vector_norm(W, dim=1) * torch.linalg.vector_norm(vector)
    cosines = (W @ vector.detach().to(W.device, W.dtype)) / norms.clamp(
        min=torch.finfo(W.dtype).tiny
    )
    best = cosines.topk(min(k, len(W)))
    return LatentCosines(best.indices, best.values)
