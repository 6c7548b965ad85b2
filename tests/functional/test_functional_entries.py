"""JumpReLU and the functions of entries: values, and the straight-through gradients by formula."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.functional import (
    decode,
    encode_jumprelu,
    encode_threshold,
    encode_topk,
    gather_by_latent,
    heaviside_ste,
    jumprelu,
)
from sae_kernels.testing import assert_bitwise, assert_within, gamma
from tests.functional.functional_examples import (
    NAMES,
    SLACK,
    B,
    D,
    F,
    K,
    assert_same_gradients,
    leaves,
    operands,
)

if TYPE_CHECKING:
    from sae_kernels import SparseCodes

PRIMITIVES = ("select_topk", "decode", "row_grad")
pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")
WIDTH = 0.5
inf, nan = math.inf, math.nan


def thresholds() -> torch.Tensor:
    """Of both signs; fp64, asking for a gradient."""
    return torch.linspace(-0.4, 1.0, F, dtype=torch.float64).requires_grad_()


def window(h: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    return ((h > threshold - WIDTH / 2) & (h < threshold + WIDTH / 2)).to(h.dtype)


def dense_jumprelu(h: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """``h 1[h > theta]`` with ``-(theta / w) 1[|h - theta| < w / 2]`` as d/dtheta."""
    slope = -(threshold / WIDTH * window(h, threshold)).detach()
    return torch.where(h > threshold, h, 0.0) + slope * (threshold - threshold.detach())


def dense_step(h: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """``1[h > theta]`` with ``-(1 / w) 1[|h - theta| < w / 2]`` as d/dtheta, and 0 as d/dh."""
    slope = -(window(h, threshold) / WIDTH).detach()
    return (h > threshold).to(h.dtype) + slope * (threshold - threshold.detach())


@pytest.mark.parametrize("bandwidth", [WIDTH, 0.0], ids=["train", "inference"])
def test_encode_jumprelu_against_dense_autograd(bandwidth: float, either_backend: str) -> None:
    x, W_enc, b_enc, b_dec, W_dec = tensors = leaves()
    threshold = thresholds()
    codes = encode_jumprelu(
        x,
        W_enc,
        b_enc,
        threshold,
        bandwidth=bandwidth,
        b_dec=b_dec,
        backend=either_backend,
    )
    h = (x - b_dec) @ W_enc.T + b_enc
    dense = dense_jumprelu(h, threshold)
    assert_within("codes", codes.to_dense(), dense, SLACK)
    near = window(h.detach(), threshold.detach()) > 0
    assert bool((near & (h > threshold)).any())
    assert bool((near & (h < threshold)).any())
    lower = threshold.detach() - bandwidth / 2
    assert codes.values.numel() == int((h > lower).sum())

    out = decode(codes, W_dec, b_dec, backend=either_backend)
    weights = torch.randn(B, D, dtype=torch.float64)
    ours, theirs = (weights * out).sum(), (weights * (dense @ W_dec + b_dec)).sum()
    names = dict(zip(NAMES, tensors, strict=True))
    if bandwidth:
        names["threshold"] = threshold
    elif ours.requires_grad:  # without a window the threshold does not learn
        assert not bool(torch.autograd.grad(ours, threshold, retain_graph=True)[0].any())
    assert_same_gradients(ours, theirs, names)


def test_step_against_dense_autograd(either_backend: str) -> None:
    x, W_enc, b_enc, b_dec, _ = leaves()
    threshold = thresholds()
    lower = threshold.detach() - WIDTH / 2
    preacts = encode_threshold(x, W_enc, b_enc, lower, b_dec=b_dec, backend=either_backend)
    counted = heaviside_ste(preacts, threshold, WIDTH, backend=either_backend)
    h = (x - b_dec) @ W_enc.T + b_enc
    assert counted.shape == preacts.values.shape
    assert float(counted.sum().detach()) == int((h > threshold).sum())
    # L0 with a target is no linear function of the steps.
    ours = (counted.sum() / B - 3).square()
    theirs = (dense_step(h, threshold).sum() / B - 3).square()
    grads = torch.autograd.grad(ours, (threshold, x, W_enc), retain_graph=True, allow_unused=True)
    assert grads[1:] == (None, None) or not any(bool(g.any()) for g in grads[1:] if g is not None)
    assert_same_gradients(ours, theirs, {"threshold": threshold})


def test_codes_and_steps_of_one_encoding_add_up(either_backend: str) -> None:
    # What a JumpReLU SAE does: one product for the reconstruction and for the penalty.
    x, W_enc, b_enc, b_dec, W_dec = tensors = leaves()
    threshold = thresholds()
    lower = threshold.detach() - WIDTH / 2
    preacts = encode_threshold(x, W_enc, b_enc, lower, b_dec=b_dec, backend=either_backend)
    codes = jumprelu(preacts, threshold, WIDTH, backend=either_backend)
    out = decode(codes, W_dec, b_dec, backend=either_backend)
    ours = (out - x).square().sum() + 0.3 * heaviside_ste(preacts, threshold, WIDTH).sum()
    h = (x - b_dec) @ W_enc.T + b_enc
    x_hat = dense_jumprelu(h, threshold) @ W_dec + b_dec
    theirs = (x_hat - x).square().sum() + 0.3 * dense_step(h, threshold).sum()
    named = dict(zip(NAMES, tensors, strict=True)) | {"threshold": threshold}
    assert_same_gradients(ours, theirs, named)


# Around a threshold of 1 and a window of 1/2; each column is one latent: h, whether it is kept, its
# value, dvalue/dh, dvalue/dthreshold and dstep/dthreshold.
EDGES = [
    (0.5, False, None, 0, 0, 0),
    (0.75, False, None, 0, 0, 0),  # the lower edge is outside
    (math.nextafter(0.75, 1), True, 0.0, 0, -2, -2),
    (0.9, True, 0.0, 0, -2, -2),
    (1.0, True, 0.0, 0, -2, -2),  # at the threshold
    (math.nextafter(1.0, 2), True, math.nextafter(1.0, 2), 1, -2, -2),
    (math.nextafter(1.25, 1), True, math.nextafter(1.25, 1), 1, -2, -2),
    (1.25, True, 1.25, 1, 0, 0),  # the upper edge is outside
    (3.0, True, 3.0, 1, 0, 0),
    (nan, True, nan, 1, 0, 0),
    (inf, True, inf, 1, 0, 0),
    (-inf, False, None, 0, 0, 0),
]


def test_the_edges_of_the_window(either_backend: str) -> None:
    h = torch.tensor([edge[0] for edge in EDGES], dtype=torch.float64)
    x, n = torch.ones(1, 1, dtype=torch.float64), len(EDGES)
    W = torch.zeros(n, 1, dtype=torch.float64)
    b, threshold = h.requires_grad_(), torch.ones(n, dtype=torch.float64, requires_grad=True)
    codes = encode_jumprelu(x, W, b, threshold, bandwidth=WIDTH, backend=either_backend)
    there = [edge for edge in EDGES if edge[1]]
    assert codes.indices.tolist() == [i for i, edge in enumerate(EDGES) if edge[1]]
    values = torch.tensor([edge[2] for edge in there], dtype=torch.float64)
    assert_within("values", codes.values, values, 0.0)
    dh, dthreshold = torch.autograd.grad(codes.values.sum(), (b, threshold))
    assert dh.tolist() == [edge[3] for edge in EDGES]
    assert dthreshold.tolist() == [edge[4] for edge in EDGES]

    # With all entries at hand the functions themselves decide.
    preacts = encode_threshold(x, W, b, -inf, backend=either_backend)
    assert preacts.indices.tolist() == list(range(n - 1))  # all but -inf
    jumped = jumprelu(preacts, threshold, WIDTH, backend=either_backend).values
    counted = heaviside_ste(preacts, threshold, WIDTH, backend=either_backend)
    assert counted.tolist() == [float(bool(edge[2])) for edge in EDGES[:-1]]
    assert_bitwise("values", jumped[codes.indices.long()], codes.values)
    for entries, column in ((jumped, 4), (counted, 5)):
        (grad,) = torch.autograd.grad(entries.sum(), threshold)
        assert grad.tolist() == [edge[column] for edge in EDGES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_no_entry_of_the_window_is_missing(dtype: torch.dtype, either_backend: str) -> None:
    # Scores at and next to the lower edge as it is rounded, for thresholds that do not suit it.
    n, bandwidth = 500, 0.003
    threshold = (0.1 + torch.rand(n)).requires_grad_()
    lower = threshold.detach() - bandwidth / 2
    towards = torch.tensor([-inf, inf])[torch.arange(n) % 2]
    b = torch.where(torch.arange(n) % 3 == 0, lower, lower.nextafter(towards))
    x, W = torch.ones(1, 1), torch.zeros(n, 1)
    codes = encode_jumprelu(
        x, W, b, threshold, bandwidth=bandwidth, compute_dtype=dtype, backend=either_backend
    )
    codes.values.sum().backward()
    assert threshold.grad is not None
    assert_bitwise("learning", threshold.grad != 0, b > lower)
    assert codes.indices.tolist() == (b > lower).nonzero().flatten().tolist()


def test_threshold_gradients_of_many_tokens_in_fp32(either_backend: str) -> None:
    x, W, b = torch.randn(300, 8), torch.randn(40, 8), torch.zeros(40)
    threshold = (0.2 + torch.rand(40)).requires_grad_()
    codes = encode_jumprelu(x, W, b, threshold, bandwidth=1.0, backend=either_backend)
    upstream = torch.randn_like(codes.values)
    (grad,) = torch.autograd.grad(codes.values, threshold, upstream, retain_graph=True)
    again = torch.autograd.grad(codes.values, threshold, upstream)[0]
    # The pre-activations as the encoder computed them decide on the window.
    preacts = encode_threshold(x, W, b, threshold.detach() - 0.5, backend=either_backend)
    latent = codes.indices.long()
    h, theta = preacts.values, threshold.detach()[latent]
    terms = -theta.double() * upstream * ((h > theta - 0.5) & (h < theta + 0.5))
    exact, magnitude = torch.zeros(2, 40, dtype=torch.float64)
    exact.index_add_(0, latent, terms)
    magnitude.index_add_(0, latent, terms.abs())
    assert_within("threshold", grad, exact, gamma(302, torch.float32) * magnitude)
    assert_bitwise("the same sums in the same order", again, grad)


def codes_of_every_form(backend: str) -> dict[str, SparseCodes]:
    x, W_enc, b_enc, _, _ = operands()
    batch = torch.randn(2, 3, D, dtype=torch.float64)
    return {
        "k": encode_topk(x, W_enc, b_enc, K, backend=backend),
        "k, leading": encode_topk(batch, W_enc, b_enc, K, backend=backend),
        "ragged": encode_threshold(x, W_enc, b_enc, 0.3, backend=backend),
        "ragged, leading": encode_threshold(batch, W_enc, b_enc, 0.3, backend=backend),
        "no entry": encode_threshold(x, W_enc, b_enc, 1e9, backend=backend),
        "no token": encode_threshold(x[:0], W_enc, b_enc, 0.0, backend=backend),
    }


FORMS = ("k", "k, leading", "ragged", "ragged, leading", "no entry", "no token")
forms = pytest.mark.parametrize("form", FORMS)


@forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=lambda d: str(d)[6:])
def test_gather_by_latent_is_indexing(form: str, dtype: torch.dtype, either_backend: str) -> None:
    codes = codes_of_every_form(either_backend)[form]
    vector = torch.randn(F, dtype=dtype)
    came = gather_by_latent(vector, codes, backend=either_backend)
    assert_bitwise("constant", came, vector[codes.indices.long()])
    vector.requires_grad_()
    entries = gather_by_latent(vector, codes, backend=either_backend)
    assert_bitwise("entries", entries, came)
    upstream = torch.randn(entries.shape, dtype=dtype)
    upstream.flatten()[::3] = 0
    (grad,) = torch.autograd.grad(entries, vector, upstream)
    exact, magnitude = torch.zeros(2, F, dtype=torch.float64)
    latents = codes.indices.long().flatten()
    exact.index_add_(0, latents, upstream.flatten().double())
    magnitude.index_add_(0, latents, upstream.flatten().double().abs())
    assert grad.dtype == dtype
    assert_within("gradient", grad, exact, gamma(B * F, dtype) * magnitude)


@forms
def test_jumprelu_and_step_of_every_form(form: str, either_backend: str) -> None:
    codes = codes_of_every_form(either_backend)[form]
    threshold = torch.full((F,), 0.9, dtype=torch.float64, requires_grad=True)
    jumped = jumprelu(codes, threshold, WIDTH, backend=either_backend)
    counted = heaviside_ste(codes, threshold, WIDTH, backend=either_backend)
    assert jumped.batch_shape == codes.batch_shape
    assert jumped.indices is codes.indices
    assert_bitwise("values", jumped.values, torch.where(codes.values > 0.9, codes.values, 0.0))
    assert_bitwise("steps", counted, (codes.values > 0.9).double())
    near = (codes.values > 0.65) & (codes.values < 1.15)
    hits = torch.zeros(F, dtype=torch.float64)
    hits.index_add_(0, codes.indices.long().flatten(), near.double().flatten())
    for entries, slope in ((jumped.values, -0.9 / WIDTH), (counted, -1 / WIDTH)):
        (grad,) = torch.autograd.grad(entries.sum(), threshold)
        assert_within("threshold", grad, slope * hits, SLACK)


def test_a_gradient_of_nan_is_not_lost(either_backend: str) -> None:
    codes = codes_of_every_form(either_backend)["ragged"]
    vector = torch.zeros(F, dtype=torch.float64, requires_grad=True)
    upstream = torch.zeros(codes.values.shape, dtype=torch.float64)
    upstream[3] = nan
    (grad,) = torch.autograd.grad(gather_by_latent(vector, codes), vector, upstream)
    assert grad.isnan().nonzero().flatten().tolist() == [int(codes.indices[3])]


GRAD_LAYOUTS: dict[str, Any] = {
    "expanded": lambda g: g[:1].expand_as(g),
    "step-2": lambda g: torch.stack([g, torch.full_like(g, nan)], -1)[..., 0],
}


@pytest.mark.parametrize("layout", GRAD_LAYOUTS)
def test_output_gradients_of_any_layout(layout: str, either_backend: str) -> None:
    def grads(change: Any) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        x, W_enc, b_enc, _, W_dec = leaves()
        threshold = thresholds()
        codes = encode_jumprelu(x, W_enc, b_enc, threshold, bandwidth=WIDTH, backend=either_backend)
        x_hat = decode(codes, W_dec, backend=either_backend)
        upstream = (change(torch.randn_like(codes.values)), change(torch.randn_like(x_hat)))
        inputs = (x, W_enc, b_enc, W_dec, threshold)
        return torch.autograd.grad((codes.values, x_hat), inputs, upstream)

    change = GRAD_LAYOUTS[layout]
    strided, packed = grads(change), grads(lambda g: change(g).contiguous())
    names = ("x", "W_enc", "b_enc", "W_dec", "threshold")
    for name, a, b in zip(names, strided, packed, strict=True):
        assert_bitwise(name, a, b)


def test_dropped_entries_are_not_counted_as_fired(backend: str) -> None:
    W = torch.tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    threshold = torch.full((3,), 2.1, requires_grad=True)
    codes = encode_jumprelu(torch.ones(2, 1), W, None, threshold, bandwidth=0.4, backend=backend)
    assert codes.indices.tolist() == [1, 2, 1, 2]
    assert codes.values.tolist() == [0.0, 3.0, 0.0, 3.0]
    assert codes.latent_order(backend=backend).counts().tolist() == [0, 0, 2]
    codes.values.sum().backward()
    assert W.grad is not None
    assert W.grad.tolist() == [[0.0], [0.0], [2.0]]
