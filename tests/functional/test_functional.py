"""encode_topk and decode: values, gradients in every subset, zeros, strides, modes and messages."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels import SparseCodes, TopKSAE, decode, encode_topk
from sae_kernels.primitives.checks import gradient_operand
from sae_kernels.testing import (
    Case,
    assert_bitwise,
    assert_same_selection,
    assert_within,
    oracles,
    rounding,
)
from tests.functional.functional_examples import ENDS, SLACK, B, D, F, K, operands, subset_of

if TYPE_CHECKING:
    from collections.abc import Callable

PRIMITIVES = ("select_topk", "decode", "row_grad")
pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")
ENCODE_SUBSETS = [s for s in itertools.product([True, False], repeat=4) if any(s)]
DECODE_SUBSETS = [s for s in itertools.product([True, False], repeat=3) if any(s)]


@pytest.mark.parametrize("relu", [True, False], ids=["relu", "no-relu"])
@pytest.mark.parametrize(
    "needed", ENCODE_SUBSETS, ids=lambda s: subset_of("x W_enc b_enc b_dec", s)
)
def test_encode_gradcheck(needed: tuple[bool, ...], relu: bool, either_backend: str) -> None:
    # A selection is constant around a point where the scores are well apart, as here.
    tensors = operands()[:4]
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)

    def values(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return encode_topk(x, W, b, K, b_dec=c, relu=relu, backend=either_backend).values

    torch.autograd.gradcheck(values, tensors, nondet_tol=0.0)


@pytest.mark.parametrize("groups", [False, True], ids=["plain", "groups"])
@pytest.mark.parametrize("needed", DECODE_SUBSETS, ids=lambda s: subset_of("values W_dec b_dec", s))
def test_decode_gradcheck(needed: tuple[bool, ...], groups: bool, either_backend: str) -> None:
    indices = torch.rand(B, F).argsort(1)[:, :K].to(torch.int32)
    values = torch.randn(B, K, dtype=torch.float64)
    tensors = (values, *operands()[4:2:-1])
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)

    def x_hat(values: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        codes = SparseCodes(values, indices, F)
        return decode(codes, W, b, group_ends=ENDS if groups else None, backend=either_backend)

    torch.autograd.gradcheck(x_hat, tensors, nondet_tol=0.0)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
def test_gradients_against_the_oracle(dtype: torch.dtype, backend: str) -> None:
    x, W, b, _, _ = operands()
    W.copy_(W.to(dtype))
    x, W, b = x.float(), W.float(), b.float()
    for tensor in (x, W, b):
        tensor.requires_grad_()
    codes = encode_topk(x, W, b, K, compute_dtype=dtype, backend=backend)
    upstream = torch.randn(B, K)
    codes.values.backward(upstream)
    rounded = x.detach().to(dtype)
    exact = oracles.encode_grads(
        upstream, codes.values.detach(), codes.indices, rounded, W.detach(), relu=True
    )
    assert x.grad is not None
    assert W.grad is not None
    assert b.grad is not None
    assert_within("dx", x.grad, exact.x, rounding(K, exact.x_magnitude, dtype))
    assert_within("dW", W.grad, exact.W, rounding(B, exact.W_magnitude, dtype))
    assert_within("db", b.grad, exact.b, rounding(B, exact.b_magnitude, dtype))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
@pytest.mark.parametrize("groups", [False, True], ids=["plain", "groups"])
@pytest.mark.parametrize("needed", DECODE_SUBSETS, ids=lambda s: subset_of("values W_dec b_dec", s))
def test_decode_gradients_against_the_oracle(
    needed: tuple[bool, ...], groups: bool, dtype: torch.dtype, backend: str
) -> None:
    """dL/dW and dL/dvalues have the upstream gradient rounded as an operand, dL/db has not."""
    indices = torch.rand(B, F).argsort(1)[:, :K].to(torch.int32)
    values, W, b = torch.randn(B, K), torch.randn(F, D).to(dtype), torch.randn(D)
    values[0] = 0  # entries without part in dL/dW
    for tensor, need in zip((values, W, b), needed, strict=True):
        tensor.requires_grad_(need)
    ends = ENDS if groups else None
    out = decode(SparseCodes(values, indices, F), W, b, group_ends=ends, backend=backend)
    upstream = torch.randn_like(out)
    out.backward(upstream)
    bound = rounding(upstream.numel(), upstream.abs().double().reshape(-1, D).sum(0), dtype)
    if b.grad is not None:
        assert_within("db", b.grad, upstream.double().reshape(-1, D).sum(0), bound)
    # A latent of a group has the sum of its prefixes' gradients, added in fp32 from the last on.
    summed = upstream.flip(0).cumsum(0).flip(0) if groups else upstream[None]
    operand = summed.to(gradient_operand(dtype))
    u = torch.finfo(operand.dtype).eps if groups else 0.0  # another order may round across a tie
    lost = u * operand.double().abs()
    group = torch.bucketize(indices, ENDS, right=True) if groups else torch.zeros_like(indices)
    token = torch.arange(B)[:, None].expand(B, K)
    rows, off = (t.double()[group.long(), token] for t in (operand, lost))
    own = W.detach().double()[indices.long()]
    if values.grad is not None:
        budget = rounding(D, (rows * own).abs().sum(-1), dtype) + (off * own.abs()).sum(-1)
        assert_within("dvalues", values.grad, (rows * own).sum(-1), budget)
    if W.grad is not None:
        assert W.grad.dtype == dtype
        weights = values.detach().double()[..., None]
        exact, magnitude, slack = (
            torch.zeros(F, D, dtype=torch.float64).index_add_(
                0, indices.flatten().long(), (scale * part).reshape(-1, D)
            )
            for scale, part in ((weights, rows), (weights.abs(), rows.abs()), (weights.abs(), off))
        )
        budget = rounding(B, magnitude, dtype) + slack
        stored = torch.finfo(dtype)  # dW is rounded to the weights' dtype
        half = stored.eps / 2 if dtype != torch.float32 else 0.0
        tiny = stored.smallest_normal * stored.eps
        assert_within("dW", W.grad, exact, budget + half * (exact.abs() + budget) + tiny)


def test_group_gradients_against_a_dense_matryoshka(either_backend: str) -> None:
    x, W_enc, b_enc, b_dec, W_dec = (t.requires_grad_() for t in operands())
    weights = torch.randn(len(ENDS), B, D, dtype=torch.float64)
    codes = encode_topk(x, W_enc, b_enc, K, b_dec=b_dec, backend=either_backend)
    out = decode(codes, W_dec, b_dec, group_ends=ENDS, backend=either_backend)
    ours = torch.autograd.grad((weights * out).sum(), (x, W_enc, b_enc, b_dec, W_dec))

    h = (x - b_dec) @ W_enc.T + b_enc
    kept = torch.zeros_like(h).scatter(1, h.topk(K).indices, 1.0)
    dense = (h * kept).relu()
    masks = oracles.prefix_masks(ENDS, F)
    prefixes = torch.stack([(dense * mask) @ W_dec + b_dec for mask in masks])
    theirs = torch.autograd.grad((weights * prefixes).sum(), (x, W_enc, b_enc, b_dec, W_dec))
    assert_within("prefixes", out, prefixes, SLACK)
    for name, a, e in zip(("x", "W_enc", "b_enc", "b_dec", "W_dec"), ours, theirs, strict=True):
        assert_within(name, a, e, SLACK)


def test_dropped_entries_get_no_gradient_and_are_not_counted(backend: str) -> None:
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], requires_grad=True)
    W = torch.tensor([[1.0, 0.0], [-1.0, 5.0], [0.0, 7.0]], requires_grad=True)
    b = torch.zeros(3, requires_grad=True)
    codes = encode_topk(x, W, b, 3, backend=backend)
    assert codes.indices.tolist() == [[0, 2, 1], [1, 2, 0]]
    assert codes.values.tolist() == [[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]
    assert not bool(codes.values.signbit().any())
    codes.values.sum().backward()
    assert x.grad is not None
    assert W.grad is not None
    assert b.grad is not None
    assert x.grad.tolist() == [[1.0, 0.0], [-1.0, 5.0]]
    assert W.grad.tolist() == [[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]
    assert b.grad.tolist() == [1.0, 1.0, 0.0]
    assert codes.latent_order(backend=backend).counts().tolist() == [1, 1, 0]
    everything = codes.latent_order(drop_zeros=False, backend=backend)
    assert everything.counts().tolist() == [2, 2, 2]


def test_without_relu_a_zero_score_has_its_gradient(backend: str) -> None:
    b = torch.zeros(2, requires_grad=True)
    codes = encode_topk(torch.zeros(1, 3), torch.ones(2, 3), b, 1, relu=False, backend=backend)
    codes.values.sum().backward()
    assert b.grad is not None
    assert b.grad.tolist() == [1.0, 0.0]


def test_nan_passes_relu_and_reaches_loss_and_gradient(backend: str) -> None:
    x = torch.tensor([[torch.nan, 0.0], [1.0, 2.0]])
    W = torch.eye(2, requires_grad=True)
    loss = encode_topk(x, W, None, 1, backend=backend).values.square().sum(1)
    assert loss.isnan().tolist() == [True, False]
    loss.sum().backward()
    assert W.grad is not None
    assert W.grad.isnan().tolist() == [[True, True], [False, False]]


GRAD_LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "expanded": lambda g: g[:1, :1].expand_as(g),
    "transposed": lambda g: g.T.contiguous().T,
    "step-2": lambda g: torch.stack([g, torch.full_like(g, torch.nan)], -1)[..., 0],
}


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_output_gradients_of_any_layout(layout: str, either_backend: str) -> None:
    def grads(change: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        x, W_enc, b_enc, _, W_dec = (t.requires_grad_() for t in operands())
        codes = encode_topk(x, W_enc, b_enc, K, backend=either_backend)
        dv = change(torch.randn(B, K, dtype=torch.float64))
        dx = change(torch.randn(B, D, dtype=torch.float64))
        x_hat = decode(codes, W_dec, backend=either_backend)
        inputs = (x, W_enc, b_enc, W_dec)
        return torch.autograd.grad((codes.values, x_hat), inputs, (dv, dx))

    change = GRAD_LAYOUTS[layout]
    strided, packed = grads(change), grads(lambda g: change(g).contiguous())
    for name, a, b in zip(("x", "W_enc", "b_enc", "W_dec"), strided, packed, strict=True):
        assert_bitwise(name, a, b)


def test_the_expanded_gradient_of_a_sum(either_backend: str) -> None:
    W_dec = operands()[4].requires_grad_()
    codes = SparseCodes(torch.ones(B, 1).double(), torch.full((B, 1), 3, dtype=torch.int32), F)
    decode(codes, W_dec, backend=either_backend).sum().backward()
    assert W_dec.grad is not None
    expected = torch.zeros(F, D, dtype=torch.float64)
    expected[3] = B
    assert_within("W_dec", W_dec.grad, expected, 0.0)


@pytest.mark.parametrize("loss", ["linear", "square"])
@pytest.mark.parametrize("side", ["encode", "decode"])
def test_double_backward_raises(loss: str, side: str) -> None:
    # Under a linear loss once_differentiable would hand out constant gradients without a word.
    x, W_enc, b_enc, _, W_dec = (t.requires_grad_() for t in operands())
    codes = encode_topk(x, W_enc, b_enc, K)
    if side == "decode":
        codes = SparseCodes(codes.values.detach().requires_grad_(), codes.indices, F)
    out = codes.values if side == "encode" else decode(codes, W_dec)
    total = (out if loss == "linear" else out.square()).sum()
    with pytest.raises(RuntimeError, match=r"first-order gradients only.*create_graph"):
        torch.autograd.grad(total, W_enc if side == "encode" else W_dec, create_graph=True)


LEADING = [(), (0,), (1,), (3,), (2, 3), (2, 0, 3), (1, 2, 1, 3)]


@pytest.mark.parametrize("leading", LEADING, ids=lambda shape: "x".join(map(str, shape)) or "1-D")
def test_leading_shapes(leading: tuple[int, ...], either_backend: str) -> None:
    _, W_enc, b_enc, b_dec, W_dec = (t.requires_grad_() for t in operands())
    x = torch.randn(*leading, D, dtype=torch.float64, requires_grad=True)
    codes = encode_topk(x, W_enc, b_enc, K, b_dec=b_dec, backend=either_backend)
    out = decode(codes, W_dec, b_dec, group_ends=ENDS, backend=either_backend)
    assert codes.values.shape == codes.indices.shape == (*leading, K)
    assert out.shape == (len(ENDS), *leading, D)
    flat = encode_topk(x.reshape(-1, D), W_enc, b_enc, K, b_dec=b_dec, backend=either_backend)
    # The reference's product may sum one row differently from many; the kernels promise not to.
    budget = 0.0 if either_backend == "cpu" else 1e4 * 2**-53
    assert_within("values", codes.values.reshape(-1, K), flat.values, budget)
    assert torch.equal(codes.indices.reshape(-1, K), flat.indices)
    out.sum().backward()
    assert x.grad is not None
    assert W_dec.grad is not None
    assert x.grad.shape == x.shape
    assert bool(x.grad.any()) == bool(x.numel())
    assert bool(W_dec.grad.any()) == bool(x.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_autocast_sets_the_compute_dtype(dtype: torch.dtype, either_backend: str) -> None:
    x, W_enc, b_enc, _, W_dec = operands(torch.float32)
    explicit: dict[str, Any] = {"compute_dtype": dtype, "backend": either_backend}
    codes = encode_topk(x, W_enc, b_enc, K, **explicit)
    out = decode(codes, W_dec, **explicit)
    weights = [W_enc.requires_grad_(), W_dec.requires_grad_()]
    with torch.autocast("cpu", dtype):
        casted = encode_topk(x, *weights[:1], b_enc, K, backend=either_backend)
        cast_out = decode(casted, weights[1], backend=either_backend)
    assert casted.values.dtype == cast_out.dtype == torch.float32
    assert_bitwise("values", casted.values, codes.values)
    assert_bitwise("x_hat", cast_out, out)
    cast_out.sum().backward()
    assert [w.grad.dtype for w in weights if w.grad is not None] == [torch.float32] * 2
    with torch.autocast("cpu", dtype, enabled=False):
        full = encode_topk(x, W_enc, b_enc, K, backend=either_backend)
    assert not torch.equal(full.values, codes.values)


def test_autocast_leaves_fp64_alone() -> None:
    x, W_enc, b_enc, _, W_dec = operands()
    with torch.autocast("cpu", torch.bfloat16):
        codes = encode_topk(x, W_enc, b_enc, K)
        assert codes.values.dtype == decode(codes, W_dec).dtype == torch.float64


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda m: m.__name__)
def test_without_autograd_nothing_changes_but_the_graph(mode: Any) -> None:
    x, W_enc, b_enc, b_dec, W_dec = (t.requires_grad_() for t in operands())
    codes = encode_topk(x, W_enc, b_enc, K, b_dec=b_dec)
    with mode():
        quiet = encode_topk(x, W_enc, b_enc, K, b_dec=b_dec)
        out = decode(quiet, W_dec, b_dec)
    assert not quiet.values.requires_grad
    assert not out.requires_grad
    assert_bitwise("values", quiet.values, codes.values)
    assert_bitwise("x_hat", out, decode(codes, W_dec, b_dec))


def test_compute_dtype_reads_the_rounded_operands(backend: str) -> None:
    case = Case("rounded", 40, 64, 200, 9)
    x, W, b = case.inputs()
    codes = encode_topk(x, W, b, 9, relu=False, compute_dtype=torch.bfloat16, backend=backend)
    exact = oracles.scores(x.bfloat16(), W.bfloat16(), b)
    budget = rounding(65, exact.magnitude, torch.bfloat16, flushed=1.0)
    assert codes.values.dtype == torch.float32
    assert_same_selection("indices", codes.indices, exact.key, 9, budget)
    kept = codes.indices.long()
    assert_within("values", codes.values, exact.h.gather(1, kept), budget.gather(1, kept))


def test_the_decoder_bias_is_subtracted_before_the_product(either_backend: str) -> None:
    x, W_enc, b_enc, b_dec, _ = operands()
    codes = encode_topk(x, W_enc, b_enc, K, b_dec=b_dec, backend=either_backend)
    centred = encode_topk(x - b_dec, W_enc, b_enc, K, backend=either_backend)
    assert_bitwise("values", codes.values, centred.values)
    assert_bitwise("indices", codes.indices, centred.indices)


def test_dense_codes_are_refused_with_the_way_to_make_them_sparse() -> None:
    dense = torch.zeros(3, 16)
    with pytest.raises(TypeError, match=r"codes: expected SparseCodes.*got Tensor; .*from_dense"):
        decode(dense, torch.zeros(16, 4))
    with pytest.raises(TypeError, match="got Tensor"):
        TopKSAE(4, 16, k=2).decode(dense)
