"""The cases of ``sae-kernels bench`` under pytest-benchmark, ours and dense torch.

``pytest benchmarks --preset cpu-small --benchmark-autosave``, later the same with
``--benchmark-compare``. One process runs one contestant after the other: for ratios to be quoted
take ``sae-kernels bench``, where they take turns.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from sae_kernels.bench import gate, inputs, providers
from sae_kernels.bench.contestants import worker
from sae_kernels.bench.contestants.clock import PeakMemory

if TYPE_CHECKING:
    from pathlib import Path

    from pytest_benchmark.fixture import BenchmarkFixture

    from sae_kernels.bench.cases import Case
    from sae_kernels.bench.contestants.contestant import Contestant, Task
    from sae_kernels.bench.providers import Provider

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CHOSEN = providers.chosen(["dense"], DEVICE)
PROVIDERS = [provider for provider in CHOSEN if provider.module in ("ours", "dense")]


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda provider: provider.key)
def test_case(benchmark: BenchmarkFixture, case: Case, provider: Provider, tmp_path: Path) -> None:
    """A training step, or an operator alone."""
    options = inputs.write(case, tmp_path / "inputs")
    tensors = load_file(tmp_path / "inputs", device=DEVICE)
    x = tensors.pop("x")
    task = provider.task(case, DEVICE, options)
    module = importlib.import_module(f"sae_kernels.bench.contestants.{provider.module}")
    contestant = module.contestant(task, tensors)
    error = _judged(contestant, task, x, tmp_path / "came")
    peak = PeakMemory(x.device)

    def waited() -> None:  # until the device is done: pytest-benchmark's clock is the host's
        run(x)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    with torch.set_grad_enabled(case.mode != "inference"), task.autocast():
        run = contestant.step if case.mode == "step" else contestant.once
        run(x)
        peak.start()
        run(x)
        benchmark.extra_info.update(
            case.facts(),
            provider=provider.name,
            dtype=provider.dtype,
            device=DEVICE,
            threads=torch.get_num_threads(),
            peak_bytes=peak.stop(),
            max_error=error.error,
            error_budget=error.budget,
        )
        benchmark(waited)


def _judged(contestant: Contestant, task: Task, x: torch.Tensor, out: Path) -> gate.Deviation:
    """The error of a contestant's result; nothing is timed before it is right."""
    some = x[: gate.TOKENS]
    contestant.loop(worker.gate(contestant, some, str(out)))
    given = {name: tensor.cpu() for name, tensor in contestant.tensors.items()}
    return gate.judge(task, some.cpu(), load_file(out), given)
