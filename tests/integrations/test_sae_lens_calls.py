"""Single calls of SAELens on these kernels: SAEs at inference, what is left to it, and why.

Runs where SAELens is installed; ``python -m benchmarks.peer_tests sae_lens`` runs it in the
environment that ``sae-kernels bench --setup-peers`` makes.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("sae_lens", reason="needs SAELens: python -m benchmarks.peer_tests sae_lens")

import torch
from sae_lens import saes
from sae_lens_cases import (
    INFERENCE,
    B,
    D,
    F,
    K,
    Run,
    at_inference,
    batches,
    gradients,
    make,
    sparse_from_the_start,
)

import sae_kernels as sk
from sae_kernels.errors import AccelerationError
from sae_kernels.integrations.late import LateTensor
from sae_kernels.integrations.lazy_codes import LazyCodes

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = {
        name: getattr(saes.TopKTrainingSAE, name) for name in ("decode", "encode_with_hidden_pre")
    }
    yield
    for name, function in before.items():
        assert getattr(saes.TopKTrainingSAE, name) is function


@pytest.mark.parametrize("kind", INFERENCE)
@pytest.mark.parametrize("shape", [(B,), (4, B // 4)])
def test_saes_at_inference(kind: str, shape: tuple[int, ...]) -> None:
    sae, x = at_inference(kind), batches(1)[0].reshape(*shape, D)
    with torch.no_grad():
        expected, expected_out = sae.encode(x), sae(x)
        with sk.accelerate("sae_lens", level="module") as run:
            sparse_from_the_start(sae, x)
            before = sum(run.report().taken.values())
            acts, out = sae.encode(x), sae(x)
            assert isinstance(acts, LazyCodes)
            assert sum(run.report().taken.values()) >= before + 2
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
        sparse_from_the_start(sae, x)
        found = gradient()
    assert run.report().taken[f"{type(sae).__name__}.encode"] >= 2
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


def test_inside_of_a_hooked_transformer() -> None:
    from sae_lens import HookedSAETransformer
    from transformer_lens import HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=8, d_head=D // 2, d_vocab=13, act_fn="relu", n_heads=2, seed=0
    )
    model, sae = HookedSAETransformer(config), at_inference("topk")
    sae.cfg.metadata.hook_name = "blocks.0.hook_resid_post"
    point = f"{sae.cfg.metadata.hook_name}.hook_sae_acts_post"
    tokens = torch.arange(24).reshape(3, 8) % 13
    with torch.no_grad():
        expected, cached = model.run_with_cache_with_saes(tokens, saes=[sae])
        with sk.accelerate("sae_lens") as run:
            logits = model.run_with_saes(tokens, saes=[sae])
            again, found = model.run_with_cache_with_saes(tokens, saes=[sae], names_filter=[point])
    assert run.report().taken == {"TopKSAE.encode": 2, "TopKSAE.decode": 2}
    assert run.report().left == ()
    assert isinstance(found[point], LazyCodes)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(again, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(found[point] + 0, cached[point], atol=2e-5, rtol=1e-4)


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


def test_codes_of_one_sae_in_the_decoder_of_another() -> None:
    one, other, x = make("topk"), make("topk"), batches(1)[0]
    with torch.no_grad():
        other.W_dec.mul_(torch.linspace(0.5, 2, F)[:, None])
        acts = one.encode(x)
        expected = other.decode(acts), one.decode(acts)
        with sk.accelerate("sae_lens", level="module"):
            acts = one.encode(x)
            found = other.decode(acts), one.decode(acts)
            one.W_dec.mul_(torch.linspace(0.5, 2, F)[:, None])
            edited = one.decode(acts)
    for mine, theirs in zip((*found, edited), (*expected, expected[0]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


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
