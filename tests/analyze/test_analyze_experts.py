"""What experts do: a router made by hand, and sums against tokens counted one by one."""

from __future__ import annotations

import math

import pytest
import torch

from sae_kernels.analyze import analyze, effective_number, expert_use
from sae_kernels.analyze.experts import ExpertMoments
from sae_kernels.nn import SwitchConfig, SwitchSAE, TopKConfig, TopKSAE
from sae_kernels.testing.budgets import gamma
from sae_kernels.training import evaluate

SUMS = 1e-12  # relative; fp64 sums of some thousand numbers, in another order
# Relative, of a sum of squares: the residual's subtraction in fp32, squared.
RESIDUALS = 2 * gamma(2, torch.float32)


def tokens(n, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 2 + torch.randn(n, width, generator=generator)


def switch(**options):
    return SwitchSAE(SwitchConfig(**{"d_in": 6, "n_latents": 24, "k": 3, "n_experts": 4} | options))


def test_a_router_made_by_hand():
    sae = switch(d_in=4)
    with torch.no_grad():
        sae.W_router.copy_(torch.eye(4))
        sae.b_router.zero_()
    # Four tokens for expert 0, two for 2, one for 3, none for 1; logits are 3 and zeros.
    x = 3 * torch.eye(4)[[0, 2, 0, 3, 0, 2, 0]]
    use = expert_use(sae, x)
    high = math.exp(3) / (math.exp(3) + 3)
    low = (1 - high) / 3
    F = torch.tensor([4, 0, 2, 1], dtype=torch.float64) / 7
    assert use.n_tokens.tolist() == [4, 0, 2, 1]
    assert torch.equal(use.load, F)
    off = gamma(8, torch.float32)  # of a softmax over four
    P = F * high + (1 - F) * low
    assert torch.allclose(use.probability, P, rtol=off, atol=0)
    chosen = use.chosen[[0, 2, 3]]
    assert torch.allclose(chosen, torch.full_like(chosen, high), rtol=off, atol=0)
    assert use.balance == pytest.approx(4 * float((F * P).sum()), rel=off)
    entropy = -sum(f * math.log(f) for f in F.tolist() if f)
    assert use.values()["entropy"] == pytest.approx(entropy, rel=SUMS)
    assert use.effective_experts == pytest.approx(math.exp(entropy), rel=SUMS)
    # Tokens of an expert are all the same here, so all variance is between experts.
    assert use.between == pytest.approx(1, rel=SUMS)
    assert use.chosen[1].isnan()
    assert use.fvu[1].isnan()


@pytest.mark.parametrize("gate", ["softmax", "heaviside"])
@pytest.mark.parametrize("shared", [False, True])
def test_sums_are_those_of_the_tokens_one_by_one(gate, shared):
    sae = switch(gate=gate, shared_expert=shared)
    x = tokens(5000, 6)  # more than a batch
    use = expert_use(sae, x)
    with torch.no_grad():
        x_hat, codes = sae(x)
    experts, centred = codes.routing.experts, x.double() - x.double().mean(0)
    error = (x.double() - x_hat.double()).square().sum(1)
    total = centred.square().sum()
    between = 0.0
    for e in range(4 - shared):
        own = experts == e
        assert int(use.n_tokens[e]) == int(own.sum()) > 0
        about = centred[own].square().sum()
        assert float(use.fvu[e]) == pytest.approx(float(error[own].sum() / about), rel=RESIDUALS)
        offset = centred[own].mean(0).norm() / (total / 5000).sqrt()
        assert float(use.offset[e]) == pytest.approx(float(offset), rel=1e-9)
        between += float(own.sum() * centred[own].mean(0).square().sum() / total)
    assert use.between == pytest.approx(between, rel=1e-9)
    assert 0 < use.between < 1


def test_one_expert_has_it_all_and_agrees_with_evaluate():
    sae = switch(n_experts=1)
    x = tokens(300, 6)
    use, measured = expert_use(sae, x), evaluate(sae, x)
    assert (use.balance, use.effective_experts) == (1, 1)
    assert use.between == pytest.approx(0, abs=SUMS)
    assert float(use.fvu[0]) == pytest.approx(measured.fvu, rel=RESIDUALS)


def test_a_transcoder_is_measured_on_its_target():
    sae = switch(d_out=5, subtract_b_dec=False)
    x, target = tokens(200, 6), tokens(200, 5, seed=1)
    use = expert_use(sae, x, target=target)
    with torch.no_grad():
        x_hat, codes = sae(x)
    own = codes.routing.experts == 0
    error = (target - x_hat)[own].double().square().sum()
    about = (target.double() - target.double().mean(0))[own].square().sum()
    assert float(use.fvu[0]) == pytest.approx(float(error / about), rel=RESIDUALS)
    whole = analyze(sae, x, target=target)
    assert whole.evaluation.fvu == pytest.approx(evaluate(sae, x, target=target).fvu)


def test_equal_tokens_have_no_variance_and_give_no_nan():
    use = expert_use(switch(), torch.ones(20, 6))
    assert use.between == 0
    assert use.effective_experts == 1


def test_moments_far_from_zero():
    x = 1000 + tokens(400, 3)
    experts = torch.arange(400) % 2
    moments = ExpertMoments(2, 3)
    for start in range(0, 400, 150):
        moments.add(experts[start : start + 150], x[start : start + 150])
    centred = x.double() - x.double().mean(0)
    want = torch.stack([centred[experts == e].square().sum() for e in (0, 1)])
    # Differences of sums that are 1e6 times as large.
    assert torch.allclose(moments.about_mean(), want, rtol=1e-8)


def test_effective_number_counts_the_busy():
    assert effective_number(torch.tensor([0.5, 0.0, 0.5])) == pytest.approx(2)


def test_dead_latents_are_counted_in_their_expert():
    sae = switch(gate="heaviside")
    x = tokens(500, 6)
    with torch.no_grad():
        sae.b_enc[:5] = -1e6  # of expert 0's six
        sae.W_dec[2] = 0
    found = analyze(sae, x)
    dead = found.dead()
    fired = torch.zeros(24, dtype=torch.bool)
    with torch.no_grad():
        codes = sae.encode(x)
    fired[codes.indices[codes.values > 0].long()] = True
    assert torch.equal(dead, (~fired).double().view(4, 6).mean(1))
    assert dead[0] >= 5 / 6
    assert found.geometry.zero.nonzero().tolist() == [[2]]
    assert found.values()["experts"]["by_expert"]["dead"] == dead.tolist()


def test_a_shared_expert_is_named_apart():
    values = analyze(switch(shared_expert=True), tokens(100, 6)).values()["experts"]
    assert len(values["by_expert"]["load"]) == len(values["by_expert"]["dead"]) == 3
    assert 0 <= values["shared_dead"] <= 1


def test_other_architectures_have_no_experts():
    sae = TopKSAE(TopKConfig(6, 24, 3))
    found = analyze(sae, tokens(100, 6))
    assert found.use is None
    values = found.values()
    assert values["n_experts"] is None
    assert set(values["neighbours"]) == {"nearest"}
    assert "experts" not in values
    assert "evaluation" not in analyze(sae).values()


def test_the_encoder_s_rows():
    sae = switch()
    with torch.no_grad():
        sae.W_enc[7] = sae.W_enc[20]
    assert analyze(sae, side="encoder").geometry.groups[20] == 7
    assert analyze(sae).geometry.groups[20] == 20
    with pytest.raises(ValueError, match="side: expected decoder or encoder, got 'both'"):
        analyze(sae, side="both")


def test_it_is_left_in_its_mode():
    sae = switch().train()
    analyze(sae, tokens(20, 6))
    assert sae.training
