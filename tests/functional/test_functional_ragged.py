"""Ragged codes: encode_threshold, encode_batch_topk and decode against dense autograd in fp64."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from sae_kernels import SparseCodes
from sae_kernels.functional import (
    decode,
    encode_batch_topk,
    encode_jumprelu,
    encode_threshold,
    encode_topk,
    gather_by_latent,
    heaviside_ste,
    jumprelu,
)
from sae_kernels.testing import assert_bitwise, assert_within, oracles, rounding
from tests.functional.functional_examples import (
    ENDS,
    NAMES,
    SLACK,
    B,
    D,
    F,
    assert_same_gradients,
    leaves,
    operands,
    subset_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")
PRIMITIVES = ("select_threshold", "select_batch_topk", "decode", "code_grad", "row_grad")
THRESHOLD = torch.linspace(-0.5, 1.0, F, dtype=torch.float64)
SCALE = torch.linspace(0.0, 2.0, F, dtype=torch.float64)

Encoder = Any  # called with x, W_enc, b_enc and keywords
ENCODERS: dict[str, Encoder] = {
    "relu": lambda *args, **more: encode_threshold(*args, 0.0, **more),
    "threshold": lambda *args, **more: encode_threshold(*args, THRESHOLD, **more),
    "batch_topk": lambda *args, **more: encode_batch_topk(*args, 3.5, **more),
    "scaled": lambda *args, **more: encode_batch_topk(*args, 3, rank_scale=SCALE, **more),
}
encoders = pytest.mark.parametrize("name", ENCODERS)


def kept(name: str, h: torch.Tensor) -> torch.Tensor:
    """bool [B, F]: what an encoder should keep of exact pre-activations."""
    h, tokens = h.detach(), h.shape[0]
    if name in ("relu", "threshold"):
        return h > (0.0 if name == "relu" else THRESHOLD)
    key = h if name == "batch_topk" else h * SCALE
    return oracles.batch_topk(h, key, int((3.5 if name == "batch_topk" else 3) * tokens))


def pre_activations(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> Any:
    return (x - c) @ W.T + b


ENCODE_SUBSETS = [s for s in itertools.product([True, False], repeat=4) if any(s)]
DECODE_SUBSETS = [s for s in itertools.product([True, False], repeat=3) if any(s)]


@encoders
@pytest.mark.parametrize(
    "needed", ENCODE_SUBSETS, ids=lambda s: subset_of("x W_enc b_enc b_dec", s)
)
def test_encode_gradcheck(name: str, needed: tuple[bool, ...], either_backend: str) -> None:
    # What is kept is constant around a point where no score is close to a bound, as here.
    tensors = operands()[:4]
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)

    def values(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return ENCODERS[name](x, W, b, b_dec=c, backend=either_backend).values

    torch.autograd.gradcheck(values, tensors, nondet_tol=0.0)


@pytest.mark.parametrize("groups", [False, True], ids=["plain", "groups"])
@pytest.mark.parametrize("needed", DECODE_SUBSETS, ids=lambda s: subset_of("values W_dec b_dec", s))
def test_decode_gradcheck(needed: tuple[bool, ...], groups: bool, either_backend: str) -> None:
    mask = torch.rand(B, F) < torch.tensor([0.3, 0.0, 1.0, 0.1, 0.0])[:, None]
    values, indices, offsets = oracles.ragged(torch.randn(B, F, dtype=torch.float64), mask)
    assert 0 in offsets.diff().tolist()
    tensors = (values, *operands()[4:2:-1])
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)

    def x_hat(values: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        codes = SparseCodes(values, indices, F, offsets)
        return decode(codes, W, b, group_ends=ENDS if groups else None, backend=either_backend)

    torch.autograd.gradcheck(x_hat, tensors, nondet_tol=0.0)


@encoders
@pytest.mark.parametrize("groups", [False, True], ids=["plain", "groups"])
def test_values_and_gradients_against_dense_autograd(
    name: str, groups: bool, either_backend: str
) -> None:
    x, W_enc, b_enc, b_dec, W_dec = tensors = leaves()
    codes = ENCODERS[name](x, W_enc, b_enc, b_dec=b_dec, backend=either_backend)
    ends = ENDS if groups else None
    out = decode(codes, W_dec, b_dec, group_ends=ends, backend=either_backend)

    h = pre_activations(x, W_enc, b_enc, b_dec)
    dense = torch.where(kept(name, h), h, 0.0)
    assert_within("codes", codes.to_dense(), dense, SLACK)
    masks = oracles.prefix_masks(ENDS, F) if groups else torch.ones(1, F)
    prefixes = torch.stack([(dense * mask) @ W_dec + b_dec for mask in masks])
    prefixes = prefixes if groups else prefixes[0]
    assert_within("x_hat", out, prefixes, SLACK)
    weights = torch.randn(out.shape, dtype=torch.float64)
    ours, theirs = (weights * out).sum(), (weights * prefixes).sum()
    assert_same_gradients(ours, theirs, dict(zip(NAMES, tensors, strict=True)))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:]
)
def test_gradients_against_the_oracle(dtype: torch.dtype, backend: str) -> None:
    x, W, b, _, _ = operands()
    W.copy_(W.to(dtype))
    x, W, b = (t.float().requires_grad_() for t in (x, W, b))
    codes = encode_threshold(x, W, b, 0.5, compute_dtype=dtype, backend=backend)
    upstream = torch.randn(codes.values.shape)
    codes.values.backward(upstream)
    dh = oracles.dense_codes(upstream, codes.indices, F, codes.offsets)
    x_rounded, most = x.detach().to(dtype).double(), int(codes.offsets.diff().max())
    for name, leaf, exact, magnitude, n in (
        ("dx", x, dh @ W.double(), dh.abs() @ W.double().abs(), most),
        ("dW", W, dh.T @ x_rounded, dh.abs().T @ x_rounded.abs(), B),
        ("db", b, dh.sum(0), dh.abs().sum(0), B),
    ):
        assert leaf.grad is not None
        assert_within(name, leaf.grad, exact.detach(), rounding(n, magnitude.detach(), dtype))


def test_compute_dtype_reads_the_rounded_operands(backend: str) -> None:
    x, W, b = torch.randn(40, 64), torch.randn(200, 64) / 8, torch.randn(200)
    codes = encode_threshold(x, W, b, 0.3, compute_dtype=torch.bfloat16, backend=backend)
    exact = oracles.scores(x.bfloat16(), W.bfloat16(), b)
    budget = rounding(65, exact.magnitude, torch.bfloat16, flushed=1.0)
    assert codes.values.dtype == torch.float32
    dense = codes.to_dense().double()
    sure = (exact.h - 0.3).abs() > budget
    assert_within("kept", (dense != 0)[sure].double(), (exact.h > 0.3)[sure].double(), 0.0)
    there = dense != 0
    assert_within("values", dense[there], exact.h[there], budget[there])


def test_the_threshold_gets_no_gradient_and_may_be_one_number(either_backend: str) -> None:
    x, W_enc, b_enc, _, _ = operands()
    first = encode_threshold(x, W_enc, b_enc, 0.25, backend=either_backend)
    for threshold in (torch.tensor(0.25), torch.full((F,), 0.25, requires_grad=True)):
        codes = encode_threshold(x, W_enc, b_enc, threshold, backend=either_backend)
        assert not codes.values.requires_grad
        assert_bitwise("values", codes.values, first.values)
        assert_bitwise("indices", codes.indices, first.indices)


@pytest.mark.parametrize(
    ("k", "wanted"), [(0.1, 0), (0.2, 1), (1, 5), (1.3, 6), (3.99, 19), (F, None)], ids=str
)
def test_k_is_an_average_over_the_batch(k: float, wanted: int | None, either_backend: str) -> None:
    x, W_enc, b_enc, _, _ = operands()
    codes = encode_batch_topk(x, W_enc, b_enc, k, backend=either_backend)
    h = x @ W_enc.T + b_enc
    n = int((h > 0).sum()) if wanted is None else wanted
    assert codes.values.numel() == n
    lowest = h.flatten().sort(descending=True).values[n - 1 if n else 0]
    assert bool((codes.values >= lowest - SLACK).all())


@pytest.mark.parametrize("start", [0.0, 0.7, 1e9, torch.nan], ids=str)
def test_a_start_changes_no_result(start: float, either_backend: str) -> None:
    x, W_enc, b_enc, b_dec, _ = operands()
    plain, guessed = (
        encode_batch_topk(x, W_enc, b_enc, 3, b_dec=b_dec, start=guess, backend=either_backend)
        for guess in (None, torch.tensor(start))
    )
    for name in ("values", "indices", "offsets"):
        assert_bitwise(name, getattr(guessed, name), getattr(plain, name))


def test_a_batch_of_one_token_is_top_k(either_backend: str) -> None:
    x, W_enc, b_enc, _, _ = operands()
    batch = encode_batch_topk(x[:1], W_enc, b_enc, 4, backend=either_backend)
    top = encode_topk(x[:1], W_enc, b_enc, 4, backend=either_backend)
    assert bool((top.values > 0).all())
    assert_bitwise("codes", batch.to_dense(), top.to_dense())


LEADING = [(), (0,), (1,), (3,), (2, 3), (2, 0, 3), (1, 2, 1, 3)]


@encoders
@pytest.mark.parametrize("leading", LEADING, ids=lambda shape: "x".join(map(str, shape)) or "1-D")
def test_leading_shapes(name: str, leading: tuple[int, ...], either_backend: str) -> None:
    _, W_enc, b_enc, b_dec, W_dec = leaves()
    x = torch.randn(*leading, D, dtype=torch.float64, requires_grad=True)
    codes = ENCODERS[name](x, W_enc, b_enc, b_dec=b_dec, backend=either_backend)
    out = decode(codes, W_dec, b_dec, group_ends=ENDS, backend=either_backend)
    n_tokens = math.prod(leading)
    assert codes.batch_shape == leading
    assert codes.offsets.shape == (n_tokens + 1,)
    assert codes.values.shape == codes.indices.shape == (int(codes.offsets[-1]),)
    assert out.shape == (len(ENDS), *leading, D)
    flat = ENCODERS[name](x.reshape(-1, D), W_enc, b_enc, b_dec=b_dec, backend=either_backend)
    assert flat.leading is None
    for field in ("values", "indices", "offsets"):
        assert_bitwise(field, getattr(codes, field), getattr(flat, field))
    flat_out = decode(flat, W_dec, b_dec, backend=either_backend)
    assert_within("x_hat", out[-1], flat_out.reshape(*leading, D), SLACK)
    out.sum().backward()
    assert x.grad is not None
    assert W_dec.grad is not None
    assert x.grad.shape == x.shape
    assert bool(x.grad.any()) == bool(W_dec.grad.any()) == bool(x.numel())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
def test_autocast_sets_the_compute_dtype(dtype: torch.dtype, either_backend: str) -> None:
    x, W_enc, b_enc, _, W_dec = operands(torch.float32)
    explicit: dict[str, Any] = {"compute_dtype": dtype, "backend": either_backend}
    codes = encode_threshold(x, W_enc, b_enc, 0.1, **explicit)
    largest = encode_batch_topk(x, W_enc, b_enc, 3, **explicit)
    out = decode(codes, W_dec, **explicit)
    weights = [W_enc.requires_grad_(), W_dec.requires_grad_()]
    with torch.autocast("cpu", dtype):
        casted = encode_threshold(x, weights[0], b_enc, 0.1, backend=either_backend)
        cast_largest = encode_batch_topk(x, weights[0], b_enc, 3, backend=either_backend)
        cast_out = decode(casted, weights[1], backend=either_backend)
    assert casted.values.dtype == cast_out.dtype == torch.float32
    assert_bitwise("values", casted.values, codes.values)
    assert_bitwise("largest", cast_largest.values, largest.values)
    assert_bitwise("x_hat", cast_out, out)
    cast_out.sum().backward()
    assert [w.grad.dtype for w in weights if w.grad is not None] == [torch.float32] * 2


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda m: m.__name__)
@encoders
def test_without_autograd_nothing_changes_but_the_graph(name: str, mode: Any) -> None:
    x, W_enc, b_enc, b_dec, W_dec = leaves()
    codes = ENCODERS[name](x, W_enc, b_enc, b_dec=b_dec)
    with mode():
        quiet = ENCODERS[name](x, W_enc, b_enc, b_dec=b_dec)
        out = decode(quiet, W_dec, b_dec)
    assert not quiet.values.requires_grad
    assert not out.requires_grad
    assert_bitwise("values", quiet.values, codes.values)
    assert_bitwise("x_hat", out, decode(codes, W_dec, b_dec))


class Leaves(NamedTuple):
    """Tensors that ask for gradients, and pre-activations that do not."""

    x: torch.Tensor
    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    threshold: torch.Tensor
    preacts: SparseCodes


# By function: something linear in a leaf, and the leaf.
LINEAR: dict[str, Callable[[Leaves], tuple[torch.Tensor, torch.Tensor]]] = {
    "encode_threshold": lambda t: (encode_threshold(*t[:3], 0.0).values, t.W_enc),
    "encode_batch_topk": lambda t: (encode_batch_topk(*t[:3], 3).values, t.x),
    "encode_jumprelu": lambda t: (
        encode_jumprelu(*t[:3], t.threshold, bandwidth=0.4).values,
        t.b_enc,
    ),
    "jumprelu": lambda t: (jumprelu(t.preacts, t.threshold, 0.4).values, t.threshold),
    "step": lambda t: (heaviside_ste(t.preacts, t.threshold, 0.4), t.threshold),
    "gather_by_latent": lambda t: (gather_by_latent(t.threshold, t.preacts), t.threshold),
    "decode": lambda t: (decode(t.preacts, t.W_dec), t.W_dec),
    "decode in groups": lambda t: (decode(t.preacts, t.W_dec, group_ends=ENDS), t.W_dec),
}


@pytest.mark.parametrize("loss", ["linear", "square"])
@pytest.mark.parametrize("function", LINEAR)
def test_double_backward_raises(function: str, loss: str) -> None:
    x, W_enc, b_enc, _, W_dec = leaves()
    preacts = encode_threshold(x.detach(), W_enc.detach(), b_enc.detach(), THRESHOLD - 0.2)
    threshold = THRESHOLD.clone().requires_grad_()
    out, leaf = LINEAR[function](Leaves(x, W_enc, b_enc, W_dec, threshold, preacts))
    total = (out if loss == "linear" else out.square()).sum()
    assert bool(torch.autograd.grad(total, leaf, retain_graph=True)[0].any())
    with pytest.raises(RuntimeError, match=r"first-order gradients only.*create_graph"):
        torch.autograd.grad(total, leaf, create_graph=True)


def test_nan_is_kept_and_reaches_loss_and_gradient(backend: str) -> None:
    x = torch.tensor([[torch.nan, 0.0], [1.0, 2.0]])
    for encoder in (
        lambda W: encode_threshold(x, W, None, 0.5, backend=backend),
        lambda W: encode_batch_topk(x, W, None, 1.5, backend=backend),
    ):
        W = torch.eye(2, requires_grad=True)
        codes = encoder(W)
        # The product of NaN with either row of W is NaN; of the other token 1 and 2.
        assert codes.values.isnan().tolist()[:2] == [True, True]
        codes.values.square().sum().backward()
        assert W.grad is not None
        assert bool(W.grad[:, 0].isnan().all())
