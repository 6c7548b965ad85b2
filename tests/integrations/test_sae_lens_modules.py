"""SAELens trained on these kernels at module level: every loss and gradient, 20 steps, files.

Runs where SAELens is installed; ``python -m benchmarks.peer_tests sae_lens`` runs it in the
environment that ``sae-kernels bench --setup-peers`` makes.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

pytest.importorskip("sae_lens", reason="needs SAELens: python -m benchmarks.peer_tests sae_lens")

import torch
from sae_lens import saes
from sae_lens_cases import TRAINED, D, Run, batches, gradients, make, sparse_from_the_start
from safetensors.torch import load_file

import sae_kernels as sk


@pytest.mark.parametrize("kind", TRAINED)
def test_losses_and_gradients_are_those_of_their_formula(kind: str) -> None:
    # In fp64 both are exact to 1e-12, so what differs is the formula.
    (x,) = batches(1, torch.float64)
    expected_losses, expected = gradients(make(kind, dtype="float64"), x)
    sae = make(kind, dtype="float64")
    with sk.accelerate("sae_lens", level="module") as run:
        sparse_from_the_start(sae, x)
        losses, found = gradients(sae, x)
    name = type(sae).__name__
    assert run.report().taken[f"{name}.encode_with_hidden_pre"] == 1
    assert losses.keys() == expected_losses.keys()
    for key, value in losses.items():
        assert value == pytest.approx(expected_losses[key], rel=1e-11), key
    assert found.keys() == expected.keys()
    for key, value in found.items():
        # SAELens keeps a JumpReLU's threshold in fp32, and with it everything next to it.
        rel = 1e-6 if "threshold" in expected else 1e-11
        assert expected[key].norm() > 0, key
        error = (value - expected[key]).norm() / expected[key].norm()
        assert error <= rel, key


def distances(a: Run, b: Run, order: torch.Tensor | None = None) -> dict[str, float]:
    """How far two runs are apart: losses by step, weights over the way they went."""
    theirs, ours = a.weights(), b.weights(order)
    found = {
        name: float((theirs[name] - ours[name]).norm() / (theirs[name] - a.start[name]).norm())
        for name in theirs
    }
    for key in (key for key in a.logged[0] if key.startswith("losses/")):
        gaps = [
            abs(x[key] - y[key]) / max(abs(x[key]), 1e-3)
            for x, y in zip(a.logged, b.logged, strict=True)
        ]
        found[key] = max(gaps)
    return found


@pytest.mark.parametrize("kind", TRAINED)
def test_twenty_steps_stay_within_their_own_rounding(kind: str) -> None:
    shipped = Run(kind).steps()
    # What rounding does to SAELens' own run: the same with the inputs summed in other orders.
    budget: dict[str, float] = {}
    for seed in range(3):
        order = torch.randperm(D, generator=torch.Generator().manual_seed(seed))
        for name, gap in distances(shipped, Run(kind, order).steps(), order).items():
            budget[name] = max(budget.get(name, 0.0), gap)
    with sk.accelerate("sae_lens", level="module") as run:
        ours = Run(kind).steps()
    for name, gap in distances(shipped, ours).items():
        assert gap <= 4 * budget[name] + 1e-6, (name, gap, budget[name])
    for theirs, mine in zip(shipped.logged, ours.logged, strict=True):
        for name in ("metrics/l0", "sparsity/dead_features", "sparsity/mean_passes_since_fired"):
            assert theirs[name] == pytest.approx(mine[name], rel=1e-5), name
    assert torch.equal(shipped.trainer.act_freq_scores, ours.trainer.act_freq_scores)
    passes = "n_forward_passes_since_fired"
    assert torch.equal(getattr(shipped.trainer, passes), getattr(ours.trainer, passes))
    report = run.report()
    taken = report.taken[f"{type(ours.sae).__name__}.encode_with_hidden_pre"]
    assert taken >= (20 if hasattr(ours.sae.cfg, "k") else 15)
    # The auxiliary loss of every level of a Matryoshka SAE reads all pre-activations.
    assert set(report.dense) == ({"pre-activations: slice"} if "aux" in kind else set())


def test_fused_adam_is_their_adam() -> None:
    shipped = Run("topk").steps()
    with sk.accelerate("sae_lens", level="module", optimizer="fused") as run:
        ours = Run("topk").steps()
        assert ours.trainer.optimizer.param_groups[0]["fused"]
    assert run.report().taken["fused Adam"] == 1
    assert not ours.trainer.optimizer.param_groups[0]["fused"], "taken back"
    # One step of Adam rounds by some units of 1e-7 of a weight's step, 20 of them by as many.
    assert max(distances(shipped, ours).values()) < 1e-4


@pytest.mark.parametrize("fused", [False, True])
def test_a_run_goes_on_without_and_with(fused: bool) -> None:
    """Weights and optimizer states change hands at any step, however W_enc lies in memory."""
    shipped = Run("topk").steps()
    mixed = Run("topk")
    options: Any = {"level": "module", "optimizer": "fused" if fused else None}
    for i, x in enumerate(mixed.data):
        with sk.accelerate(mixed.trainer, **options) if i // 5 % 2 else contextlib.nullcontext():
            out = mixed.trainer.step(x)
        mixed.trainer.n_training_steps += 1
        log = mixed.trainer.build_train_step_log_dict(out, mixed.trainer.n_training_samples)
        mixed.logged.append(log)
    assert max(distances(shipped, mixed).values()) < 1e-4
    assert mixed.sae.W_enc.is_contiguous()


def test_what_is_saved_is_what_they_save(tmp_path: Any) -> None:
    with sk.accelerate("sae_lens", level="module"):
        run = Run("batchtopk").steps(3)
        assert not run.sae.W_enc.is_contiguous(), "laid for the kernels"
        run.trainer.save_checkpoint("now", tmp_path)
        run.sae.save_inference_model(tmp_path / "inference")
    weights = load_file(tmp_path / "now" / "sae_weights.safetensors")
    for name, p in run.sae.named_parameters():
        assert torch.equal(weights[name], p.detach())
    again = Run("batchtopk")
    again.sae.load_weights_from_checkpoint(tmp_path / "now")
    again.trainer.load_trainer_state(tmp_path / "now")
    x = run.data[3]
    assert torch.equal(run.trainer.step(x).loss, again.trainer.step(x).loss)
    assert saes.SAE.load_from_disk(tmp_path / "inference").cfg.architecture() == "jumprelu"
