"""The dense oracles: what they keep and reconstruct, worked out by hand."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_kernels.testing import DenseResult, DenseSpec, assert_bitwise, dense_loss
from sae_kernels.testing import dense as dense_module
from sae_kernels.testing.dense_selection import batchtopk_kept, rank_order, topk_kept
from tests.testing.dense_examples import close, grad, identity, inf, kept, nan, raw, t

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

# Parameters that are not the identity: two inputs, five latents, h = [1, 2, 2, 4, 3] of x = [1, 2].
SMALL = {
    "W_enc": t([[1, 0], [2, 0], [0, 1], [0, 2], [1, 1]]),
    "b_enc": t([0.0] * 5),
    "W_dec": t([[1, 1], [0, 1], [1, 0], [1, 0], [0, 2]]),
    "b_dec": t(1.0, -1.0),
}


def test_the_files_stand_on_torch_alone() -> None:
    folder = Path(dense_module.__file__).parent
    own = ("dense", "dense_selection", "dense_spec", "dense_switch")
    for name in own:
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                assert [alias.name for alias in node.names] in (["torch"], ["dataclasses"])
            elif isinstance(node, ast.ImportFrom):
                part = str(node.module).removeprefix("sae_kernels.testing.")
                assert part in ("__future__", "typing", "collections.abc", "torch", *own)


def test_topk_by_hand() -> None:
    x, y = t([[1.0, 2.0]]), t([[5.0, 1.0]])
    result = dense_loss(raw("topk", k=1), SMALL, x, y)
    close(result.h, [[1, 2, 2, 4, 3]])
    close(result.codes, [[0, 0, 0, 4, 0]])
    close(result.y_hat, [[5, -1]])  # 4 [1, 0] + [1, -1]
    assert result.loss.item() == result.reconstruction.item() == 4
    assert result.penalty.item() == 0


def test_centring_subtracts_the_decoder_bias_first() -> None:
    result = dense_loss(DenseSpec("topk", k=1), SMALL, t([[2.0, 1.0]]))  # x - b_dec = [1, 2]
    close(result.h, [[1, 2, 2, 4, 3]])
    close(result.y_hat, [[5, -1]])
    assert result.loss.item() == 9 + 4  # against x itself


def test_the_order_is_by_key_then_latent_and_nan_comes_first() -> None:
    minus_nan = torch.tensor([-(2**51)]).view(torch.float64)  # the sign bit is set
    assert bool((minus_nan.isnan() & minus_nan.signbit()).all())
    key = torch.cat([t(1, nan, inf, -0.0, 0, 1), minus_nan, t([-inf])])
    assert rank_order(key).tolist() == [1, 6, 2, 0, 5, 3, 4, 7]
    assert rank_order(torch.zeros(100).double()).tolist() == list(range(100))


@pytest.mark.parametrize("relu", [True, False])
def test_topk_keeps_the_first_k_and_relu_zeroes_values(relu: bool) -> None:
    x = t([[-1, -3, -1, -2], [2, 2, 1, 2], [0, 4, -1, 5]])
    codes = dense_loss(raw("topk", k=3, relu=relu), identity(4), x).codes
    first = [0, 0, 0, 0] if relu else [-1, 0, -1, -2]
    assert_bitwise("codes", codes, t([first, [2, 2, 0, 2], [0, 4, 0, 5]]))
    key = t([[nan, 1, 5, nan], [-inf, inf, 0, 1], [-inf, -inf, -inf, -inf]])
    assert kept(topk_kept(key, 3)) == [[0, 2, 3], [1, 2, 3], [0, 1, 2]]


def test_topk_may_keep_everything() -> None:
    x = t([[3, -1, 2]])
    assert_bitwise("all", dense_loss(raw("topk", k=3, relu=False), identity(3), x).codes, x)


def test_ranking_by_decoder_norm_leaves_the_values() -> None:
    x = t([[4, 3, 1]])
    p = identity(3, W_dec=torch.diag(t(1, 2, 5)))
    spec = raw("topk", k=1, rank_by_decoder_norm=True)  # keys 4, 6, 5
    close(dense_loss(spec, p, x).codes, [[0, 3, 0]])
    close(dense_loss(raw("topk", k=1), p, x).codes, [[4, 0, 0]])
    # Of two layers: norms 5 and 5, or 7 and 5 as sums.
    p = {"W_enc": t([[1.0], [1.2]]), "W_dec": t([[3.0, 4.0], [5.0, 0.0]])}
    p |= {"b_enc": t(0.0, 0.0), "b_dec": t(0.0, 0.0)}
    x, y = t([[1.0]]), t([[0.0, 0.0]])
    for norm, first in (("joint", 1), ("sum", 0), ("mixed", 1)):  # 5 | 6, 7 | 6, 5.7 | 6.6
        spec = raw("topk", k=1, rank_by_decoder_norm=True, n_layers=2, norm=norm)
        assert kept(dense_loss(spec, p, x, y).codes) == [[first]]


@pytest.mark.parametrize(
    ("k", "wanted"),
    [
        (0.4, [[], []]),  # int(0.8) = 0
        (0.5, [[0], []]),
        (1, [[0], [1]]),
        (1.9, [[0, 2], [1]]),  # int(3.8) = 3; the tie goes to the lower token
        (2, [[0, 2], [1, 2]]),
        (9, [[0, 2, 3], [0, 1, 2]]),  # all that is positive, and no zero
    ],
)
def test_batchtopk_counts_over_the_batch(k: float, wanted: list[list[int]]) -> None:
    x = t([[9, -3, 4, 1], [2, 8, 4, 0]])
    codes = dense_loss(raw("batchtopk", k=k), identity(4), x).codes
    assert kept(codes) == wanted
    assert_bitwise("values", codes[codes != 0], x[codes != 0])


def test_batchtopk_ties_go_to_the_lower_token_then_latent() -> None:
    x = t([[1, 1, 1], [1, 1, 2], [1, 1, 1]])
    assert kept(dense_loss(raw("batchtopk", k=5 / 3), identity(3), x).codes) == [
        [0, 1, 2],
        [0, 2],
        [],
    ]


def test_batchtopk_ranks_by_norm() -> None:
    p = identity(3, W_dec=torch.diag(t(1, 4, 0)))
    x = t([[5, 2, 9], [7, 1, -9]])  # keys 5, 8, 0; 7, 4, none
    spec = raw("batchtopk", k=1, rank_by_decoder_norm=True)
    assert_bitwise("codes", dense_loss(spec, p, x).codes, t([[0, 2, 0], [7, 0, 0]]))
    spec = raw("batchtopk", k=9, rank_by_decoder_norm=True)  # a key of 0 is still a positive code
    assert kept(dense_loss(spec, p, x).codes) == [[0, 1, 2], [0, 1]]
    assert kept(batchtopk_kept(t([[0, 2], [1, -1]]), t([[0, 0], [3, -1]]), 4)) == [[1], [0]]


def test_relu_and_gated_codes() -> None:
    x = t([[-1, 2, 0]])
    close(dense_loss(raw("relu"), identity(3), x).codes, [[0, 2, 0]])
    p = identity(3, b_enc=t(2, -2, 1), r_mag=t(2, 0.5, 0).log(), b_mag=t(3, 1, -4))
    result = dense_loss(raw("gated"), p, x)
    close(result.h, [[1, 0, 1]])  # the second is not above 0: its gate is shut
    close(result.codes, [[1, 0, 0]])  # 2 * -1 + 3; shut; relu(0 - 4)


def test_a_threshold_may_be_negative() -> None:
    p = identity(3, threshold=t(-1, -1, -1))
    codes = dense_loss(raw("jumprelu", bandwidth=0.1), p, t([[-0.5, -1, 2]])).codes
    close(codes, [[-0.5, 0, 2]])


def test_scales() -> None:
    x = t([[1, 0], [3, 0]])  # sum of squares about the mean: 2
    p = identity(2, b_dec=t(0, 3))
    for loss, expected in (("mse", 18 / 2), ("fvu", 18 / 2.0)):
        assert dense_loss(raw("relu", loss=loss), p, x).loss.item() == expected
    x = t([[1, 0], [5, 0], [0, 0]])  # the mean is 2: 1 + 9 + 4
    close(dense_loss(raw("relu", loss="fvu"), p, x).loss, 27 / 14)
    close(dense_loss(raw("relu"), p, x).loss, 27 / 3)
    y = x + t([[0, 1], [0, 3], [0, 3]])  # the target's variance: 14 + 8 / 3
    close(dense_loss(raw("relu", loss="fvu"), p, x, y).loss, 4 / (14 + 8 / 3))


def test_multi_topk_adds_an_eighth_of_the_error_of_4k() -> None:
    x, y = t([[1.0, 2.0]]), t([[5.0, 1.0]])
    result = dense_loss(raw("topk", k=1, multi_topk=True), SMALL, x, y)
    # Latents 1 to 4: 2 [0, 1] + 2 [1, 0] + 4 [1, 0] + 3 [0, 2] + [1, -1] = [7, 7]
    close(result.loss, 4 + (4 + 36) / 8)
    close(result.codes, [[0, 0, 0, 4, 0]])
    close(result.y_hat, [[5, -1]])
    more = dense_loss(raw("topk", k=4, multi_topk=True), SMALL, x, y)  # 4k is all there are
    close(more.y_hat, [[7, 7]])
    close(more.loss, 40 + (9 + 49) / 8)
    batch = dense_loss(
        raw("batchtopk", k=0.5, multi_topk=True), SMALL, *(v.repeat(2, 1) for v in (x, y))
    )
    # One entry of two tokens, then four: latents 3 and 4 of both.
    close(batch.codes, [[0, 0, 0, 4, 0], [0, 0, 0, 0, 0]])
    close(batch.loss, ((0 + 4) + (16 + 4) + 2 * (0 + 16) / 8) / 2)


def test_prefixes_by_hand() -> None:
    x, y = t([[1.0, 2.0]]), t([[5.0, 1.0]])
    spec = raw("relu", group_ends=(0, 1, 3, 5))
    # b_dec [1, -1]; + 1 [1, 1] = [2, 0]; + [0, 2] + [2, 0] = [4, 2]; + [4, 0] + [0, 6] = [8, 8]
    errors = [16 + 4, 9 + 1, 1 + 1, 9 + 49]
    result = dense_loss(spec, SMALL, x, y)
    close(result.loss, sum(errors) / 4)
    close(result.y_hat, [[8, 8]])
    weights = (0.5, 2.0, 0.0, 1.0)
    result = dense_loss(raw("relu", group_ends=(0, 1, 3, 5), group_weights=weights), SMALL, x, y)
    close(result.loss, sum(w * e for w, e in zip(weights, errors, strict=True)))


def test_an_empty_prefix_gives_only_the_bias_a_gradient() -> None:
    p = identity(2, b_dec=t(3, 0))
    spec = raw("relu", group_ends=(0, 2), group_weights=(1.0, 0.0))
    dense_loss(spec, p, t([[1, 1]])).loss.backward()
    close(grad(p["b_dec"]), [4, -2])
    assert not grad(p["W_dec"]).any()
    assert not grad(p["W_enc"]).any()


def test_a_skip_connection_reads_x_before_centring() -> None:
    W_skip = t([[0, 1], [10, 0]])
    result = dense_loss(DenseSpec("topk", k=1), SMALL | {"W_skip": W_skip}, t([[2.0, 1.0]]))
    close(result.h, [[1, 2, 2, 4, 3]])
    close(result.y_hat, [[5 + 1, -1 + 20]])
    spec = DenseSpec("topk", k=1, group_ends=(0, 5))
    close(
        dense_loss(spec, SMALL | {"W_skip": W_skip}, t([[2.0, 1.0]])).loss,
        ((0 + 18**2) + (4**2 + 18**2)) / 2,  # [2, 19] and [6, 19] against [2, 1]
    )


def test_a_transcoder_has_other_widths() -> None:
    p = {"W_enc": t([[1.0], [-1.0]]), "b_enc": t(0.0, 5.0), "b_dec": t(0.0, 0.0, 1.0)}
    p["W_dec"] = t([[1, 2, 3], [1, 0, 0]])
    result = dense_loss(raw("topk", k=1), p, t([[2.0]]), t([[3.0, 0.0, 0.0]]))
    close(result.codes, [[0, 3]])
    close(result.y_hat, [[3, 0, 1]])
    assert result.loss.item() == 1


def gated_example(stops: bool) -> dict[str, Tensor]:
    """Gradients by the auxiliary loss alone: magnitudes are 0, so f is 0 and gives none."""
    p = identity(2, b_enc=t(1, -9), r_mag=t(0, 0), b_mag=t(-99, -99), W_dec=t([[2, 0], [1, 1]]))
    p["b_dec"] = t(0.5, 0.0).requires_grad_()
    y = t([[0.5, 0.0], [0.5, 0.0]])  # = b_dec, so the main squared error is 0
    spec = DenseSpec("gated", aux_stops_decoder=stops)
    result = dense_loss(spec, p, t([[2.5, 1], [0.5, 3]]), y)
    close(result.h, [[3, -8], [1, -6]])
    close(result.reconstruction, (36 + 4) / 2)  # relu(pi) W_dec: [6, 0] and [2, 0]
    result.loss.backward()
    return p


def test_the_gated_auxiliary_loss_through_a_stopped_decoder() -> None:
    p = gated_example(stops=True)
    # dL/dpi = 2 scale e W_dec^T where pi > 0: 2/2 * 6 * 2 and 2/2 * 2 * 2
    close(grad(p["b_enc"]), [16, 0])
    close(grad(p["W_enc"]), [[12 * 2 + 4 * 0, 12 * 1 + 4 * 3], [0, 0]])
    assert not grad(p["W_dec"]).any()
    close(grad(p["b_dec"]), [-16, 0])  # of the centring only
    assert not grad(p["r_mag"]).any()


def test_the_gated_auxiliary_loss_through_the_decoder() -> None:
    p = gated_example(stops=False)
    close(grad(p["b_enc"]), [16, 0])
    close(grad(p["W_dec"]), [[6 * 3 + 2 * 1, 0], [0, 0]])
    close(grad(p["b_dec"]), [-16 + 6 + 2, 0])


def test_the_gated_auxiliary_loss_sees_the_skip_connection() -> None:
    p = identity(1, b_enc=t([1.0]), r_mag=t([0.0]), b_mag=t([-99.0]), W_skip=t([[3.0]]))
    result = dense_loss(raw("gated"), p, t([[1.0]]), t([[3.0]]))
    close(result.reconstruction, 2**2)  # 3 of the skip and 2 of relu(pi)
    result.loss.backward()
    close(grad(p["W_skip"]), [[0]])  # a part of the stopped decoder
    close(grad(p["b_enc"]), [4])


def test_gated_magnitudes_by_hand() -> None:
    # dL/dr_mag = sum_b g 1[mag > 0] gate exp(r_mag) a; no gradient through the gate.
    r = math.log(2)
    p = identity(3, b_enc=t(1, 1, -5), r_mag=t(r, r, r), b_mag=t(1, -9, 1))
    spec = raw("gated")
    x = t([[3, 3, 3]])
    result = dense_loss(spec, p, x, y=t([[6, 4, -2]]))
    close(result.codes, [[7, 0, 0]])
    close(result.reconstruction, (1 + 16 + 4) + (4 + 0 + 4))  # relu(pi) = [4, 4, 0]
    result.loss.backward()
    g = 2 * (7 - 6)
    close(grad(p["r_mag"]), [g * 2 * 3, 0, 0])
    close(grad(p["b_mag"]), [g, 0, 0])
    close(grad(p["b_enc"]), [2 * (4 - 6), 0, 0])  # by the auxiliary loss
    close(grad(p["W_enc"])[0], [3 * (g * 2 + 2 * (4 - 6))] * 3)


def test_the_gated_penalty_acts_on_the_gate() -> None:
    p = identity(3, b_enc=t(1, -9, 0), r_mag=t(0, 0, 0), b_mag=t(5, 5, 5))
    p["W_dec"] = torch.diag(t(2, 1, 3)).requires_grad_()
    x = t([[1, 1, 1], [3, 1, -1]])
    for weighted, norms in ((False, (1, 1, 1)), (True, (2, 1, 3))):
        spec = raw("gated", penalty="l1", coefficient=10.0, norm_weighted=weighted)
        penalty = dense_loss(spec, p, x).penalty
        close(penalty, 10 * (2 * norms[0] + 1 * norms[2] + 4 * norms[0]) / 2)
        close(torch.autograd.grad(penalty, p["b_enc"])[0], [10 * norms[0], 0, 5 * norms[2]])


def switch_example(**settings: Any) -> tuple[dict[str, Tensor], DenseResult]:
    router = t([[0, 0, 0, 0], [0, 0, 0, math.log(3) / 2]])
    p = identity(4, W_router=router, b_router=t([0, 0, 0, 0]))
    spec = raw("switch", k=1, n_experts=2, **settings)
    return p, dense_loss(spec, p, t([[9, 1, 3, 2]]), t([[0, 0, 2, 0]]))


def test_switch_by_hand() -> None:
    # Logits [0, log 3], probabilities [1/4, 3/4]: the larger 9 is the other expert's.
    p, result = switch_example(balance=2.0)
    close(result.codes, [[0, 0, 0.75 * 3, 0]])
    close(result.reconstruction, 0.25**2)
    close(result.penalty, 2 * 2 * (0 * 0.25 + 1 * 0.75))
    result.reconstruction.backward()
    dcode = 2 * 0.25
    close(grad(p["b_enc"]), [0, 0, dcode * 0.75, 0])
    # dL/dp_1 = dcode h = 1.5, and softmax's Jacobian p_i (1[i = 1] - p_1).
    slope = 1.5 * 0.75 * 0.25
    x = t([9, 1, 3, 2])
    assert torch.allclose(grad(p["W_router"]), torch.stack([-slope * x, slope * x]))
    assert torch.allclose(grad(p["b_router"]), t([0, 0, 0, -slope * math.log(3) / 2]))


def test_the_load_balance_has_a_gradient_through_the_probabilities_alone() -> None:
    p, result = switch_example(balance=1.0)
    result.penalty.backward()
    # E F_1 dP_1/dlogit_1 = 2 * 1 * p_1 (1 - p_1)
    slope = 2 * 0.75 * 0.25
    assert torch.allclose(grad(p["W_router"])[:, 1], t([-slope, slope]))


def test_a_heaviside_gate_leaves_the_router_to_the_load_balance() -> None:
    p, result = switch_example(gated=False)
    close(result.codes, [[0, 0, 3, 0]])
    result.reconstruction.backward()
    assert p["W_router"].grad is None


def test_a_shared_expert_competes_without_a_gate() -> None:
    router = t([[0, 0, 0], [0, 0, math.log(3) / 4]])
    p = identity(3, W_router=router, b_router=t([0, 0, 0]))
    spec = raw("switch", k=1, n_experts=3, shared_expert=True)
    for first, codes in ((2, [0, 0, 3]), (4, [4, 0, 0]), (-1, [0, 0, 3])):
        close(dense_loss(spec, p, t([[first, 9, 4]])).codes, [codes])
    close(dense_loss(spec, p, t([[3, 9, 4]])).codes, [[3, 0, 0]])  # a tie goes to the lower
