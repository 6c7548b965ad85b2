"""The routed functional form: gradients, the load balance, trees, compiling and messages."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.utils import _pytree

from sae_kernels import decode, encode_topk
from sae_kernels.functional import RoutedCodes, Routing, load_balance, route_top1
from sae_kernels.testing import assert_bitwise, assert_within
from tests.functional.functional_examples import SLACK, subset_of
from tests.torch_versions import one_graph

if TYPE_CHECKING:
    from collections.abc import Callable

PRIMITIVES = ("route_top1", "select_topk_routed")
pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")
B, D, F, K, E = 9, 7, 12, 2, 3
SUBSETS = [s for s in itertools.product([True, False], repeat=3) if any(s)]
f64 = torch.float64


def operands() -> tuple[torch.Tensor, ...]:
    """x, W_router, b_router, W_enc, b_enc."""
    shapes = ((B, D), (E, D), (D,), (F, D), (F,))
    return tuple(torch.randn(*shape, dtype=f64) for shape in shapes)


@pytest.mark.parametrize("needed", SUBSETS, ids=lambda s: subset_of("x W_router b_router", s))
def test_router_gradcheck(needed: tuple[bool, ...], either_backend: str) -> None:
    tensors = operands()[:3]
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)

    def probabilities(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return route_top1(x, W, b, backend=either_backend).probabilities

    torch.autograd.gradcheck(probabilities, tensors, nondet_tol=0.0)


def test_routed_encode_gradcheck(either_backend: str) -> None:
    x, W_router, b_router, W, b = operands()
    routing = route_top1(x, W_router, b_router, backend=either_backend)

    def values(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return encode_topk(x, W, b, K, routing=routing, backend=either_backend).values

    leaves = tuple(t.requires_grad_() for t in (x, W, b))
    torch.autograd.gradcheck(values, leaves, nondet_tol=0.0)


def test_gates_gradcheck(either_backend: str) -> None:
    """Reconstruction with the gate in it, from the router's weights to the loss."""
    x, W_router, b_router, W, b = operands()

    def x_hat(W_router: torch.Tensor, b_router: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        routing = route_top1(x, W_router, b_router, backend=either_backend)
        codes = encode_topk(x, W, b, K, routing=routing, backend=either_backend)
        gated = codes.with_values(codes.values * routing.gates()[:, None])
        return decode(gated, W, backend=either_backend)

    leaves = tuple(t.requires_grad_() for t in (W_router, b_router, W))
    torch.autograd.gradcheck(x_hat, leaves, nondet_tol=0.0)


def test_the_load_balance_by_hand() -> None:
    """Logits ln 3 and 0 for three tokens, the other way round for one."""
    x = torch.tensor([[1.0], [1.0], [1.0], [-1.0]], dtype=f64)
    W = torch.tensor([[3.0], [1.0]], dtype=f64).log().requires_grad_()
    routing = route_top1(x, W)
    assert routing.load().tolist() == [0.75, 0.25]
    P = (3 * 0.75 + 0.25) / 4
    value = load_balance(routing)
    assert_within("value", value, torch.tensor(2 * (0.75 * P + 0.25 * (1 - P)), dtype=f64), SLACK)
    value.backward()
    # dP_0 / dW_0 = mean_b p_0 p_1 x_b, each token's p_0 p_1 being 3 / 16; F has no gradient.
    slope = 2 * (0.75 - 0.25) * 3 / 16 * (3 - 1) / 4
    assert W.grad is not None
    assert_within("W", W.grad, torch.tensor([[slope], [-slope]], dtype=f64), SLACK)


def test_one_busy_expert_is_as_bad_as_it_gets() -> None:
    x = torch.full((5, 1), 100.0)
    W = torch.tensor([[1.0], [0.0], [0.0], [0.0]])
    assert float(load_balance(route_top1(x, W))) == 4.0


def test_tokens_are_sorted_by_expert_and_then_by_number(backend: str) -> None:
    experts = torch.tensor([2, 0, 2, 2, 0, 3, 2])
    routing = route_top1(torch.eye(4)[experts], torch.eye(4), backend=backend)
    assert routing.experts.tolist() == experts.tolist()
    assert routing.tokens.tolist() == [1, 4, 0, 2, 3, 6, 5]
    assert routing.starts.tolist() == [0, 2, 2, 6, 7]


def test_leading_shapes_and_empty_batches() -> None:
    x, W_router, b_router, W, b = operands()
    flat = encode_topk(x, W, b, K, routing=route_top1(x, W_router, b_router))
    x = x.reshape(3, 3, D)
    routing = route_top1(x, W_router, b_router)
    codes = encode_topk(x, W, b, K, routing=routing)
    assert codes.values.shape == codes.indices.shape == (3, 3, K)
    assert_bitwise("values", codes.values.reshape(-1, K), flat.values)
    assert_bitwise("indices", codes.indices.reshape(-1, K), flat.indices)
    empty = route_top1(x[:0], W_router)
    assert empty.starts.tolist() == [0] * (E + 1)
    assert encode_topk(x[:0], W, b, K, routing=empty).values.shape == (0, 3, K)
    assert empty.load().tolist() == [0.0] * E


def test_routed_codes_are_a_tree_and_keep_their_routing() -> None:
    x, W_router, _, W, b = operands()
    codes = encode_topk(x, W, b, K, routing=route_top1(x, W_router))
    leaves, spec = _pytree.tree_flatten(codes)
    assert len(leaves) == 6
    back = _pytree.tree_unflatten(leaves, spec)
    assert isinstance(back, RoutedCodes)
    assert (back.n_latents, back.batch_shape) == (F, (B,))
    for name, a, e in zip(Routing._fields, back.routing, codes.routing, strict=True):
        assert_bitwise(name, a, e)
    doubled = _pytree.tree_map(lambda t: t * 2, codes)
    assert_bitwise("values", doubled.values, codes.values * 2)
    assert codes.with_values(codes.values * 2).routing is codes.routing
    assert codes.to_dense().shape == (B, F)


class Gated(torch.nn.Module):
    """A router, an encoder and a decoder."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"W_router": (E, D), "b_router": (D,), "W_enc": (F, D), "b_enc": (F,)}
        for name, shape in shapes.items():
            setattr(self, name, torch.nn.Parameter(torch.randn(shape)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, RoutedCodes]:
        """Squared error and load balance, and the codes."""
        p: Any = self
        routing = route_top1(x, p.W_router, p.b_router)
        codes = encode_topk(x, p.W_enc, p.b_enc, K, routing=routing)
        gated = codes.with_values(codes.values * routing.gates()[:, None])
        error = (decode(gated, p.W_enc) - x).square().mean()
        return error + load_balance(routing), codes


@one_graph
@pytest.mark.full
def test_compiled_for_any_batch_and_equal_to_eager() -> None:
    torch._dynamo.reset()
    module = Gated()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for batch in (5, 8, 33):
        x = torch.randn(batch, D)
        found = {}
        for name, function in (("eager", module), ("compiled", compiled)):
            module.zero_grad()
            loss, codes = function(x)
            loss.backward()
            grads = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
            found[name] = {"loss": loss.detach(), "indices": codes.indices, **grads}
        assert len(found["eager"]) == 6, "every parameter has a gradient"
        for name, expected in found["eager"].items():
            # The same operators run in both; only torch's own part of the graph may differ.
            slack = 8 * torch.finfo(torch.float32).eps * expected.double().abs().max()
            assert_within(name, found["compiled"][name], expected.double(), slack)
    torch._dynamo.reset()


def test_second_order_gradients_are_refused() -> None:
    x, W_router, _, _, _ = operands()
    W_router.requires_grad_()
    total = route_top1(x, W_router).probabilities.square().sum()
    with pytest.raises(RuntimeError, match="first-order"):
        torch.autograd.grad(total, W_router, create_graph=True)


def test_autocast_rounds_the_operands() -> None:
    x, W_router, b_router, _, _ = (t.float() for t in operands())
    with torch.autocast("cpu", torch.bfloat16):
        inside = route_top1(x, W_router, b_router)
    outside = route_top1(x, W_router, b_router, compute_dtype=torch.bfloat16)
    assert inside.probabilities.dtype == torch.float32
    assert_bitwise("probabilities", inside.probabilities, outside.probabilities)


x_, R_, W_ = torch.zeros(4, D), torch.zeros(E, D), torch.zeros(F, D)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "x-width": (lambda: route_top1(x_[:, :3], R_), ValueError, r"x: .*\[\.\.\., 7\].*\[4, 3\]"),
    "x-dtype": (lambda: route_top1(x_.int(), R_), TypeError, r"x: .* got int32"),
    "W-dims": (lambda: route_top1(x_, R_[0]), ValueError, r"W_router: .*\[E, D\].* got \[7\]"),
    "no-expert": (lambda: route_top1(x_, R_[:0]), ValueError, r"at least one expert.*\[0, 7\]"),
    "b-shape": (
        lambda: route_top1(x_, R_, torch.zeros(E)),
        ValueError,
        r"b_router: .*\[7\].* got \[3\]",
    ),
    "uneven": (
        lambda: encode_topk(x_, W_[:11], None, K, routing=route_top1(x_, R_)),
        ValueError,
        r"divides n_latents = 11, got 3",
    ),
    "k": (
        lambda: encode_topk(x_, W_, None, 5, routing=route_top1(x_, R_)),
        ValueError,
        r"k: expected 1 <= k <= 4, the latents of one of the 3 experts, got 5",
    ),
    "rank-scale": (
        lambda: encode_topk(x_, W_, None, K, rank_scale=torch.ones(F), routing=route_top1(x_, R_)),  # type: ignore[call-overload]
        ValueError,
        r"rank_scale, by_magnitude: expected neither with a routing",
    ),
    "other-batch": (
        lambda: encode_topk(x_[:3], W_, None, K, routing=route_top1(x_, R_)),
        ValueError,
        r"tokens: expected shape \[3\].* got \[4\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_messages(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()
