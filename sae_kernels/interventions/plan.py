"""The lines of a bank that a request's edits need."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.interventions.edits import ENDLESS, Change, Edit, Span

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.nn.inference import AnySAE

_EVERYWHERE, NOWHERE = Span(0, 0, ENDLESS, 0), Span(0, 0, 0, 0)


class Slot(NamedTuple):
    """One latent's edit in one span of positions, a line of the bank."""

    latent: int
    change: Change
    span: Span
    when: int = -1
    pool: Tensor | None = None


class Plan(NamedTuple):
    """What one request needs: slots of latents, and spans with the directions added in each."""

    slots: list[Slot]
    directions: dict[Span, Tensor]
    keep_only: Span


def plan_of(edits: Sequence[Edit], sae: AnySAE | None, width: int) -> Plan:
    """The slots and directions of a request with these edits.

    Raises:
        ValueError: see :meth:`EditBank.write`.
    """
    slots: list[Slot] = []
    directions: dict[Span, Tensor] = {}
    keep_only = NOWHERE
    keeping = [edit for edit in edits if edit.keeps_only]
    if len(keeping) > 1 or any(len(edit.spans) > 1 for edit in keeping):
        raise ValueError("keep_only: expected one in a row, at all positions or one run of them")

    def move(span: Span, vector: Tensor) -> None:
        vector = vector.detach().to(torch.promote_types(vector.dtype, torch.float32))
        if span in directions:
            vector = vector + directions[span].to(vector.device)
        directions[span] = vector

    for edit in edits:
        for latent in (*edit.latents, *([edit.when] if edit.when >= 0 else [])):
            known = 0 if sae is None else sae.config.n_latents
            if not latent < known:
                said = f"from 0 to {known - 1} (n_latents - 1)" if sae else "none without an SAE"
                raise ValueError(f"latent: expected {said}, got {latent}")
        if edit.vector is not None and edit.vector.shape[0] != width:
            raise ValueError(
                f"vector: expected a direction of width {width}, got {edit.vector.shape[0]}"
            )
        keep_only = edit.spans[0] if edit.keeps_only else keep_only
        for span in edit.spans:
            if edit.vector is not None:
                move(span, edit.vector)
            for i, (latent, change) in enumerate(zip(edit.latents, edit.changes, strict=True)):
                pool = None if edit.pools is None else edit.pools[i]
                place = _EVERYWHERE if edit.keeps_only else span
                slots.append(Slot(latent, change, place, edit.when, pool))
    own = [slot for slot in slots if slot.change != Change()]
    _refuse_conflicts(own)
    edited = {slot.latent for slot in own}
    kept = [slot for slot in slots if slot.change == Change() and slot.latent not in edited]
    if not keeping and sae is not None:
        # An amount added whatever the codes are is a direction.
        for slot in [slot for slot in own if _is_direction(slot)]:
            move(slot.span, sae.W_dec[slot.latent] * (slot.change.shift / sae.target_scale))
        own = [slot for slot in own if not _is_direction(slot)]
    return Plan(own + (kept if keeping else []), directions, keep_only)


def _is_direction(slot: Slot) -> bool:
    factor, _, low, high = slot.change
    return slot.when < 0 and factor == 1 and low == -math.inf and high == math.inf


def _refuse_conflicts(slots: list[Slot]) -> None:
    for i, one in enumerate(slots):
        for other in slots[:i]:
            apart = one.span.before(other.span) or other.span.before(one.span)
            if one.latent == other.latent and not apart:
                raise ValueError(
                    f"latent {one.latent}: expected one edit of it at a position, got two; make "
                    "them one, or place them at different positions"
                )
