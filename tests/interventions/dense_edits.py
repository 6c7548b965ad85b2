"""Edits as one would write them on dense codes, a token at a time: the slow twin."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sae_kernels.interventions import Edit
    from sae_kernels.nn import SparseAutoencoder

D, F, LAYERS, VOCABULARY = 16, 48, 3, 30


class Place(NamedTuple):
    """Where a token stands."""

    row: int = 0
    position: int = 0
    prompt_length: int = 1


def applies(edit: Edit, place: Place) -> bool:
    """Whether an edit reaches a token, whatever fires in it."""
    if edit.rows is not None and place.row not in edit.rows:
        return False
    P = place.prompt_length
    return any(
        start + from_end * P <= place.position < stop + stop_from_end * P
        for start, from_end, stop, stop_from_end in edit.spans
    )


def edit_dense(codes: Tensor, edits: Sequence[Edit], place: Place) -> Tensor:
    """The dense codes [F] of a token after its edits, each of which sees the codes before all."""
    edited = codes.clone()
    of_row = [e for e in edits if e.rows is None or place.row in e.rows]
    own = {latent for edit in of_row for latent in edit.latents}
    for edit in edits:
        if edit.keeps_only and applies(edit, place):
            for latent in range(len(codes)):
                if latent not in own:
                    edited[latent] = 0
    for edit in edits:
        if not applies(edit, place) or (edit.when >= 0 and codes[edit.when] == 0):
            continue
        for i, (latent, (factor, shift, low, high)) in enumerate(
            zip(edit.latents, edit.changes, strict=True)
        ):
            if edit.pools is not None:
                donor = (place.position * 7919 + place.row * 104729) % edit.pools.shape[1]
                shift = float(edit.pools[i, donor])
            if not edit.keeps_only:
                edited[latent] = min(max(factor * float(codes[latent]) + shift, low), high)
    return edited


def edit_all(codes: Tensor, edits: Sequence[Edit], places: Sequence[Place]) -> Tensor:
    """:func:`edit_dense` of every token of [T, F]."""
    pairs = zip(codes, places, strict=True)
    return torch.stack([edit_dense(row, edits, place) for row, place in pairs])


def edit_activation(
    sae: SparseAutoencoder | None, x: Tensor, edits: Sequence[Edit], place: Place
) -> Tensor:
    """An activation [D] after its edits: ``x + (edited - codes) W_dec / scale + directions``."""
    moved = x
    for edit in edits:
        if edit.vector is not None and applies(edit, place):
            moved = moved + edit.vector.to(x.dtype)
    if sae is None:
        return moved
    codes = sae.encode(x[None]).to_dense()[0]
    change = edit_dense(codes, edits, place) - codes
    return moved + change @ sae.W_dec / sae.target_scale


def causal_model(**changes: Any) -> Any:
    """A random GPT-2 in fp64: unlike Llama's, its norms and positions stay in fp64."""
    import transformers

    torch.manual_seed(0)
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "n_embd": D,
        "n_layer": LAYERS,
        "n_head": 2,
        "n_positions": 64,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options | changes))
    return model.eval().double()


class Block(nn.Module):
    """A block whose output a function of (row's hidden states [S, D]) replaces."""

    def __init__(self, block: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self.function = block, function

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.block(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        changed = torch.stack([self.function(row) for row in first])
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def logits_by_hand(ids: Tensor, functions: dict[int, Callable[[Tensor], Tensor]]) -> Tensor:
    """Logits [S, V] of one row without padding or cache, with blocks exchanged by hand."""
    model = causal_model()
    for number, function in functions.items():
        model.transformer.h[number] = Block(model.transformer.h[number], function)
    with torch.no_grad():
        logits: Tensor = model(ids[None], use_cache=False).logits[0]
    return logits
