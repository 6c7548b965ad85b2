"""A run that was stopped goes on as if it had not been: bit for bit, for all that is trained."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config import OutputConfig, TrainConfig
from sae_kernels.nn import nested_groups, presets
from sae_kernels.runs.metrics import read_metrics
from sae_kernels.training import train
from tests.step.harness import D, tokens
from tests.training.same_runs import Stop, assert_same, stop_at, untimed

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.nn import SAEConfig

F, N, STEPS = 64, 700, 24
PRESETS = presets()
TARGET = 7  # columns of a transcoder's target


def settings(name: str, **changes: Any) -> tuple[SAEConfig, TrainConfig]:
    kind, preset = PRESETS[name]
    sae = dict(preset.sae)
    if "groups" in sae:
        sae["groups"] = nested_groups(F)
    if preset.data in ("target", "targets"):
        sae["d_out"] = TARGET
    if preset.data in ("layers", "targets"):
        sae["n_layers"] = 2
    if "k" in {f.name for f in dataclasses.fields(kind.config_class)}:
        sae["k"] = 5
    train = {"steps": STEPS, "batch_size": 48, "lr": 2e-3, "compute": "float32", "log_every": 1}
    train |= {"dead_after_tokens": 300, **preset.objective, **preset.optimizer, **changes}
    config = TrainConfig.of(kind.objective_class, **train)
    return kind.config_class(d_in=D, n_latents=F, **sae), config


def data(name: str) -> dict[str, torch.Tensor]:
    kind = PRESETS[name].preset.data
    n_layers = 2 if kind in ("layers", "targets") else 1
    made = {"source": torch.cat([tokens(N, seed=seed) for seed in (0, 3)[:n_layers]], dim=1)}
    if kind in ("target", "targets"):
        targets = [tokens(N, seed=seed)[:, :TARGET] for seed in (3, 4)[:n_layers]]
        made["target"] = torch.cat(targets, dim=1)
    return made


OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {},
    "autograd": {"route": "autograd"},
    "bfloat16": {"compute": "bfloat16"},
    "split": {"compute": "bfloat16", "master_weights": "split", "moment_dtype": "bfloat16"},
    "lazy": {"adam": "lazy", "clip_norm": 1.0},
    "annealed": {"k_start": 20, "k_anneal_steps": 20},
    "resampled": {"resample_every": 5, "dead_after_tokens": 20},
    "resampled-autograd": {"resample_every": 5, "dead_after_tokens": 20, "route": "autograd"},
    "micro-batches": {"micro_batch_size": 20, "clip_norm": 1.0},
    "micro-batches-autograd": {"micro_batch_size": 20, "route": "autograd"},
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("name", "option"),
    [(name, route) for name in PRESETS for route in ("fused", "autograd")]
    + [("topk", option) for option in OPTIONS if option not in ("fused", "autograd")]
    + [("batchtopk", "micro-batches"), ("jumprelu", "micro-batches-autograd")],
)
def test_stopped_and_resumed_is_the_same_run(name: str, option: str, tmp_path: Path) -> None:
    sae, config = settings(name, **OPTIONS[option])
    saving = OutputConfig(checkpoint_every=5)
    straight = train(**data(name), sae=sae, config=config, folder=tmp_path / "straight")

    for step in (4, 13, 21):  # before the first checkpoint, between two, and again
        with pytest.raises(Stop):
            train(
                **data(name),
                sae=sae,
                config=config,
                folder=tmp_path / "stopped",
                output=saving,
                resume=True,
                on_step=stop_at(step),
            )
    resumed = train(
        **data(name),
        sae=sae,
        config=config,
        folder=tmp_path / "stopped",
        output=saving,
        resume=True,
    )
    assert_same(resumed, straight)
    assert resumed.skipped == 0
    for folder in ("straight", "stopped"):
        lines = read_metrics(tmp_path / folder / "metrics.jsonl")
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert untimed(lines) == untimed(straight.metrics)
    files = [tmp_path / folder / "sae" / "sae.safetensors" for folder in ("straight", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
