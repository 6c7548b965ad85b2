"""What edits do to sparse codes: the entries that change, and the edited codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.codes import SparseCodes

if TYPE_CHECKING:
    from sae_kernels.interventions.bank import EditBank


class Tokens(NamedTuple):
    """Whose the tokens are, and where they stand.

    Attributes:
        requests: int64 [T], the line of the bank with the token's edits.
        positions: int64 [T], in the token's sequence, padding not counted.
        prompt_lengths: int64 [T], of the token's sequence.
        active: bool [T], tokens that edits may reach; None is all of them.
    """

    requests: Tensor
    positions: Tensor
    prompt_lengths: Tensor
    active: Tensor | None = None

    def within(self, spans: Tensor) -> Tensor:
        """Which tokens lie in the spans [requests, ..., 4] of their lines, bool [T, ...]."""
        own = spans[self.requests]

        def along(numbers: Tensor) -> Tensor:
            return numbers.view(-1, *[1] * (own.dim() - 2))

        positions, lengths = along(self.positions), along(self.prompt_lengths)
        start = own[..., 0] + own[..., 1] * lengths
        stop = own[..., 2] + own[..., 3] * lengths
        inside = (start <= positions) & (positions < stop)
        return inside if self.active is None else inside & along(self.active)


class _Slots(NamedTuple):
    """The slots of every token: E of them, for T tokens and their entries.

    Attributes:
        latents: int32 [T, E]; 0 in a slot without one.
        match: bool [T, K, E], or [N, E] of ragged codes: which entry is of which slot's latent.
        before, after: [T, E], the value of the latent as it is and as edited.
        on: bool [T, E], whether the edit applies.
    """

    latents: Tensor
    match: Tensor
    before: Tensor
    after: Tensor
    on: Tensor


def code_changes(codes: SparseCodes, bank: EditBank, tokens: Tokens) -> list[SparseCodes]:
    """The entries that a bank's edits change: edited value minus value, and 0 elsewhere.

    Args:
        codes: of tokens, of any form.
        bank: with the edits.
        tokens: whose they are.

    Returns:
        Codes whose decodings add up to ``decode(edited) - decode(codes)``, without bias: of the
        slots, [tokens, n_slots], and where :func:`keep_only` is used those of all entries.
    """
    flat = codes.flat()
    slots = _slots(flat, bank, tokens)
    difference = torch.where(slots.on, slots.after - slots.before, 0)
    changes = [SparseCodes(difference, slots.latents, codes.n_latents)]
    if bank.keeps_only:
        removed = _removed(flat, bank, slots, tokens)
        changes.append(flat.with_values(torch.where(removed, -flat.values, 0)))
    return changes


def edit_codes(
    codes: SparseCodes,
    bank: EditBank,
    requests: Tensor | None = None,
    positions: Tensor | None = None,
) -> SparseCodes:
    """Codes after a bank's edits; a latent that did not fire gets an entry of its own.

    Args:
        codes: of tokens, of any form.
        bank: with the edits, see :class:`EditBank`.
        requests: int, one per token, the line of the bank; None is line 0 for all.
        positions: int, one per token; None is position 0 for all.

    Returns:
        [..., K + n_slots]: entries of the latents as they were, then one for each slot, dropped
        (value 0) if its latent has an entry already; ragged codes stay ragged.

    Example:
        >>> from sae_kernels.interventions import EditBank, scale, set_to
        >>> from sae_kernels.nn import TopKSAE
        >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 3.0, 0.0, 1.0]]), k=2)
        >>> bank = EditBank(TopKSAE(8, 4, k=2), n_requests=1, n_slots=2)
        >>> bank.write(0, [scale(1, 2.0), set_to(2, 5.0)])
        >>> edit_codes(codes, bank).to_dense().tolist()
        [[0.0, 6.0, 5.0, 1.0]]
    """
    flat = codes.flat()
    n_tokens = flat.batch_shape[0]
    tokens = bank.tokens(n_tokens, requests, positions)
    slots = _slots(flat, bank, tokens)
    hit = slots.match & _for_entries(flat, slots.on)
    new = torch.where(hit, _for_entries(flat, slots.after), 0).sum(-1)
    values = torch.where(hit.any(-1), new, flat.values)
    if bank.keeps_only:
        values = torch.where(_removed(flat, bank, slots, tokens), 0, values)
    present = _for_tokens(flat, slots.match.to(values.dtype)) > 0
    added = torch.where(slots.on & ~present, slots.after, 0)
    if codes.offsets is None:
        joined = torch.cat([values, added], 1)
        indices = torch.cat([flat.indices, slots.latents], 1)
        shape = (*codes.batch_shape, joined.shape[1])
        return SparseCodes(joined.view(shape), indices.view(shape), codes.n_latents)
    numbers = torch.arange(n_tokens + 1, device=codes.indices.device)
    owners = torch.cat([flat.tokens.long(), numbers[:-1].repeat_interleave(bank.n_slots)])
    indices = torch.cat([flat.indices, slots.latents.flatten()])
    order = (owners * codes.n_latents + indices).argsort(stable=True)
    return SparseCodes(
        torch.cat([values, added.flatten()])[order],
        indices[order],
        codes.n_latents,
        (codes.offsets + bank.n_slots * numbers).int(),
        codes.leading,
    )


def _slots(
    codes: SparseCodes,
    bank: EditBank,
    tokens: Tokens,
) -> _Slots:
    latents, when, pool = bank.latents[tokens.requests].unbind(-1)
    match = _match(codes, latents)
    before = _values(codes, match)
    factor, shift, low, high = bank.changes[tokens.requests].unbind(-1)
    if bank.pool_size:
        # Two primes, so that neither neighbouring positions nor neighbouring rows meet soon.
        donor = (tokens.positions * 7919 + tokens.requests * 104729) % bank.pool_size
        shift = torch.where(pool < 0, shift, bank.pools[pool.clamp(min=0), donor[:, None]])
    scaled = torch.where(factor == 0, 0, factor * before)  # sets infinity and NaN to a value, too
    after = torch.minimum(torch.maximum(scaled + shift, low), high)
    fires = (when < 0) | (_values(codes, _match(codes, when)) != 0)
    on = fires & tokens.within(bank.spans)
    return _Slots(latents.clamp(min=0).int(), match, before, after, on)


def _match(codes: SparseCodes, latents: Tensor) -> Tensor:
    """Which entry is of which latent [T, E] of its token."""
    return codes.indices[..., None] == _for_entries(codes, latents)


def _values(codes: SparseCodes, match: Tensor) -> Tensor:
    """The value of each slot's latent [T, E], 0 where it has no entry."""
    return _for_tokens(codes, torch.where(match, codes.values[..., None], 0))


def _removed(
    codes: SparseCodes,
    bank: EditBank,
    slots: _Slots,
    tokens: Tokens,
) -> Tensor:
    """Which entries keep_only sets to 0."""
    on = tokens.within(bank.keep_only)[:, None]
    return ~slots.match.any(-1) & _for_entries(codes, on)[..., 0]


def _for_entries(codes: SparseCodes, per_token: Tensor) -> Tensor:
    """[T, E] as it meets the entries: [T, 1, E], or [N, E] of ragged codes."""
    return per_token[:, None] if codes.offsets is None else per_token[codes.tokens.long()]


def _for_tokens(codes: SparseCodes, entries: Tensor) -> Tensor:
    """Sums entries [T, K, E] or [N, E] over those of a token: [T, E]."""
    if codes.offsets is None:
        return entries.sum(1)
    out = entries.new_zeros((codes.batch_shape[0], entries.shape[-1]))
    return out.index_add_(0, codes.tokens.long(), entries)
