"""SwitchSAE: one expert is a TopK SAE, and nobody's tokens are special."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_kernels.functional import load_balance
from sae_kernels.nn import SwitchConfig, SwitchSAE, TopKConfig, TopKSAE, from_weights
from sae_kernels.testing import assert_bitwise, assert_within, gamma
from tests.nn.switch_spec import F64, B, D, E, F, K, each, exact, sae_of, x_of
from tests.torch_versions import one_graph


def positive(sae: SwitchSAE, expert: int) -> Tensor:
    """Tokens that all go to one expert."""
    with torch.no_grad():
        sae.W_router.zero_()
        sae.W_router[expert] = 5
        sae.b_router.zero_()
        sae.b_dec.zero_()
    return x_of(B).abs()


# -- one expert ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["softmax", "heaviside"])
def test_one_expert_is_a_topk_sae_bit_by_bit(gate: str) -> None:
    sae, x = sae_of(1, gate=gate), x_of(B).requires_grad_()
    top = TopKSAE(TopKConfig(D, F, K))
    top.load_state_dict({n: t for n, t in sae.state_dict().items() if "router" not in n})
    x_hat, codes = sae(x)
    same = x.detach().clone().requires_grad_()
    want, want_codes = top(same)
    assert_bitwise("indices", codes.indices, want_codes.indices)
    assert_bitwise("values", codes.values, want_codes.values)
    assert_bitwise("x_hat", x_hat, want)
    (x_hat - x).square().sum().backward()
    (want - same).square().sum().backward()
    for name, p in top.named_parameters():
        assert_bitwise(name, sae.get_parameter(name).grad, p.grad)
    # A gate of one expert is 1 wherever the token lies: p (1 - p) = 0, with its sign.
    assert sae.W_router.grad is None or not sae.W_router.grad.any()
    assert_bitwise("x", x.grad + 0.0, same.grad + 0.0)


# -- the shared expert -----------------------------------------------------------------------------


@pytest.mark.parametrize("gate", ["softmax", "heaviside"])
def test_a_shared_expert_competes_with_the_chosen_one(gate: str) -> None:
    sae, x = sae_of(gate=gate, shared_expert=True).double(), x_of(B).double()
    codes, dense = sae.encode(x), exact(sae, x)
    budget = gamma(D + E + 16, F64) * dense.size
    assert_within("codes", codes.to_dense(), dense.codes, budget)
    width = sae.config.expert_width
    shared = codes.indices < width
    assert shared.any(1).logical_and((~shared).any(1)).any(), "no token has both"
    own = (codes.indices // width - 1) == codes.routing.experts[:, None]
    assert (shared | own).all()
    assert dense.experts.unique().numel() > 2
    keys = codes.values
    assert (keys[:, :-1] >= keys[:, 1:]).all(), "not the largest first"


def test_ties_go_to_the_lower_latent() -> None:
    sae = SwitchSAE(SwitchConfig(2, 6, k=2, n_experts=3, gate="heaviside", shared_expert=True))
    with torch.no_grad():
        sae.W_enc.fill_(1)
        sae.W_router.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    x = torch.ones(1, 2)
    assert sae.encode(x).indices.tolist() == [[0, 1]]
    with torch.no_grad():
        sae.b_enc[0] = -1
    assert sae.encode(x).indices.tolist() == [[1, 4]]  # the router took the last expert
    with torch.no_grad():
        sae.b_enc[4:] = 0.5
    assert sae.encode(x).indices.tolist() == [[4, 5]]


# -- batches ---------------------------------------------------------------------------------------


@each
def test_a_row_does_not_depend_on_the_batch_around_it(options: dict[str, Any]) -> None:
    """Fewer tokens than experts, one, none, and any leading shape."""
    sae, x = sae_of(**options), x_of(B)
    whole = sae(x)
    for few in (1, E - 2):
        part = sae(x[:few])
        assert_bitwise("x_hat", part.x_hat, whole.x_hat[:few])
        assert_bitwise("indices", part.codes.indices, whole.codes.indices[:few])
    folded = sae(x.reshape(4, 2, -1, D))
    assert_bitwise("x_hat", folded.x_hat.reshape(B, D), whole.x_hat)
    assert folded.codes.batch_shape == (4, 2, B // 8)
    empty = sae(x[:0].reshape(0, 3, D))
    assert empty.x_hat.shape == (0, 3, D)
    assert empty.codes.routing.load().tolist() == [0.0] * sae.config.n_routed


@each
def test_an_expert_without_tokens_learns_nothing(options: dict[str, Any]) -> None:
    sae = sae_of(**options)
    x = positive(sae, expert=1)
    x_hat, codes = sae(x)
    dense = exact(sae, x)
    assert set(codes.routing.experts.tolist()) == {1}
    assert codes.routing.load().tolist() == [float(e == 1) for e in range(sae.config.n_routed)]
    budget = gamma(D + F + E + 24, torch.float32)
    terms = (dense.size * dense.kept) @ sae.W_dec.detach().double().abs()
    assert_within("x_hat", x_hat, dense.x_hat, budget * terms)
    (x_hat - x).square().sum().backward()
    width = sae.config.expert_width
    used = 1 + sae.config.shared_expert
    idle = [e for e in range(E) if e != used and (e or not sae.config.shared_expert)]
    for p in (sae.W_enc, sae.W_dec, sae.b_enc):
        by_expert = p.grad.unflatten(0, (E, width))
        assert by_expert.isfinite().all()
        assert not by_expert[idle].any()
        assert by_expert[used].any()


def test_what_is_not_positive_keeps_its_place_and_did_not_fire() -> None:
    sae, x = sae_of(), x_of(B)
    with torch.no_grad():
        sae.b_enc -= 100
    x_hat, codes = sae(x)
    assert_bitwise("values", codes.values, torch.zeros(B, K))
    assert (codes.indices // sae.config.expert_width == codes.routing.experts[:, None]).all()
    assert not codes.latent_order().counts().any()
    assert_bitwise("x_hat", x_hat, sae.b_dec.detach().expand(B, D).contiguous())
    (x_hat - x).square().sum().backward()
    for name in ("W_enc", "b_enc", "W_dec", "W_router"):
        assert not sae.get_parameter(name).grad.any(), name


# -- NaN -------------------------------------------------------------------------------------------


@each
def test_a_token_with_nan_is_alone_in_it(options: dict[str, Any]) -> None:
    sae, x = sae_of(**options), x_of(B)
    honest = sae(x).x_hat
    x[3, 7] = torch.nan
    x_hat, codes = sae(x)
    assert codes.values[3].isnan().all()
    assert x_hat[3].isnan().all()
    others = torch.arange(B) != 3
    assert_bitwise("others", x_hat[others], honest[others])


@each
def test_nan_in_a_row_of_the_router_is_not_hidden(options: dict[str, Any]) -> None:
    sae, x = sae_of(**options), x_of(B)
    with torch.no_grad():
        sae.W_router[2, 5] = torch.nan
    x_hat, codes = sae(x)
    assert set(codes.routing.experts.tolist()) == {2}
    assert load_balance(codes.routing).isnan()
    if sae.config.gate == "softmax":
        assert x_hat.isnan().all()


# -- the rest of a module --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_activations(dtype: torch.dtype) -> None:
    """Only the input and the output are rounded: in between it is the fp32 SAE."""
    sae, x = sae_of(activation_scale=3.7), x_of(B).to(dtype)
    x_hat, codes = sae(x)
    assert x_hat.dtype == dtype
    assert codes.values.dtype == codes.routing.probabilities.dtype == torch.float32
    want = sae(x.float())
    assert_bitwise("x_hat", x_hat, want.x_hat.to(dtype))
    assert_bitwise("values", codes.values, want.codes.values)


@each
def test_a_cast_module_computes_in_its_dtype(options: dict[str, Any]) -> None:
    """In bf16: the fp32 module whose operands are rounded, as biases of zero leave no other."""
    sae, x = sae_of(**options), x_of(B).bfloat16()
    with torch.no_grad():
        for p in sae.parameters():
            p.mul_(p.dim() > 1).copy_(p.bfloat16())
    half = copy.deepcopy(sae).bfloat16()
    sae.compute_dtype = torch.bfloat16
    got, want = half(x), sae(x.float())
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert_bitwise("experts", got.codes.routing.experts, want.codes.routing.experts)
    assert_bitwise("values", got.codes.values, want.codes.values)
    assert_bitwise("x_hat", got.x_hat, want.x_hat.bfloat16())
    assert sae_of(**options).double()(x.double()).codes.routing.probabilities.dtype == F64


def test_autocast_sets_the_dtype_of_the_operands() -> None:
    sae, x = sae_of(), x_of(B)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = sae(x).codes
    sae.compute_dtype = torch.bfloat16
    alone = sae(x).codes
    assert_bitwise("values", under.values, alone.values)
    assert_bitwise("experts", under.routing.experts, alone.routing.experts)


@one_graph
@pytest.mark.sampled(1)
@pytest.mark.usefixtures("one_thread")
@each
def test_compiled_it_is_the_same(options: dict[str, Any]) -> None:
    sae = sae_of(**options)
    twin = copy.deepcopy(sae)
    torch._dynamo.reset()
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (7, B):
        x = x_of(batch)
        got, want = compiled(x), twin(x)
        assert_bitwise("indices", got.codes.indices, want.codes.indices)
        # The same operators run in both; only torch's own part of the graph may differ.
        slack = 8 * torch.finfo(torch.float32).eps * want.x_hat.abs().max()
        assert_within("x_hat", got.x_hat, want.x_hat, slack.detach())
    (got.x_hat - x).square().sum().backward()
    (want.x_hat - x).square().sum().backward()
    for name, p in twin.named_parameters():
        grad = sae.get_parameter(name).grad
        if p.grad is None:
            assert grad is None or not grad.any(), name
            continue
        slack = 64 * torch.finfo(torch.float32).eps * p.grad.abs().max()
        assert_within(name, grad, p.grad, slack)
    torch._dynamo.reset()


def test_repr_names_what_is_not_the_default() -> None:
    sae = sae_of(gate="heaviside", shared_expert=True)
    assert repr(sae) == (
        f"SwitchSAE(d_in={D}, n_latents={F}, k={K}, n_experts={E}, gate=heaviside, "
        "shared_expert=True)"
    )


def test_another_k_and_what_it_must_not_be() -> None:
    sae, x = sae_of(), x_of(B)
    codes = sae.encode(x, k=F // E)
    want = from_weights(dataclasses.replace(sae.config, k=F // E), sae.state_dict())
    assert_bitwise("indices", codes.indices, want.encode(x).indices)
    for k in (0, F // E + 1):
        with pytest.raises(ValueError, match=f"k: .*got {k}"):
            sae.encode(x, k=k)


def test_both_biases_start_at_the_median_and_live_apart() -> None:
    """In amudide/switch_sae they are one tensor, which Adam then moves twice."""
    sae, x = sae_of(activation_scale=3.0), torch.tensor([[1.0] * D, [1.0] * D, [7.0] * D])
    sae.initialise_b_dec_(x)
    assert sae.b_dec.tolist() == pytest.approx([3.0] * D, rel=1e-4)
    assert_bitwise("b_router", sae.b_router.detach(), sae.b_dec.detach())
    with torch.no_grad():
        sae.b_router += 1
    assert sae.b_dec.tolist() == pytest.approx([3.0] * D, rel=1e-4)


def test_a_transcoder_s_router_does_not_start_at_the_targets_median() -> None:
    config = SwitchConfig(D, F, k=K, n_experts=E, d_out=4, subtract_b_dec=False)
    sae = SwitchSAE(config)
    sae.initialise_b_dec_(torch.ones(3, 4))
    assert sae.b_dec.tolist() == [1.0] * 4
    assert not sae.b_router.any()
