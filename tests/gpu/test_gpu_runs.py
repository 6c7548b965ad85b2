"""Runs on a GPU: batches that arrive whole, and a stopped run that goes on as the same one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.config import OutputConfig
from sae_kernels.data import Prefetched, ShuffledBatches
from sae_kernels.nn import TopKConfig
from sae_kernels.testing import assert_bitwise
from sae_kernels.training import train
from tests.settings import settings

if TYPE_CHECKING:
    from pathlib import Path

PRIMITIVES = ("FusedStep",)


class Stop(Exception):
    """Ends a run as a crash of the user's own code would."""


@pytest.mark.parametrize("master", ["float32", "split"])
def test_stopped_and_resumed_is_the_same_run(
    master: str, device: torch.device, tmp_path: Path
) -> None:
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    sae = TopKConfig(64, 512, 8)
    config = settings(
        sae,
        steps=30,
        batch_size=256,
        device=str(device),
        master_weights=master,
        dead_after_tokens=2000,
    )
    saving = OutputConfig(checkpoint_every=7)

    def stop(i: int, line: object) -> None:
        if i == 17:
            raise Stop

    straight = train(sae, x, config)
    with pytest.raises(Stop):
        train(sae, x, config, folder=tmp_path, output=saving, on_step=stop)
    resumed = train(sae, x, config, folder=tmp_path, output=saving, resume=True)
    for name, tensor in resumed.sae.state_dict().items():
        assert_bitwise(name, tensor, straight.sae.state_dict()[name])
    assert torch.equal(resumed.dead, straight.dead)


@pytest.mark.parametrize("resident", [False, True])
def test_batches_reach_a_gpu_whole(resident: bool, device: torch.device) -> None:
    x = torch.randn(20_000, 256, device="cpu")
    straight = [b.clone() for b in ShuffledBatches(x, 999, epochs=3, drop_last=False)]
    source = x.to(device) if resident else x
    inner = ShuffledBatches(source, 999, epochs=3, drop_last=False)
    side = torch.cuda.Stream()
    with Prefetched(inner, device, depth=3) as batches, torch.cuda.stream(side):
        for ours, theirs in zip(batches, straight, strict=True):
            torch.cuda._sleep(1_000_000)  # the consumer lags behind, so that memory is wanted again
            assert_bitwise("batch", (ours + 0).cpu(), theirs)
