"""The dense oracles: straight-through estimators and penalties against the written formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_kernels.testing import DenseSpec, assert_bitwise, assert_within, dense_loss, gamma
from sae_kernels.testing.dense import decoder_norm
from sae_kernels.testing.dense_selection import jumprelu, step
from tests.testing.dense_examples import close, grad, identity, inf, randoms, raw, t

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")


def test_the_window_is_open_and_the_step_is_strict() -> None:
    theta, w = 1.0, 0.5  # exact, and so are the edges
    above = [math.nextafter(v, inf) for v in (0.75, 1.0)]
    below = [math.nextafter(v, -inf) for v in (0.75, 1.25)]
    h = [below[0], 0.75, above[0], 1.0, above[1], below[1], 1.25]
    jumps, inside = [0, 0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1, 0]
    for values, factor in ((jumprelu, -theta / w), (step, -1 / w)):
        leaf, thetas = t([h]).requires_grad_(), t([theta] * 7).requires_grad_()
        out = values(leaf, thetas, w)
        scale = t([h]) if values is jumprelu else 1.0
        assert_bitwise("values", out, t([jumps]) * scale)
        out.backward(t([[3.0] * 7]))
        assert_bitwise("dtheta", grad(thetas), 3 * factor * t(inside) + 0.0)
        if values is jumprelu:
            assert_bitwise("dh", grad(leaf), 3 * t([jumps]))
        else:
            assert leaf.grad is None


def test_jumprelu_gradients_by_hand() -> None:
    p = identity(4, threshold=t(1, 1, 1, 2))
    x = t([[1.2, 0.9, 2, 0.5], [1.1, 3, 0, 2.1]])
    y = t([[0.2, -1, 0, 1], [0.1, 0, 0, 2.0]])
    result = dense_loss(raw("jumprelu", bandwidth=0.5), p, x, y)
    close(result.codes, [[1.2, 0, 2, 0], [1.1, 3, 0, 2.1]])
    result.loss.backward()
    # g = 2/B (f - y): [1, 1, 2, -1] and [1, 3, 0, 0.1]
    close(grad(p["b_enc"]), [1 + 1, 3, 2, 0.1])
    # -(theta / w) g inside: latent 1 by its first token alone, latent 3 by its second
    close(grad(p["threshold"]), [-2 * (1 + 1), -2, 0, -4 * 0.1])
    logs = identity(4, log_threshold=t(1, 1, 1, 2).log())
    dense_loss(raw("jumprelu", bandwidth=0.5), logs, x, y).loss.backward()
    close(grad(logs["log_threshold"]), [-4, -2, 0, -0.4 * 2])


def thresholds(spec: DenseSpec, x: Tensor, dead: Tensor | None = None, **more: Tensor) -> Any:
    """The penalty and its gradients by threshold, b_enc and W_dec; theta is 1 for three latents."""
    p = identity(3, threshold=t(1, 1, 1), **more)
    result = dense_loss(spec, p, x, dead=dead)
    wanted = [p[name] for name in ("threshold", "b_enc", "W_dec")]
    grads = torch.autograd.grad(result.penalty, wanted, materialize_grads=True)
    assert torch.equal(result.loss, result.reconstruction + result.penalty)
    return result.penalty, *grads


X = t([[1.2, 0.9, 5], [0.9, 0.1, 1.1]])  # inside a window of 0.5 around 1: two, one and one


def test_l0_by_hand() -> None:
    penalty, theta, b_enc, _ = thresholds(
        raw("jumprelu", bandwidth=0.5, penalty="l0", coefficient=3.0), X
    )
    close(penalty, 3 * 3 / 2)
    close(theta, [-3 / 0.5 / 2 * n for n in (2, 1, 1)])
    assert not b_enc.any()


def test_target_l0_by_hand() -> None:
    spec = raw("jumprelu", bandwidth=0.5, penalty="target_l0", coefficient=3.0, target_l0=4.0)
    penalty, theta, b_enc, _ = thresholds(spec, X)
    close(penalty, 3 * (1.5 / 4 - 1) ** 2)
    slope = 3 * 2 * (1.5 / 4 - 1) / 4
    close(theta, [slope * -1 / 0.5 / 2 * n for n in (2, 1, 1)])
    assert not b_enc.any()


def test_tanh_and_l1_reach_the_threshold_through_the_codes() -> None:
    # Entries of the window below theta count too: the slope of f and of tanh at 0 is not 0.
    rows = {"W_dec": torch.diag(t(2, 1, 1))}
    shared: dict[str, Any] = {"bandwidth": 0.5, "coefficient": 3.0, "norm_weighted": True}
    penalty, theta, b_enc, W_dec = thresholds(raw("jumprelu", penalty="l1", **shared), X, **rows)
    close(penalty, 3 * (1.2 * 2 + 5 + 1.1) / 2)
    close(theta, [-3 / 0.5 / 2 * n for n in (2 * 2, 1, 1)])
    close(b_enc, [3 * 2 / 2, 0, 3 * 2 / 2])
    close(W_dec.diagonal(), [3 * 1.2 / 2, 0, 3 * 6.1 / 2])

    spec = raw("jumprelu", penalty="tanh", tanh_scale=0.3, **shared)
    penalty, theta, b_enc, _ = thresholds(spec, X, **rows)
    a, b, c = (math.tanh(0.3 * v) for v in (2.4, 5, 1.1))
    close(penalty, 3 * (a + b + c) / 2)
    slopes = (2 * (1 - a * a) + 2 * 1, 1, 1 - c * c)
    close(theta, [-3 / 0.5 / 2 * 0.3 * slope for slope in slopes])
    close(b_enc, [3 / 2 * 0.3 * s for s in (2 * (1 - a * a), 0, 1 - b * b + 1 - c * c)])


def test_the_preactivation_penalty_by_hand() -> None:
    dead = torch.tensor([True, True, False])
    rows = {"W_dec": t([[3, 4, 0], [0, 1, 0], [7, 0, 0]])}
    # The norm is that of the whole row, whatever norm the penalties on codes take.
    spec = raw("jumprelu", bandwidth=0.5, preact=3.0, norm="sum", n_layers=3)
    penalty, theta, b_enc, W_dec = thresholds(spec, X, dead, **rows)
    close(penalty, 3 / 2 * (5 * 0.1 + 0.1 + 0.9))
    close(theta, [3 / 2 * 5, 3 / 2 * 2, 0])
    close(b_enc, [-3 / 2 * 5, -3 / 2 * 2, 0])
    assert not W_dec.any()
    others = torch.tensor([False, True, True])
    close(thresholds(spec, X, others, **rows)[0], 3 / 2 * (0.1 + 0.9))
    both = raw("jumprelu", bandwidth=0.5, preact=3.0, penalty="l0", coefficient=1.0)
    close(thresholds(both, X, dead, **rows)[0], penalty.item() + 1.5)


def test_jumprelu_gradients_against_loops() -> None:
    # The chain rule written out entry by entry, with nothing of torch but its numbers.
    B, D, F, w, c = 5, 3, 6, 2.0, 0.7
    p = randoms(D, F) | {"threshold": torch.rand(F).double()}
    p = {name: value.requires_grad_() for name, value in p.items()}
    x = torch.randn(B, D).double()
    spec = DenseSpec("jumprelu", bandwidth=w, penalty="l0", coefficient=c)
    dense_loss(spec, p, x).loss.backward()
    We, be, Wd, bd, th = (p[n].tolist() for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"))
    xs, seen = x.tolist(), 0
    want = {name: torch.zeros_like(value) for name, value in p.items()}
    for b in range(B):
        xc = [xs[b][d] - bd[d] for d in range(D)]
        h = [sum(xc[d] * We[f][d] for d in range(D)) + be[f] for f in range(F)]
        code = [v if v > th[f] else 0.0 for f, v in enumerate(h)]
        y_hat = [sum(code[f] * Wd[f][d] for f in range(F)) + bd[d] for d in range(D)]
        e = [2 / B * (y_hat[d] - xs[b][d]) for d in range(D)]
        want["b_dec"] += t(e)
        for f in range(F):
            g = sum(e[d] * Wd[f][d] for d in range(D))
            want["W_dec"][f] += code[f] * t(e)
            if th[f] - w / 2 < h[f] < th[f] + w / 2:
                seen += 1
                want["threshold"][f] -= th[f] / w * g + c / B / w
            if h[f] > th[f]:
                want["b_enc"][f] += g
                want["W_enc"][f] += g * t(xc)
                want["b_dec"] -= g * t(We[f])
    assert 5 < seen < 25
    for name, value in want.items():
        assert_within(name, grad(p[name]), value, 1e3 * gamma(1, torch.float64))


@pytest.mark.parametrize("p", [0.0, 0.25, 0.5, 1.0, 2.0])
def test_powers_have_no_gradient_at_zero(p: float) -> None:
    parameters = identity(3)
    spec = raw("topk", k=2, penalty="lp", p=p, coefficient=5.0)
    penalty = dense_loss(spec, parameters, t([[4, -1, 0.25], [9, 0, -1]])).penalty
    close(penalty, 5 / 2 * (4**p + 0.25**p + 9**p))
    penalty.backward()
    slope = [p * v ** (p - 1) for v in (4, 9, 0.25)]
    close(grad(parameters["b_enc"]), [5 / 2 * (slope[0] + slope[1]), 0, 5 / 2 * slope[2]])


def test_powers_of_jumprelu_codes_leave_out_the_window_below() -> None:
    spec = raw("jumprelu", bandwidth=0.5, penalty="lp", p=0.5, coefficient=1.0)
    _, theta, b_enc, _ = thresholds(spec, X)
    slope = [0.5 / math.sqrt(v) for v in (1.2, 1.1, 5)]
    close(theta, [-slope[0], 0, -slope[1]])  # -(1 / 0.5) / 2
    close(b_enc, [slope[0] / 2, 0, (slope[1] + slope[2]) / 2])


def test_norms_of_layers() -> None:
    W = t([[3, 4, 5, 12], [0, 0, 0, 2], [0, 0, 0, 0]])
    root = math.sqrt(9 + 16 + 25 + 144)
    close(decoder_norm(W, "joint", 2), [root, 2, 0])
    close(decoder_norm(W, "sum", 2), [5 + 13, 2, 0])
    close(decoder_norm(W, "mixed", 2), [root + 1.8, 2.2, 0])
    close(decoder_norm(W, "sum", 1), [root, 2, 0])
    close(decoder_norm(W, "sum", 4), [24, 2, 0])


@pytest.mark.parametrize("norm", ["joint", "sum", "mixed"])
def test_a_crosscoder_weighs_its_codes_by_the_norm(norm: Any) -> None:
    p = {"W_enc": t([[1, 0, 0, 0], [0, 0, 1, 0]]), "b_enc": t(0.0, 0.0), "b_dec": t([0.0] * 4)}
    p["W_dec"] = t([[3, 4, 5, 12], [0, 0, 0, 0]]).requires_grad_()
    spec = DenseSpec(
        "relu", penalty="l1", coefficient=2.0, norm_weighted=True, norm=norm, n_layers=2
    )
    penalty = dense_loss(spec, p, t([[3, 0, 1, 0], [1, 0, 0, 0]])).penalty
    root = math.sqrt(194)
    value, slopes = {
        "joint": (root, [v / root for v in (3, 4, 5, 12)]),
        "sum": (18, [3 / 5, 4 / 5, 5 / 13, 12 / 13]),
        "mixed": (
            root + 1.8,
            [v / root + 0.1 * v / n for v, n in ((3, 5), (4, 5), (5, 13), (12, 13))],
        ),
    }[norm]
    close(penalty, 2 * 4 * value / 2)
    penalty.backward()
    close(grad(p["W_dec"]), [[4 * slope for slope in slopes], [0] * 4])  # a row of 0 has none
