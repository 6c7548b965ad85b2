"""What a run leaves in the SAE's metadata: figures and data, the same whether it was stopped."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sae_kernels as sk
from sae_kernels.config import OutputConfig
from sae_kernels.data import ShardDataset, ShardWriter

if TYPE_CHECKING:
    from pathlib import Path

D, F, STEPS = 8, 32, 12
SETTINGS: dict[str, Any] = {"steps": STEPS, "batch_size": 32, "log_every": 5}


class Stopped(Exception):
    pass


def stop(step: int, _: Any) -> None:
    if step == 7:
        raise Stopped


def test_figures_are_those_of_the_last_line(tmp_path: Path) -> None:
    run = sk.train(sk.TopKSAE(D, F, k=4), torch.randn(256, D), folder=tmp_path, **SETTINGS)
    last = run.metrics[-1]
    expected = {"tokens": 32 * STEPS, "steps": STEPS}
    expected |= {name: last[name] for name in ("fvu", "l0", "dead_fraction")}
    assert run.sae.metadata == {"trained": expected, "sae_kernels_version": sk.__version__}
    saved = json.loads((tmp_path / "sae" / "config.json").read_text())
    assert saved["metadata"] == run.sae.metadata
    assert f"{last['fvu']:.4g}" in (tmp_path / "sae" / "README.md").read_text()


def test_a_resumed_run_leaves_the_same_files(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "acts", D) as writer:
        writer.write(torch.randn(256, D))
    data = ShardDataset(tmp_path / "acts")
    config = sk.TopKConfig(D, F, k=4)
    straight = sk.train(config, data, folder=tmp_path / "straight", **SETTINGS)
    assert straight.sae.metadata["data"] == data.fingerprint
    output = OutputConfig(checkpoint_every=5)
    options: dict[str, Any] = {"folder": tmp_path / "stopped", "output": output, "resume": True}
    with pytest.raises(Stopped):
        sk.train(config, data, on_step=stop, **options, **SETTINGS)
    sk.train(config, data, **options, **SETTINGS)
    for file in ("config.json", "sae.safetensors", "README.md"):
        files = [tmp_path / run / "sae" / file for run in ("straight", "stopped")]
        assert files[0].read_bytes() == files[1].read_bytes(), file


def test_figures_that_are_not_finite_are_left_out() -> None:
    batches = [torch.randn(32, D) for _ in range(STEPS)]
    batches[-1] = torch.full((32, D), torch.nan)
    run = sk.train(sk.TopKSAE(D, F, k=4), batches, **SETTINGS, on_nonfinite="skip")
    assert run.skipped == 1
    assert "fvu" not in run.sae.metadata["trained"]
