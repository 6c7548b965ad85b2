"""The direct effect of latents on a model's predictions: W_dec W_U."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sae_kernels.errors import ModelError
from sae_kernels.primitives import checks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.nn.inference import AnySAE

_BLOCK = 1 << 24  # effects in a block of [latents, V]


class LatentEffects(NamedTuple):
    """The tokens that latents promote and suppress most, strongest first.

    Attributes:
        promoted, suppressed: int64 [n, k], token ids.
        promoted_by, suppressed_by: [n, k], the change of the token's logit for a latent of value 1
            that is read out directly, less the mean over all tokens.
    """

    promoted: Tensor
    promoted_by: Tensor
    suppressed: Tensor
    suppressed_by: Tensor


def latent_effects(
    sae: AnySAE,
    model: nn.Module,
    latents: Sequence[int] | Tensor | None = None,
    *,
    k: int = 10,
) -> LatentEffects:
    """The tokens that latents promote and suppress if nothing but the unembedding reads them.

    ``effects = W_dec W_U``, computed in blocks of latents; [F, V] is never held. The final norm of
    the model, which scales and in some models weighs the coordinates, is left out.

    Args:
        sae: of a layer of the model's residual stream.
        model: a transformers model with a language-model head.
        latents: n of them; None is all F.
        k: tokens of each kind.

    Raises:
        ModelError: a model without an unembedding.
        ValueError: an SAE of another width, or an unknown latent.

    Example:
        >>> import pytest
        >>> from sae_kernels.nn import TopKSAE
        >>> transformers = pytest.importorskip("transformers")
        >>> config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> latent_effects(TopKSAE(8, 32, k=4), model, k=3).promoted.shape
        torch.Size([32, 3])
    """
    W_U, W_dec = _unembedding(model, sae), sae.W_dec.detach()
    if latents is not None:
        W_dec = W_dec[checks.latents(latents, len(W_dec)).to(W_dec.device)]
    V = W_U.shape[0]
    k = min(k, V)
    parts: list[tuple[Tensor, ...]] = []
    for rows in W_dec.split(max(1, _BLOCK // V)):
        effects = _effects(rows, W_U, sae)
        high, low = effects.topk(k), effects.topk(k, largest=False)
        parts.append((high.indices, high.values, low.indices, low.values))
    return LatentEffects(*(torch.cat(column) for column in zip(*parts, strict=True)))


class DirectEffects:
    """A ``transformers.LogitsProcessor`` that adds latents' direct effects to the logits.

    Steers what is said next without touching the hidden states: at every step
    ``logits += strengths @ (W_dec W_U)``, one addition for the whole batch; the effects are
    computed once, here.

    Args:
        sae, model: as of :func:`latent_effects`.
        latents: n of them.
        strengths: [n] for all rows, or [B, n], a value for each row of the batch (its beams,
            if any, share it).

    Raises:
        ModelError, ValueError: as :func:`latent_effects`; strengths of another shape.

    Example:
        >>> import pytest
        >>> from sae_kernels.nn import TopKSAE
        >>> transformers = pytest.importorskip("transformers")
        >>> config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> processor = DirectEffects(TopKSAE(8, 32, k=4), model, [3], torch.tensor([50.0]))
        >>> model.generate(
        ...     torch.tensor([[1, 2]]), logits_processor=[processor], max_new_tokens=2
        ... ).shape
        torch.Size([1, 4])
    """

    def __init__(
        self,
        sae: AnySAE,
        model: nn.Module,
        latents: Sequence[int] | Tensor,
        strengths: Tensor,
    ) -> None:
        W_U, chosen = _unembedding(model, sae), checks.latents(latents, sae.config.n_latents)
        if strengths.dim() not in (1, 2) or strengths.shape[-1] != len(chosen):
            raise ValueError(
                f"strengths: expected [{len(chosen)}], or a row of it for each row of the batch, "
                f"got {list(strengths.shape)}"
            )
        effects = _effects(sae.W_dec.detach()[chosen.to(sae.W_dec.device)], W_U, sae)
        self.added = strengths.to(effects.device, effects.dtype).reshape(-1, len(chosen)) @ effects

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The logits [B, V] of a step with the effects added."""
        rows, given = len(scores), len(self.added)
        if rows % given:
            raise ValueError(
                f"strengths: expected those of the {rows} rows of the batch, got {given}"
            )
        added = self.added.to(scores.device).repeat_interleave(rows // given, 0)
        return scores + added.to(scores.dtype)


def _effects(rows: Tensor, W_U: Tensor, sae: AnySAE) -> Tensor:
    """Effects [n, V] of latents' decoder rows [n, D], each less its mean."""
    high = torch.promote_types(rows.dtype, torch.float32)
    effects = (rows.to(high) / sae.target_scale) @ W_U.to(rows.device, high).T
    return effects - effects.mean(1, keepdim=True)


def _unembedding(model: nn.Module, sae: AnySAE) -> Tensor:
    """The weight [V, D] of a model's head."""
    get = getattr(model, "get_output_embeddings", None)
    weight = getattr(get() if get is not None else None, "weight", None)
    if not isinstance(weight, Tensor):
        raise ModelError(
            f"expected a model with a language-model head, {type(model).__name__} has none; load "
            "it with load_causal_model"
        )
    if weight.shape[1] != sae.config.output_width:
        raise ValueError(
            f"expected an SAE as wide as what the head reads, {weight.shape[1]}, got "
            f"{sae.config.output_width}"
        )
    return weight.detach()
