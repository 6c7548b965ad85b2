"""The cursor of a stream of activations, and the checks of a saved one."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

_WEIGHTS = 256  # weights of each parameter that are hashed


class Cursor(NamedTuple):
    """Position in a stream: epoch, window, and rows of the window already yielded."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


def checked_cursor(state: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[Cursor, int]:
    """Reads cursor and batch count of a saved state, whose settings must equal these.

    Raises:
        ValueError: settings that differ (the message names them), or not a state of LiveBatches.
    """
    counts = [state.get(name) for name in ("left_out", "position", *Cursor._fields)]
    saved = state.get("settings")
    whole = all(type(count) is int and count >= 0 for count in counts)
    if not whole or not isinstance(saved, dict) or not isinstance(state.get("text"), str):
        raise ValueError(
            "expected the state of a LiveBatches, with position, epoch, window, offset, left_out, "
            f"text and settings, got {', '.join(map(str, state))[:200] or 'nothing'}"
        )
    if differ := differences(saved, settings):
        raise ValueError(
            f"expected a stream made as the saved one was: {differ}; make it with the saved "
            "settings, or start afresh"
        )
    _, position, *cursor = (int(count) for count in counts if count is not None)
    return Cursor(*cursor), position


def differences(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The settings that differ from saved ones, for an error message; empty if none does.

    >>> differences({"seed": 0, "rows": 5}, {"seed": 1, "rows": 5})
    'seed was 0 and is 1'
    """
    return "; ".join(
        f"{name} was {saved.get(name)!r:.80} and is {settings.get(name)!r:.80}"
        for name in sorted(saved.keys() | settings.keys())
        if saved.get(name) != settings.get(name)
    )[:1000]


def weights_digest(model: nn.Module) -> str:
    """A digest of the first weights of each parameter, which tells models apart."""
    digest = hashlib.blake2b(digest_size=16)
    for parameter in model.parameters():
        if parameter.is_meta:  # a device_map left it on the disk
            digest.update(repr(parameter.shape).encode())
            continue
        some = parameter.detach().reshape(-1)[:_WEIGHTS].to("cpu", torch.float32)
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()
