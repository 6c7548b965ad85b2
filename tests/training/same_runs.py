"""Runs that are ended before their time, and what it means that two are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.training import TrainingResult


class Stop(Exception):
    """Ends a run as a crash of the user's own code would."""


def stop_at(step: int) -> Callable[[int, object], None]:
    """What ends a run after so many steps."""

    def on_step(i: int, line: object) -> None:
        if i + 1 == step:
            raise Stop

    return on_step


def untimed(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Metric lines but for the clock, and for how steps were launched."""
    leave_out = ("tokens_per_second", "cuda_graph")
    return [{k: v for k, v in line.items() if k not in leave_out} for line in lines]


def assert_same(result: TrainingResult, expected: TrainingResult) -> None:
    """Bit for bit, the clock apart."""
    wanted = expected.sae.state_dict()
    for key, tensor in result.sae.state_dict().items():
        assert_bitwise(key, tensor.reshape(-1), wanted[key].reshape(-1))
    assert result.sae.config == expected.sae.config
    assert torch.equal(result.dead, expected.dead)
    assert result.skipped == expected.skipped
    assert untimed(result.metrics) == untimed(expected.metrics)
