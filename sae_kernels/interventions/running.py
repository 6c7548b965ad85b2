"""Edits inside a running transformers model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from sae_kernels.config.places import activation_facts
from sae_kernels.errors import ModelError, name_hint
from sae_kernels.harvest.model import layer_device, resolve_layer
from sae_kernels.harvest.splice import check_fits, frozen, splice
from sae_kernels.interventions.bank import EditBank
from sae_kernels.interventions.edits import Edit
from sae_kernels.interventions.feed import Feed, followed
from sae_kernels.interventions.plan import plan_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

    from sae_kernels.nn.inference import AnySAE


@contextmanager
def intervene(
    model: nn.Module,
    saes: Mapping[str, AnySAE | None],
    edits: Sequence[Edit] | Mapping[str, Sequence[Edit]],
    *,
    skip_first: int = 0,
    skip_tokens: Sequence[int] = (),
) -> Iterator[dict[str, EditBank]]:
    """Within the block, a model runs with edits of its SAEs' latents, in ``generate`` too.

    A layer's output x becomes ``x + decode(edited) - decode(codes)``, so what the SAE does not
    reconstruct stays, and tokens without an edit keep their bits. Padding is never edited. Beams
    and several returned sequences of a row have the edits of the row. When the block ends, however
    it ends, the model is as it was.

    Args:
        model: a causal transformers model: what is called in the block, itself or its ``generate``.
        saes: the SAE of each layer by dotted path, such as "layers.6" (see
            :func:`~sae_kernels.harvest.resolve_layer`); None for a layer that is only steered.
        edits: of the layer, or a list for each layer; see :class:`Edit`.
        skip_first: tokens at the start of each row that are left alone, as BOS; 1 in many models.
        skip_tokens: ids of tokens that are left alone, such as ``tokenizer.all_special_ids``.

    Yields:
        The bank of each layer: line i has the edits of row i as far as any edit names rows, the
        last line those of all rows. Writing to it changes the edits of the next forward pass.

    Raises:
        ModelError: an unknown layer, one that puts out no tensor [B, S, D], or an SAE that was
            trained on another layer.
        ValueError: an unknown latent, a row outside of the batch, an SAE of another width.

    Example:
        >>> import pytest, torch
        >>> from sae_kernels.interventions import set_to
        >>> from sae_kernels.nn import TopKSAE
        >>> transformers = pytest.importorskip("transformers")
        >>> config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2)
        >>> model, sae = transformers.GPT2LMHeadModel(config).eval(), TopKSAE(8, 32, k=4)
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> with torch.no_grad(), intervene(model, {"h.0": sae}, [set_to(7, 9.0, at=[1])]):
        ...     edited = model(ids).logits
        >>> (edited != model(ids).logits).any(-1).tolist()
        [[False, True, True]]
    """
    of_layer = _by_layer(saes, edits)
    banks: dict[str, EditBank] = {}
    for layer, sae in saes.items():
        _check_place(model, layer, sae)
        banks[layer] = bank = bank_of(sae, of_layer.get(layer, ()))
        if sae is None:
            bank.to(layer_device(model, layer))
    named = max(
        [row + 1 for some in of_layer.values() for e in some for row in e.rows or ()] or [0]
    )
    with ExitStack() as hooks:
        feed = hooks.enter_context(followed(model, tuple(saes)))
        for layer, bank in banks.items():
            if bank.sae is not None:
                hooks.enter_context(frozen(bank.sae))
            edit = _at_layer(layer, bank, feed, named, skip_first, tuple(skip_tokens))
            hooks.enter_context(splice(model, layer, edit))
        yield banks


def bank_of(sae: AnySAE | None, edits: Sequence[Edit]) -> EditBank:
    """A bank just large enough for these edits: a line for each row that they name, one for all."""
    named = max([row + 1 for edit in edits for row in edit.rows or ()] or [0])
    lines = [
        [edit for edit in edits if edit.rows is None or row in edit.rows] for row in range(named)
    ]
    lines.append([edit for edit in edits if edit.rows is None])
    vectors = [edit.vector for edit in edits if edit.vector is not None]
    if sae is None and not vectors:
        raise ValueError("edits: expected steer alone for a layer without an SAE, got other edits")
    width = vectors[0].shape[0] if sae is None else sae.config.input_width
    plans = [plan_of(line, sae, width) for line in lines]
    pools = [slot.pool.shape[0] for plan in plans for slot in plan.slots if slot.pool is not None]
    if len(set(pools)) > 1:
        raise ValueError(
            f"resample: expected codes of one number of tokens, got {sorted(set(pools))}"
        )
    bank = EditBank(
        sae,
        len(lines),
        max(len(plan.slots) for plan in plans),
        max(len(plan.directions) for plan in plans),
        keeps_only=any(edit.keeps_only for edit in edits),
        pool_size=max(pools, default=0),
        width=width,
        dtype=torch.float64 if any(v.dtype == torch.float64 for v in vectors) else torch.float32,
    )
    for number, line in enumerate(lines):
        bank.write(number, line)
    return bank


def _at_layer(
    layer: str,
    bank: EditBank,
    feed: Feed,
    named: int,
    skip_first: int,
    skip_tokens: tuple[int, ...],
) -> Callable[[Tensor], Tensor]:
    """What replaces a layer's output."""

    def edit(x: Tensor) -> Tensor:
        feed.expect(x, layer)
        check_fits(bank.sae, x.shape[1], layer)
        if named > feed.n_rows:
            raise ValueError(
                f"rows: expected edits of rows 0 to {feed.n_rows - 1} of the batch, got one of row "
                f"{named - 1}"
            )
        active = feed.attended & (feed.positions >= skip_first)
        if skip_tokens:
            if feed.ids is None:
                raise ValueError(
                    "skip_tokens: expected a model that is fed ids, it is fed embeddings"
                )
            special = torch.tensor(skip_tokens, device=feed.ids.device)
            active = active & ~torch.isin(feed.ids, special)
        told = (
            feed.rows.clamp(max=bank.n_requests - 1),
            feed.positions,
            feed.prompt_lengths,
            active,
        )
        rows, positions, lengths, active = (numbers.to(x.device) for numbers in told)
        edited: Tensor = bank(x, rows, positions, prompt_lengths=lengths, active=active)
        return edited

    return edit


def _by_layer(
    saes: Mapping[str, AnySAE | None],
    edits: Sequence[Edit] | Mapping[str, Sequence[Edit]],
) -> Mapping[str, Sequence[Edit]]:
    for each in edits.values() if isinstance(edits, Mapping) else (edits,):
        if not isinstance(each, Sequence) or not all(isinstance(edit, Edit) for edit in each):
            raise ValueError(
                "edits: expected a list of scale(...), steer(...) and the like, got "
                f"{type(each).__name__} {each!r:.60}"
            )
    if isinstance(edits, Mapping):
        for layer in edits:
            if layer not in saes:
                raise ValueError(
                    f"edits: expected layers that have an SAE, got {layer!r}; "
                    f"{name_hint(layer, saes)}"
                )
        return edits
    if len(saes) != 1:
        raise ValueError(
            f"edits: expected a list for each layer by its name, got one for {len(saes)} layers"
        )
    return {next(iter(saes)): edits}


def _check_place(model: nn.Module, layer: str, sae: AnySAE | None) -> None:
    """Checks that the SAE's record of where it was trained is of this layer, if it is of any."""
    module = resolve_layer(model, layer)
    recorded = activation_facts(getattr(sae, "metadata", {})).get("layer")
    if isinstance(recorded, str):
        try:
            trained_on = resolve_layer(model, recorded)
        except ModelError:
            return  # of another model, with other names
        if trained_on is not module:
            raise ModelError(f"{layer}: expected an SAE of this layer, got one of {recorded}")
