"""Reading sparse codes inside a running transformers model."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from sae_kernels.harvest.splice import check_fits, frozen, splice
from sae_kernels.interventions.feed import followed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from sae_kernels.codes import SparseCodes
    from sae_kernels.interventions.feed import Feed
    from sae_kernels.nn.inference import AnySAE


class Watch:
    """The codes of the latest forward pass of a watched model; those before it are not kept.

    Attributes:
        codes: by layer, of the batch [B, S] that the model was fed: S is the prompt's length at the
            first pass of ``generate``, 1 at every decoded token after it.
        positions: int64 [B, S], each token's position in its row, padding not counted.
        attended: bool [B, S], false for padding, whose codes mean nothing.
        passes: forward passes until now.
    """

    codes: dict[str, SparseCodes]
    positions: Tensor
    attended: Tensor

    def __init__(self) -> None:
        self.codes = {}
        self.passes = 0


@contextmanager
def watch(
    model: nn.Module,
    saes: Mapping[str, AnySAE],
    each: Callable[[Watch], object] | None = None,
) -> Iterator[Watch]:
    """Within the block, a model's layers are read as sparse codes at every forward pass.

    The model computes what it does without; memory does not grow with the tokens decoded. With
    beams, rows are the beams as the model has them at that pass. A ``watch`` inside an
    ``intervene`` reads edited layers, one around it those before the edit.

    Args:
        model: a causal transformers model: what is called in the block, itself or its ``generate``.
        saes: the SAE of each layer by dotted path.
        each: called after every forward pass, that is at every decoded token, with the same
            :class:`Watch` that the block has.

    Raises:
        ModelError: an unknown layer, or one that puts out no tensor [B, S, D].
        ValueError: an SAE of another width.

    Example:
        >>> import pytest
        >>> from sae_kernels.nn import TopKSAE
        >>> transformers = pytest.importorskip("transformers")
        >>> config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2)
        >>> model, sae = transformers.GPT2LMHeadModel(config).eval(), TopKSAE(8, 32, k=4)
        >>> seen = []
        >>> with watch(model, {"h.0": sae}, lambda now: seen.append(now.codes["h.0"])):
        ...     _ = model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, eos_token_id=None)
        >>> [tuple(codes.values.shape) for codes in seen]
        [(1, 2, 4), (1, 1, 4), (1, 1, 4)]
    """
    watched = Watch()

    def at_layer(layer: str, sae: AnySAE, feed: Feed) -> Callable[[Tensor], Tensor]:
        def read(x: Tensor) -> Tensor:
            B, S = feed.expect(x, layer)
            check_fits(sae, x.shape[1], layer)
            with torch.no_grad():
                watched.codes[layer] = sae.encode(x.detach().view(B, S, -1))
            return x

        return read

    def finished(feed: Feed) -> None:
        B, S = feed.shape or (0, 0)
        watched.positions = feed.positions.view(B, S)
        watched.attended = feed.attended.view(B, S)
        watched.passes += 1
        if each is not None:
            each(watched)

    with ExitStack() as hooks:
        feed = hooks.enter_context(followed(model, tuple(saes), finished))
        for layer, sae in saes.items():
            hooks.enter_context(frozen(sae))
            hooks.enter_context(splice(model, layer, at_layer(layer, sae, feed)))
        yield watched
