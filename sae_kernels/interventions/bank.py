"""EditBank: the edits of many requests as tensors of fixed size, changed in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sae_kernels import functional
from sae_kernels.harvest.splice import check_fits
from sae_kernels.interventions.changes import Tokens, code_changes
from sae_kernels.interventions.edits import Change
from sae_kernels.interventions.plan import NOWHERE, Slot, plan_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.interventions.edits import Edit
    from sae_kernels.nn.inference import AnySAE


class EditBank(nn.Module):
    """The edits of up to n requests at one layer, applied to hidden states of all of them at once.

    Called with hidden states it returns the edited ones: ``x + decode(edited) - decode(codes)``, so
    that what the SAE does not reconstruct stays, plus directions. Only entries that change are
    decoded, and without edits of latents nothing is encoded. All sizes are fixed, :meth:`write`
    changes buffers in place, and a call never waits for the device if the SAE keeps a fixed number
    of latents; so it can be compiled (``fullgraph=True``) or captured in a CUDA graph once, and
    follows later edits.

    Args:
        sae: the SAE of the layer; None if all edits are :func:`steer`.
        n_requests: lines of the bank.
        n_slots: edits of latents for each, counted by latent and span of positions.
        n_directions: spans of positions with directions for each.
        keeps_only: whether :func:`keep_only` is among the edits: all codes may change then.
        pool_size: tokens that :func:`resample` takes values from; 0 for none.
        width: D, without an SAE.
        dtype: of sums and directions, float32 or float64; never narrower than the SAE's weights.

    Raises:
        ValueError: an SAE that is no autoencoder of one layer, or neither SAE nor width.

    Example:
        >>> from sae_kernels.interventions import set_to
        >>> from sae_kernels.nn import TopKSAE
        >>> bank = EditBank(TopKSAE(8, 32, k=4), n_requests=2, n_slots=1)
        >>> bank.write(1, [set_to(3, 5.0)])
        >>> x, requests = torch.randn(3, 8), torch.tensor([0, 0, 1])
        >>> (bank(x, requests) != x).any(1).tolist()
        [False, False, True]
    """

    latents: Tensor  # int64 [n_requests, n_slots, 3]: latent, condition, pool; -1 for none
    changes: Tensor  # [n_requests, n_slots, 4]: factor, shift, low, high
    spans: Tensor  # int64 [n_requests, n_slots, 4]
    directions: Tensor  # [n_requests, n_directions, D]
    direction_spans: Tensor  # int64 [n_requests, n_directions, 4]
    keep_only: Tensor  # int64 [n_requests, 4]: a span
    prompt_lengths: Tensor  # int64 [n_requests]
    pools: Tensor  # [n_requests * n_slots, pool_size]

    def __init__(
        self,
        sae: AnySAE | None,
        n_requests: int,
        n_slots: int = 8,
        n_directions: int = 1,
        *,
        keeps_only: bool = False,
        pool_size: int = 0,
        width: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if sae is None and width is None:
            raise ValueError("EditBank: expected an SAE, or the width of the layer without one")
        if sae is not None:
            width = width or sae.config.input_width
            check_fits(sae, width, "EditBank")
            if not sae.decodes_by_rows:
                raise ValueError(
                    f"EditBank: expected an SAE that decodes by rows of W_dec, got a "
                    f"{type(sae).__name__}"
                )
        self.sae, self.width = sae, int(width or 0)
        self.n_requests, self.n_slots, self.n_directions = n_requests, n_slots, n_directions
        self.keeps_only, self.pool_size = keeps_only, pool_size
        device = None if sae is None else sae.W_dec.device
        high = dtype if sae is None else torch.promote_types(sae.W_dec.dtype, dtype)
        sizes = {
            "latents": ((n_requests, n_slots, 3), torch.int64),
            "changes": ((n_requests, n_slots, 4), high),
            "spans": ((n_requests, n_slots, 4), torch.int64),
            "directions": ((n_requests, n_directions, self.width), high),
            "direction_spans": ((n_requests, n_directions, 4), torch.int64),
            "keep_only": ((n_requests, 4), torch.int64),
            "prompt_lengths": ((n_requests,), torch.int64),
            "pools": ((n_requests * n_slots, pool_size), high),
        }
        for name, (size, dtype) in sizes.items():
            self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device))
        for request in range(n_requests):
            self.write(request, [])

    def write(self, request: int, edits: Sequence[Edit], prompt_length: int | None = None) -> None:
        """Replaces the edits of a request, in place; their ``rows`` are not looked at.

        Args:
            request: the line.
            edits: none for a request that is left alone.
            prompt_length: for edits at "prompt", "generated" and negative positions.

        Raises:
            ValueError: an unknown line or latent, a vector of another width, more edits than there
                is room for, or two edits of the same latent at the same position.
        """
        if not 0 <= request < self.n_requests:
            raise ValueError(f"row: expected one of 0 to {self.n_requests - 1}, got {request}")
        plan = plan_of(edits, self.sae, self.width)
        room = {"n_slots": plan.slots, "n_directions": plan.directions}
        for name, needed in room.items():
            if len(needed) > getattr(self, name):
                raise ValueError(
                    f"{name}: expected at most {getattr(self, name)} for a request, got "
                    f"{len(needed)}; make the bank with more"
                )
        if plan.keep_only is not NOWHERE and not self.keeps_only:
            raise ValueError(
                "keep_only: expected a bank made with keeps_only=True, got one without"
            )
        idle = Slot(-1, Change(), NOWHERE)  # a latent that no entry has
        slots = [*plan.slots, *[idle] * (self.n_slots - len(plan.slots))]
        first = request * self.n_slots
        pools = [-1 if slot.pool is None else first + i for i, slot in enumerate(slots)]
        latents = [(s.latent, s.when, pool) for s, pool in zip(slots, pools, strict=True)]
        self._fill(self.latents[request], latents)
        self._fill(self.changes[request], [slot.change for slot in slots])
        self._fill(self.spans[request], [slot.span for slot in slots])
        for place, slot in zip(pools, slots, strict=True):
            if slot.pool is not None:
                if slot.pool.shape != (self.pool_size,):
                    raise ValueError(
                        f"resample: expected codes of {self.pool_size} tokens (pool_size), got "
                        f"{len(slot.pool)}"
                    )
                self.pools[place].copy_(slot.pool)
        spans = [*plan.directions, *[NOWHERE] * (self.n_directions - len(plan.directions))]
        self._fill(self.direction_spans[request], spans)
        for i, vector in enumerate(plan.directions.values()):
            self.directions[request, i].copy_(vector)
        self._fill(self.keep_only[request], plan.keep_only)
        if prompt_length is not None:
            self.prompt_lengths[request].fill_(prompt_length)

    def forward(
        self,
        hidden: Tensor,
        requests: Tensor,
        positions: Tensor | None = None,
        *,
        prompt_lengths: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tensor:
        """Edits hidden states of any mix of requests.

        Args:
            hidden: [tokens, D], any floating dtype.
            requests: int [tokens], the line of each token.
            positions: int [tokens], where each token stands in its sequence, from 0; needed by
                edits at some positions only.
            prompt_lengths: int [tokens], of each token's sequence; None: those written.
            active: bool [tokens]; others are left alone.

        Returns:
            [tokens, D] in the dtype of ``hidden``. Tokens without an edit keep their bits.

        Raises:
            ValueError: hidden states of another width.
        """
        if hidden.dim() != 2 or hidden.shape[1] != self.width:
            raise ValueError(
                f"hidden: expected [tokens, {self.width}], as wide as what the edits are for, got "
                f"{list(hidden.shape)}"
            )
        tokens = self.tokens(hidden.shape[0], requests, positions, prompt_lengths, active)
        moved = hidden.to(torch.promote_types(hidden.dtype, self.changes.dtype))
        changed = torch.zeros_like(tokens.requests, dtype=torch.bool)
        for i in range(self.n_directions):
            on = tokens.within(self.direction_spans[:, i])
            moved = moved + torch.where(on[:, None], self.directions[:, i][tokens.requests], 0)
            changed = changed | on
        if self.n_slots and self.sae is not None:
            sae, codes = self.sae, self.sae.encode(hidden)
            for change in code_changes(codes, self, tokens):
                difference = functional.decode(
                    change, sae.W_dec, compute_dtype=sae.compute_dtype, backend=sae.backend
                )
                difference = difference / sae.target_scale
                moved = moved + difference
                changed = changed | (difference != 0).any(1)
        return torch.where(changed[:, None], moved.to(hidden.dtype), hidden)

    def tokens(
        self,
        n: int,
        requests: Tensor | None = None,
        positions: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        active: Tensor | None = None,
    ) -> Tokens:
        """The request, position and prompt length of each of n tokens, checked and filled up."""
        zeros = torch.zeros(n, dtype=torch.int64, device=self.spans.device)
        given = {"requests": requests, "positions": positions, "prompt_lengths": prompt_lengths}
        for name, numbers in {**given, "active": active}.items():
            if numbers is not None and numbers.numel() != n:
                raise ValueError(
                    f"{name}: expected one for each of {n} tokens, got {numbers.numel()}"
                )
        lines = zeros if requests is None else requests.reshape(-1).long()
        lengths = self.prompt_lengths[lines] if prompt_lengths is None else prompt_lengths
        places = zeros if positions is None else positions
        return Tokens(lines, places.reshape(-1).long(), lengths.reshape(-1).long(), active)

    @staticmethod
    def _fill(line: Tensor, numbers: object) -> None:
        line.copy_(torch.tensor(numbers, dtype=line.dtype).view(line.shape))
