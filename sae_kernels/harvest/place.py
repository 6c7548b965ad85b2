"""Where a stream of activations stands, and whether another one may go on from there."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

_WEIGHTS = 256  # of each parameter


class Place(NamedTuple):
    """Where a stream stands: so many rows of a window of an epoch are taken."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


def checked_place(state: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Place, int]:
    """The place and the position of a saved state, once its settings are found to be these.

    Raises:
        ValueError: names the settings that differ; a state that is not of a live stream.
    """
    counts = [state.get(name) for name in ("position", *Place._fields)]
    saved = state.get("settings")
    whole = all(type(count) is int and count >= 0 for count in counts)
    if not whole or not isinstance(saved, dict) or not isinstance(state.get("text"), str):
        raise ValueError(
            "expected the state of a LiveBatches, with position, epoch, window, offset, text and "
            f"settings, got {', '.join(map(str, state))[:200] or 'nothing'}"
        )
    differ = [
        f"{name} was {saved.get(name)!r:.80} and is {settings.get(name)!r:.80}"
        for name in sorted(saved.keys() | settings.keys())
        if saved.get(name) != settings.get(name)
    ]
    if differ:
        raise ValueError(
            f"expected a stream made as the saved one was: {'; '.join(differ)[:1000]}; make it "
            "with the saved settings, or start afresh"
        )
    position, *place = (int(count) for count in counts if count is not None)
    return Place(*place), position


def weights_digest(model: nn.Module) -> str:
    """Tells models apart by a few weights of each parameter."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        some = parameter.detach().reshape(-1)[:_WEIGHTS].to("cpu", torch.float32)
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()
