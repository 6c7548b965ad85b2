"""What a transformers model is being fed: rows, positions and prompts, in generate() too."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sae_kernels.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class Feed:
    """The tokens of the forward pass that runs now, B rows of S each.

    Attributes:
        rows: int64 [B * S], the row of the caller's batch; its beams share it.
        positions: int64 [B * S], the token's position in its row, padding not counted.
        prompt_lengths: int64 [B * S], of the token's row.
        attended: bool [B * S], false for padding.
        ids: int64 [B * S]; None where the model is given embeddings.
        shape: (B, S); None outside a forward pass.
        n_rows: rows of the caller's batch.
    """

    rows: Tensor
    positions: Tensor
    prompt_lengths: Tensor
    attended: Tensor
    ids: Tensor | None
    n_rows: int

    def __init__(self) -> None:
        self.shape: tuple[int, int] | None = None
        self._ran: set[str] = set()
        self._width = 0  # columns of the prompt
        self._generating = False
        self._copies = 1
        self._prompt_mask: Tensor | None = None

    def expect(self, rows: Tensor, layer: str) -> tuple[int, int]:
        """Checks that a layer's output [B * S, D] is that of the current pass; returns (B, S).

        Raises:
            ModelError: it is not.
        """
        if self.shape is None:
            raise ModelError(
                f"{layer}: expected a call of the model that was given, its layer ran in another "
                "one; give the model that you call"
            )
        if rows.shape[0] != self.shape[0] * self.shape[1]:
            raise ModelError(
                f"{layer}: expected a layer that puts out [{self.shape[0]}, {self.shape[1]}, D], "
                f"got {rows.shape[0]} tokens; choose a whole block of the model"
            )
        self._ran.add(layer)
        return self.shape

    def check_ran(self, layers: Iterable[str]) -> None:
        """Checks, at the end of a forward pass, that it ran these layers.

        Raises:
            ModelError: one of them did not run.
        """
        for layer in layers:
            if layer not in self._ran:
                raise ModelError(
                    f"{layer}: expected a layer that runs, it did not; choose a whole block"
                )

    def started(self, _model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook before each forward pass."""
        given = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        ids, mask = given.get("input_ids"), given.get("attention_mask")
        fed = ids if isinstance(ids, Tensor) else given.get("inputs_embeds")
        if not isinstance(fed, Tensor) or fed.dim() < 2:
            raise ModelError(
                "expected a model that is fed input_ids [B, S], got none of this shape"
            )
        B, S = fed.shape[:2]
        if isinstance(mask, Tensor) and mask.dim() == 2:
            attended, past = mask.bool(), max(0, mask.shape[1] - S)
        else:
            past = _cached(given)
            attended = torch.ones(B, past + S, dtype=torch.bool, device=fed.device)
            if self._prompt_mask is not None:  # of generate(), which may pass a mask of other shape
                known = self._prompt_mask[:, : past + S].to(fed.device)
                attended[:, : known.shape[1]] = known
        if not self._generating and past == 0:
            self._width = S
        places = attended.cumsum(1)
        lengths = places[:, min(self._width, past + S) - 1]
        if self._prompt_mask is not None:  # also while the prompt comes in chunks
            lengths = self._prompt_mask.to(fed.device).sum(1)
        copies = self._copies if B % self._copies == 0 else 1
        rows = torch.arange(B, device=fed.device) // copies
        self.rows = rows.repeat_interleave(S)
        self.n_rows = B // copies
        self.positions = (places[:, past:] - 1).reshape(-1)
        self.prompt_lengths = lengths.repeat_interleave(S)
        self.attended = attended[:, past:].reshape(-1)
        self.ids = ids.reshape(-1) if isinstance(ids, Tensor) else None
        self.shape = (B, S)

    def ended(self, *_: object) -> None:
        """A hook after each forward pass, also one that raised."""
        self.shape = None
        self._ran.clear()

    def wrap(self, model: nn.Module, generate: Any) -> Any:
        """A model's ``generate`` that tells where its prompt ends and how many beams it has."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            prompt = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
            prompt = kwargs.get("inputs_embeds") if prompt is None else prompt
            config = kwargs.get("generation_config") or getattr(model, "generation_config", None)
            each = [
                kwargs.get(name) or getattr(config, name, None) or 1
                for name in ("num_beams", "num_return_sequences")
            ]
            mask = kwargs.get("attention_mask")
            self._copies = max(each)
            self._width = prompt.shape[1] if isinstance(prompt, Tensor) else 1
            if isinstance(mask, Tensor) and mask.dim() == 2:
                self._prompt_mask = mask.bool().repeat_interleave(self._copies, 0)
            self._generating = True
            try:
                return generate(*args, **kwargs)
            finally:
                self._generating, self._prompt_mask, self._copies = False, None, 1

        return wrapped


def _cached(given: dict[str, Any]) -> int:
    """Tokens in the key-value cache among a model's arguments."""
    lengths = [
        value.get_seq_length() for value in given.values() if hasattr(value, "get_seq_length")
    ]
    return int(lengths[0]) if lengths else 0


@contextmanager
def followed(
    model: nn.Module, layers: Iterable[str], finished: Callable[[Feed], object] | None = None
) -> Iterator[Feed]:
    """Within the block, the feed tells what a model is being fed; afterwards no hook is left.

    Each forward pass must run the ``layers``; ``finished`` is called at its end, unless it raised.
    """
    feed = Feed()
    own = vars(model).get("generate")

    def finish(*_: object) -> None:
        feed.check_ran(layers)
        if finished is not None:
            finished(feed)

    handles = [
        model.register_forward_pre_hook(feed.started, with_kwargs=True),
        model.register_forward_hook(finish),
        model.register_forward_hook(feed.ended, always_call=True),
    ]
    if hasattr(model, "generate"):
        vars(model)["generate"] = feed.wrap(model, model.generate)
    try:
        yield feed
    finally:
        for handle in handles:
            handle.remove()
        vars(model).pop("generate", None)
        if own is not None:
            vars(model)["generate"] = own
