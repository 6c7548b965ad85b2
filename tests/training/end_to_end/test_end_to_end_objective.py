"""The end-to-end loss of every architecture against a dense form in fp64, penalties included."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    TopKConfig,
    build,
)
from sae_kernels.step import AutogradStep
from sae_kernels.step.state import DeadLatents
from sae_kernels.testing import DenseSpec, dense_loss
from sae_kernels.training.end_to_end import EndToEnd, EndToEndLoss, end_to_end_loss
from tests.harvest.causal import D, Replaced, gpt2
from tests.settings import settings

if TYPE_CHECKING:
    from sae_kernels.nn import SAEConfig, SparseAutoencoder
    from sae_kernels.testing.dense import DenseResult

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

F, K, SCALE, LAYER = 48, 4, 0.7, "h.0"
DEAD = [2, 9, 30]
_SCALED = {"activation_scale": SCALE}
_JUMP = {"bandwidth": 0.45, "threshold_init": 0.6, **_SCALED}
_L1 = {"sparsity": "l1", "sparsity_coefficient": 0.4}
_L1_SPEC: dict[str, Any] = {"penalty": "l1", "coefficient": 0.4}


@dataclasses.dataclass(frozen=True)
class Case:
    """An SAE, the settings of its loss, and the dense form of both."""

    sae: SAEConfig
    spec: DenseSpec
    train: dict[str, Any] = dataclasses.field(default_factory=dict)

    def loss(self, sae: SparseAutoencoder, coefficient: float, **changes: Any) -> EndToEndLoss:
        """What is tested, with this weight of the reconstruction."""
        given = {"auxk_alpha": 0.0, "sparsity_warmup_steps": 0, **self.train, **changes}
        step = AutogradStep(sae, settings(sae, **given).objective)
        step.restore_()  # the dtype of the SAE itself, fp64
        step.dead = _dead()
        return end_to_end_loss(
            gpt2().double(),
            _ids(),
            LAYER,
            sae,
            EndToEnd(reconstruction_coefficient=coefficient),
            step=step,
        )


CASES = {
    "topk": Case(TopKConfig(D, F, K, **_SCALED), DenseSpec("topk", k=K)),
    "relu": Case(ReLUConfig(D, F, **_SCALED), DenseSpec("relu", **_L1_SPEC), _L1),
    "relu-weighted": Case(
        ReLUConfig(D, F, unit_norm_decoder=False, **_SCALED),
        DenseSpec("relu", **_L1_SPEC, norm_weighted=True),
        {**_L1, "sparsity_norm_weighted": True, "loss": "mse"},
    ),
    "jumprelu": Case(
        JumpReLUConfig(D, F, **_JUMP),
        DenseSpec("jumprelu", bandwidth=0.45, penalty="target_l0", target_l0=6.0, coefficient=0.3),
        {"sparsity": "target_l0", "target_l0": 6.0, "sparsity_coefficient": 0.3},
    ),
    "jumprelu-raw": Case(
        JumpReLUConfig(D, F, log_threshold=False, **_JUMP),
        DenseSpec("jumprelu", bandwidth=0.45, penalty="tanh", coefficient=0.3, preact=0.2),
        {"sparsity": "tanh", "sparsity_coefficient": 0.3, "preact_coefficient": 0.2},
    ),
    "gated": Case(GatedConfig(D, F, **_SCALED), DenseSpec("gated", **_L1_SPEC), _L1),
    "gated-free": Case(
        GatedConfig(D, F, frozen_decoder=False, **_SCALED),
        DenseSpec("gated", **_L1_SPEC, aux_stops_decoder=False),
        {**_L1, "loss": "mse"},
    ),
    "multi-topk": Case(
        TopKConfig(D, F, K, **_SCALED),
        DenseSpec("topk", k=K, multi_topk=True),
        {"multi_topk": True},
    ),
    "matryoshka": Case(
        BatchTopKConfig(D, F, k=K, groups=(5, 11, F - 16), **_SCALED),
        DenseSpec("batchtopk", k=K, group_ends=(5, 16, F)),
    ),
}
# Thresholds and the weights of prefixes are fp32 whatever the module is cast to.
FP32 = ("jumprelu-raw", "matryoshka")
WITHOUT_RECONSTRUCTION = [name for name in CASES if name not in ("multi-topk", "matryoshka")]


def _ids() -> Tensor:
    return torch.randint(15, (3, 7), generator=torch.Generator().manual_seed(0))


def _dead() -> DeadLatents:
    dead = DeadLatents(F, after=10)
    dead.since_fired[DEAD] = 10
    return dead


def _drawn(config: SAEConfig) -> SparseAutoencoder:
    """In training mode, in fp64, no weight where it starts."""
    sae, g = build(config).double(), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(torch.randn(p.shape, generator=g), alpha=0.2 if p.dim() == 1 else 0.05)
    return sae


def _by_hand(case: Case, sae: SparseAutoencoder, c: float) -> tuple[Tensor, DenseResult, Tensor]:
    """The loss of a block exchanged by hand for the dense oracle; its result and its tokens."""
    p = {name: tensor.double() for name, tensor in sae.named_parameters()}
    spec = dataclasses.replace(case.spec, loss=case.train.get("loss", "fvu"))
    found: list[tuple[Tensor, DenseResult]] = []

    def reconstruct(x: Tensor) -> Tensor:
        rows = SCALE * x.flatten(0, 1)
        found.append((rows, dense_loss(spec, p, rows, dead=_dead().mask())))
        return (found[0][1].y_hat / SCALE).reshape(x.shape)

    clean, spliced = gpt2().double(), gpt2().double()
    spliced.transformer.h[0] = Replaced(spliced.transformer.h[0], reconstruct)
    a, b = (model(input_ids=_ids()).logits.log_softmax(-1) for model in (clean, spliced))
    kl = (a.exp() * (a - b)).sum() / _ids().numel()
    ((x, dense),) = found
    variance = (x - x.mean(0)).square().sum()
    unit = variance / len(x) if spec.loss == "mse" else 1.0
    error = c * dense.reconstruction
    if spec.selection == "gated":  # what the gate reconstructs counts in any case
        main = unit * (dense.y_hat - x).square().sum() / variance
        error = c * main + dense.reconstruction - main
    return unit * kl + error + dense.penalty, dense, x


@pytest.mark.parametrize(
    ("name", "coefficient"),
    [(name, 0.4) for name in CASES] + [(name, 0.0) for name in WITHOUT_RECONSTRUCTION],
)
def test_the_loss_and_all_gradients_are_the_dense_form_s(name: str, coefficient: float) -> None:
    case = CASES[name]
    sae = _drawn(case.sae)
    got = case.loss(sae, coefficient)
    want, dense, x = _by_hand(case, sae, coefficient)
    # A few hundred roundings of fp64, in another order; of fp32 a few.
    roundings = 2**-22 if name in FP32 else 1e-12
    assert float(got.loss.detach()) == pytest.approx(float(want.detach()), rel=roundings)
    penalty = float(dense.penalty.detach())
    assert float(got.sparsity) == pytest.approx(penalty, rel=roundings, abs=0)
    assert (float(got.sparsity) > 0) == (case.spec.penalty != "none")
    assert float(got.l0) == pytest.approx(float((dense.codes > 0).sum()) / len(x), rel=2**-23)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    ours = torch.autograd.grad(got.loss, parameters)
    theirs = torch.autograd.grad(want, parameters)
    for parameter, a, b in zip(names, ours, theirs, strict=True):
        assert b.abs().max() > 0, parameter
        least = 2**-20 if name in FP32 or b.dtype == torch.float32 else 1e-9
        torch.testing.assert_close(a, b, rtol=least, atol=least * float(b.abs().max()))


def test_a_gate_learns_from_the_penalty_and_from_its_own_reconstruction_alone() -> None:
    case = CASES["gated"]
    sae = _drawn(case.sae)
    (both,) = torch.autograd.grad(case.loss(sae, 0.0).loss, [sae.b_enc])
    without = {"sparsity": "none", "sparsity_coefficient": 0.0}
    (auxiliary,) = torch.autograd.grad(case.loss(sae, 0.0, **without).loss, [sae.b_enc])
    assert auxiliary.abs().max() > 0
    # The penalty's own slope: its coefficient times how often the gate was open, a mean.
    x = SCALE * _layer_output()
    gate = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    slope = 0.4 * (gate > 0).double().mean(0)
    torch.testing.assert_close(both - auxiliary, slope, rtol=1e-9, atol=1e-12)


def _layer_output() -> Tensor:
    """[n, D], as transformers hands it out."""
    states = gpt2().double().transformer(_ids(), output_hidden_states=True).hidden_states
    return states[1].detach().flatten(0, 1)


def test_dead_latents_reconstruct_the_residual() -> None:
    """AuxK in its dense form: fewer dead latents than k_aux = D / 2, so all of them are kept."""
    case = CASES["topk"]
    sae = _drawn(case.sae)
    got, plain = case.loss(sae, 0.4, auxk_alpha=0.25), case.loss(sae, 0.4)
    x = SCALE * _layer_output()
    residual = (x - sae.decode_scaled(sae.encode_scaled(x))).detach()
    codes = ((x - sae.b_dec).detach() @ sae.W_enc[DEAD].T + sae.b_enc[DEAD]).relu()
    variance = (residual - residual.mean(0)).square().sum()
    weight = 0.25 * len(DEAD) / (D // 2) / variance
    want = weight * (codes @ sae.W_dec[DEAD] - residual).square().sum()
    # AuxK's own products give fp32.
    assert float(got.aux_loss) == pytest.approx(float(want.detach()), rel=2**-18)
    loss = float(plain.loss.detach()) + float(got.aux_loss)
    assert float(got.loss.detach()) == pytest.approx(loss, rel=1e-12)
    assert float(plain.aux_loss) == 0


def test_another_k_than_the_configuration_s() -> None:
    sae = _drawn(CASES["topk"].sae)
    assert float(end_to_end_loss(gpt2().double(), _ids(), LAYER, sae, k=9).l0) > K


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (
            TopKConfig(D, F, K, groups=(16, F - 16)),
            {},
            "reconstruction_coefficient: expected a number above 0 with groups",
        ),
        (TopKConfig(D, F, K), {"multi_topk": True}, "reconstruction_coefficient: expected"),
        (TopKConfig(D, F, K), {"random_prefixes": 3}, "reconstruction_coefficient: expected"),
        (
            TopKConfig(D, F, K),
            {"sparsity": "l0", "sparsity_coefficient": 1.0},
            "sparsity: expected one of none, l1, lp, tanh, got 'l0'",
        ),
        (
            TopKConfig(D, F, K, d_out=D, subtract_b_dec=False),
            {},
            "expected an SAE that reconstructs it, got a transcoder",
        ),
        (TopKConfig(D // 2, F, K, n_layers=2), {}, "this layer alone, got a crosscoder of 2"),
    ],
    ids=["groups", "multi-topk", "random-prefixes", "penalty", "transcoder", "crosscoder"],
)
def test_what_does_not_go_together(
    config: SAEConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Case(config, DenseSpec("topk", k=K), settings).loss(build(config).double(), 0.0)
