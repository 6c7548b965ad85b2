"""SAELens on these kernels at module level: every loss and gradient, 20 steps, what is left to it.

Runs where SAELens is installed; ``python -m benchmarks.peer_tests sae_lens`` runs it in the
environment that ``sae-kernels bench --setup-peers`` makes.
"""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sae_lens", reason="needs SAELens: python -m benchmarks.peer_tests sae_lens")

import torch
from sae_lens import saes
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file

import sae_kernels as sk
from sae_kernels.errors import AccelerationError
from sae_kernels.integrations.late import LateTensor
from sae_kernels.integrations.lazy_codes import LazyCodes

if TYPE_CHECKING:
    from collections.abc import Iterator

B, D, F, K = 96, 24, 320, 6
JUMP = {
    "jumprelu_init_threshold": 0.05,
    "jumprelu_bandwidth": 0.1,
    "l0_coefficient": 0.1,
    "target_l0": 15.0,
    "pre_act_loss_coefficient": 3e-3,
}
# Each way to train, as (class, settings).
TRAINED: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("TopK", {"k": K}),
    "topk by value": ("TopK", {"k": K, "rescale_acts_by_decoder_norm": False}),
    "topk uncentred": ("TopK", {"k": K, "apply_b_dec_to_input": False}),
    "batchtopk": ("BatchTopK", {"k": 5.5}),
    "matryoshka": ("MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": [40, 160, F]}),
    "matryoshka aux": (
        "MatryoshkaBatchTopK",
        {"k": K, "matryoshka_widths": [40, 160, F], "use_matryoshka_aux_loss": True},
    ),
    "jumprelu": ("JumpReLU", JUMP),
    "jumprelu quadratic": ("JumpReLU", JUMP | {"jumprelu_sparsity_loss_mode": "quadratic"}),
    "jumprelu tanh": ("JumpReLU", JUMP | {"jumprelu_sparsity_loss_mode": "tanh"}),
    "jumprelu to the input": ("JumpReLU", JUMP | {"jumprelu_ste_to_input": True}),
    "standard": ("Standard", {"l1_coefficient": 0.1}),
    "standard p": ("Standard", {"l1_coefficient": 0.1, "lp_norm": 2.0}),
    "gated": ("Gated", {"l1_coefficient": 0.1}),
}
RARE = 2.4  # off the biases of encoders with a threshold: some 2 % of the latents fire


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = {
        name: getattr(saes.TopKTrainingSAE, name) for name in ("decode", "encode_with_hidden_pre")
    }
    yield
    for name, function in before.items():
        assert getattr(saes.TopKTrainingSAE, name) is function


def make(kind: str, *, dtype: str = "float32", training: bool = True, **more: Any) -> Any:
    """An SAE with weights that no term of a gradient is zero for."""
    name, settings = TRAINED[kind]
    name += "TrainingSAE"
    config = getattr(saes, name + "Config")(d_in=D, d_sae=F, dtype=dtype, **settings, **more)
    return fill(getattr(saes, name)(config))


def fill(sae: Any) -> Any:
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        for name, p in sae.named_parameters():
            if name in ("b_enc", "b_gate", "b_mag", "b_dec", "r_mag"):
                p.copy_(0.1 * noise(*p.shape))
        sae.W_dec.copy_(0.1 * noise(*sae.W_dec.shape) * noise(F, 1).exp())
        sae.W_enc.copy_(0.1 * noise(*sae.W_enc.shape))
        bias = getattr(sae, "b_gate", None)
        bias = sae.b_enc if bias is None else bias
        if not hasattr(sae.cfg, "k"):
            bias.sub_(RARE)
    return sae


def batches(n: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(48, D, generator=generator)
    found = []
    for _ in range(n):
        chosen = (torch.rand(B, 48, generator=generator) < 0.1).float()
        found.append((chosen @ directions + 0.1 * torch.randn(B, D, generator=generator)).to(dtype))
    return found


def sparse_from_the_start(sae: Any, x: torch.Tensor) -> None:
    """The first call of an encoder with a threshold is SAELens'; the rule then knows the part."""
    if not hasattr(sae.cfg, "k"):
        with torch.no_grad():
            sae.encode(x)


def gradients(sae: Any, x: torch.Tensor) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """All losses and gradients of one training forward pass with dead latents."""
    dead = torch.arange(F) % 7 == 0
    step = TrainStepInput(
        sae_in=x,
        dead_neuron_mask=dead,
        coefficients={"l0": 0.3, "l1": 0.2},
        n_training_steps=0,
        is_logging_step=False,
    )
    sae.zero_grad()
    out = sae.training_forward_pass(step)
    # What a loss on the codes themselves asks for: the gradient through the decoder's norms too.
    (out.loss + 0.01 * out.feature_acts.abs().sum()).backward()
    losses = {name: float(value.detach()) for name, value in out.losses.items()}
    return losses, {name: p.grad.clone() for name, p in sae.named_parameters()}


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


class Run:
    """20 steps of SAELens' own trainer and what it logged."""

    def __init__(self, kind: str, order: torch.Tensor | None = None, **options: Any) -> None:
        sae, self.data = make(kind), batches(20)
        if order is not None:  # the same SAE with its inputs in another order
            self.data = [x[:, order] for x in self.data]
            with torch.no_grad():
                sae.W_enc.copy_(sae.W_enc[order].clone())
                sae.W_dec.copy_(sae.W_dec[:, order].clone())
                sae.b_dec.copy_(sae.b_dec[order].clone())
        self.start = {name: p.detach().clone() for name, p in sae.named_parameters()}
        config = SAETrainerConfig(
            total_training_samples=10**9,
            train_batch_size_samples=B,
            lr=1e-3,
            lr_end=1e-4,
            device="cpu",
            dead_feature_window=3,
        )
        self.trainer = SAETrainer(config, sae, iter(()), **options)
        self.sae, self.logged = sae, []

    def steps(self, n: int = 20) -> Run:
        for x in self.data[:n]:
            out = self.trainer.step(x)
            self.trainer.n_training_steps += 1
            samples = self.trainer.n_training_samples
            self.logged.append(self.trainer.build_train_step_log_dict(out, samples))
        return self

    def weights(self, order: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        found = {name: p.detach().clone() for name, p in self.sae.named_parameters()}
        if order is not None:
            back = order.argsort()
            found["W_enc"], found["b_dec"] = found["W_enc"][back], found["b_dec"][back]
            found["W_dec"] = found["W_dec"][:, back]
        return found


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
    if "aux" not in kind:
        assert report.dense == {}, "a metric or a loss needed [B, F]"


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


# Inference.

INFERENCE: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("TopKSAE", {"k": K}),
    "topk by norm": ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "standard": ("StandardSAE", {}),
    "jumprelu": ("JumpReLUSAE", {}),
    "gated": ("GatedSAE", {}),
    "layer norm": ("StandardSAE", {"normalize_activations": "layer_norm"}),
    "transcoder": ("Transcoder", {"d_out": 16}),
    "skip transcoder": ("SkipTranscoder", {"d_out": 16}),
    "jumprelu transcoder": ("JumpReLUTranscoder", {"d_out": 16}),
    "jumprelu skip transcoder": ("JumpReLUSkipTranscoder", {"d_out": 16}),
}


def at_inference(kind: str) -> Any:
    name, settings = INFERENCE[kind]
    if "Transcoder" in name:
        settings = settings | {"apply_b_dec_to_input": False}
    sae = fill(getattr(saes, name)(getattr(saes, name + "Config")(d_in=D, d_sae=F, **settings)))
    with torch.no_grad():
        if hasattr(sae, "threshold"):
            sae.threshold.copy_(torch.linspace(-0.2, 0.4, F))
        if hasattr(sae, "W_skip"):
            sae.W_skip.copy_(torch.eye(16, D))
    return sae


@pytest.mark.parametrize("kind", INFERENCE)
@pytest.mark.parametrize("shape", [(B,), (4, B // 4)])
def test_saes_at_inference(kind: str, shape: tuple[int, ...]) -> None:
    sae, x = at_inference(kind), batches(1)[0].reshape(*shape, D)
    with torch.no_grad():
        expected, expected_out = sae.encode(x), sae(x)
        with sk.accelerate("sae_lens", level="module") as run:
            acts, out = sae.encode(x), sae(x)
            assert isinstance(acts, LazyCodes)
            assert run.report().taken[f"{type(sae).__name__}.encode"] == 2
            assert run.report().dense == {}
    torch.testing.assert_close(acts + 0, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(out, expected_out, atol=2e-5, rtol=1e-4)
    assert acts.shape == expected.shape
    assert out.dtype == expected_out.dtype


@pytest.mark.parametrize("kind", ["topk by norm", "gated", "jumprelu"])
def test_inference_has_the_same_gradient_at_the_input(kind: str) -> None:
    sae = at_inference(kind).to(torch.float64)
    x = batches(1, torch.float64)[0].requires_grad_()

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(sae(x).pow(3).sum() + sae.encode(x).pow(2).sum(), x)[0]

    expected = gradient()
    with sk.accelerate(sae, level="module") as run:
        found = gradient()
    assert run.report().left == ()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_half_precision_weights_hand_out_their_dtype() -> None:
    sae, x = at_inference("topk").to(torch.bfloat16), batches(1)[0].bfloat16()
    sae.cfg.apply_b_dec_to_input = False  # else both round x - b_dec, the exact one not
    with torch.no_grad():
        exact = copy.deepcopy(sae).to(torch.float64)(x)
        expected = sae(x)
        with sk.accelerate("sae_lens", level="module"):
            acts, out = sae.encode(x), sae(x)
    assert acts.dtype == out.dtype == torch.bfloat16
    # SAELens rounds pre-activations to bf16 before it selects; the kernels do not.
    assert (out - exact).norm() <= (expected - exact).norm()


# What is left to SAELens, and why.


class MyTopK(saes.TopKTrainingSAE):
    """Somebody's own."""


def test_reasons_for_leaving_a_call_to_them() -> None:
    x = batches(1)[0]
    plain = make("topk")

    def hooked(sae: Any) -> Any:
        sae.add_hook("hook_sae_acts_pre", lambda acts, hook: acts * 2)
        return sae

    cases = {
        "class MyTopK": MyTopK(copy.deepcopy(plain.cfg)),
        "hooks on hook_sae_acts_pre": hooked(make("topk")),
        "use_sparse_activations": make("topk", use_sparse_activations=True),
        "more than 5% of the latents fire, or the first step": make("standard"),
        "class AbsTopKTrainingSAE": saes.AbsTopKTrainingSAE(
            saes.AbsTopKTrainingSAEConfig(d_in=D, d_sae=F, k=K)
        ),
    }
    for why, sae in cases.items():
        expected = sae.encode_with_hidden_pre(x)
        with sk.accelerate("sae_lens", level="module") as run:
            found = sae.encode_with_hidden_pre(x)
        report = run.report()
        assert [one.why for one in report.left] == [why]
        assert report.taken == {}
        assert why in str(report)
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine.to_dense(), theirs.to_dense())


def test_strict_raises_instead() -> None:
    x = batches(1)[0]
    sae = make("topk", use_sparse_activations=True)
    with (
        sk.accelerate("sae_lens", level="module", strict=True),
        pytest.raises(AccelerationError, match="use_sparse_activations"),
    ):
        sae.encode(x)
    assert sae.encode(x).is_sparse, "as shipped again"
    with sk.accelerate("sae_lens", level="module", strict=True):
        make("standard").encode(x)  # by the rule, not for want of a kernel


def test_a_trainer_of_ones_own_alone() -> None:
    mine, other = Run("topk"), Run("topk")
    with sk.accelerate(mine.trainer, level="module") as run:
        other.steps(2)
        assert run.report().taken == {}
        mine.steps(2)
    assert run.report().taken["TopKTrainingSAE.encode_with_hidden_pre"] == 2
    assert mine.logged[0]["losses/mse_loss"] == pytest.approx(other.logged[0]["losses/mse_loss"])


def test_an_invalid_mode_is_still_refused_by_them() -> None:
    sae, x = make("jumprelu"), batches(1)[0]
    with sk.accelerate("sae_lens", level="module"):
        sparse_from_the_start(sae, x)
        sae.cfg.jumprelu_sparsity_loss_mode = "invalid"
        with pytest.raises(ValueError, match="Invalid sparsity loss mode: invalid"):
            gradients(sae, x)


def test_hooks_on_the_codes_change_what_is_decoded() -> None:
    sae, x = make("topk"), batches(1)[0]

    def silence(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts = acts.clone()
        acts[:, :100] = 0
        return acts

    sae.add_hook("hook_sae_acts_post", silence)
    expected = gradients(sae, x)
    with sk.accelerate("sae_lens", level="module") as run:
        found = gradients(sae, x)
    assert run.report().dense, "a write needs the tensor"
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, value in found[1].items():
        torch.testing.assert_close(value, expected[1][name], rtol=1e-4, atol=1e-5)


def test_the_gradient_at_the_codes() -> None:
    sae, x = make("topk", dtype="float64"), batches(1, torch.float64)[0]

    def gradient() -> torch.Tensor:
        acts = sae.encode(x)
        acts.retain_grad()
        (sae.decode(acts) - x).pow(2).sum().backward()
        return acts.grad

    expected = gradient()
    with sk.accelerate("sae_lens", level="module"):
        found = gradient()
        acts = sae.encode(x)
        sae.decode(acts)
        with pytest.raises(RuntimeError, match="before the codes are used"):
            acts.retain_grad()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_pre_activations_come_when_they_are_asked_for() -> None:
    sae, x = make("topk"), batches(1)[0]
    expected = sae.encode_with_hidden_pre(x)[1]
    with sk.accelerate("sae_lens", level="module") as run:
        late = sae.encode_with_hidden_pre(x)[1]
        assert isinstance(late, LateTensor)
        assert not late.computed
        torch.testing.assert_close(late + 0, expected)
        assert run.report().dense == {"pre-activations: add": 1}
        old = Run("topk").steps(1).trainer.step(x).hidden_pre
        with pytest.raises(RuntimeError, match="before the optimizer's step"):
            old.sum()


def test_torch_compile_runs_their_code() -> None:
    sae, x = make("topk"), batches(1)[0]
    with sk.accelerate("sae_lens", level="module"):
        compiled = torch.compile(sae.encode, backend="eager")
        torch.testing.assert_close(compiled(x) + 0, sae.encode(x) + 0)


def test_edits_between_steps_are_seen() -> None:
    def edited() -> list[float]:
        run = Run("topk").steps(2)
        with torch.no_grad():
            run.sae.W_dec[:10] *= 2
            run.sae.W_enc.data = run.sae.W_enc.data.contiguous() * 1.5
        return [float(run.trainer.step(x).loss.detach()) for x in run.data[2:6]]

    expected = edited()
    with sk.accelerate("sae_lens", level="module"):
        assert edited() == pytest.approx(expected, rel=1e-5)
