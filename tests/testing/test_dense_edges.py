"""The dense oracles: NaN, infinities, and what is refused."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_kernels.testing import DenseSpec, assert_within, dense_loss
from tests.testing.dense_examples import close, identity, inf, nan, randoms, raw, t

pytestmark = pytest.mark.usefixtures("poisoned", "one_thread")

SELECTIONS = {
    "topk": raw("topk", k=2),
    "batchtopk": raw("batchtopk", k=2),
    "relu": raw("relu"),
    "jumprelu": raw("jumprelu", bandwidth=0.5, penalty="l0", coefficient=1.0),
    "gated": raw("gated"),
}


def parameters_of(spec: DenseSpec) -> dict[str, Tensor]:
    vectors = {"jumprelu": ("threshold",), "gated": ("r_mag", "b_mag")}.get(spec.selection, ())
    return identity(3, **{name: t(1, 1, 1) for name in vectors})


@pytest.mark.parametrize("spec", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_a_nan_in_a_token_reaches_its_codes_and_the_loss(spec: DenseSpec) -> None:
    x = t([[5, 1.2, -1], [2, nan, 3]])
    result = dense_loss(spec, parameters_of(spec), x)
    assert bool(result.codes[1].isnan().any())
    assert not bool(result.codes[0].isnan().any())
    assert bool(result.loss.isnan())


CASES_OF_NAN = [
    (name, parameter) for name, spec in SELECTIONS.items() for parameter in parameters_of(spec)
]


@pytest.mark.parametrize(("name", "parameter"), CASES_OF_NAN)
def test_a_nan_in_any_parameter_reaches_the_loss(name: str, parameter: str) -> None:
    p = parameters_of(SELECTIONS[name])
    with torch.no_grad():
        p[parameter].view(-1)[0] = nan
    result = dense_loss(SELECTIONS[name], p, t([[5, 1.2, -1], [2, 1, 3]]))
    assert bool(result.reconstruction.isnan())
    if name == "jumprelu" and parameter not in ("W_dec", "b_dec"):
        assert bool(result.penalty.isnan()), "L0 counts no NaN as absent"


def test_a_nan_is_the_first_of_the_batch() -> None:
    p = identity(3, W_enc=t([[nan, 0, 0], [0, 1, 0], [0, 0, 1]]))
    x = t([[4, 5, -1], [2, 3, 1]])
    codes = dense_loss(raw("batchtopk", k=1.5), p, x).codes  # three: both NaN, then the 5
    assert_within("codes", codes, t([[nan, 5, 0], [nan, 0, 0]]), 0.0)


@pytest.mark.parametrize("selection", ["jumprelu", "gated"])
def test_a_shut_latent_is_zero_even_of_infinity(selection: str) -> None:
    spec = SELECTIONS[selection]
    p = parameters_of(spec) | {"b_enc": t(-inf, 0, 0)}
    if selection == "gated":
        p["b_mag"] = t(inf, 1, 1)
    close(dense_loss(spec, p, t([[5, -5, -5]])).codes, [[0, 0, 0]])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"selection": "top"}, "selection: expected one of topk, batchtopk"),
    ({"selection": "relu", "loss": "l2"}, "loss: expected one of fvu, mse"),
    ({"selection": "topk"}, "k: expected a positive number"),
    ({"selection": "topk", "k": 1.5}, "k: expected a whole number"),
    ({"selection": "batchtopk", "k": nan}, "k: expected a positive number"),
    ({"selection": "jumprelu"}, "bandwidth: expected a positive number"),
    ({"selection": "relu", "multi_topk": True}, "multi_topk: expected topk or batchtopk"),
    ({"selection": "relu", "rank_by_decoder_norm": True}, "rank_by_decoder_norm: expected topk"),
    ({"selection": "relu", "relu": False}, "relu: only topk may leave it out"),
    ({"selection": "relu", "penalty": "l0"}, "l0 has a gradient with jumprelu only, got relu"),
    ({"selection": "topk", "k": 1, "relu": False, "penalty": "l1"}, "l1 needs codes that are not"),
    ({"selection": "relu", "penalty": "lp", "p": -1}, "p: expected a number of at least 0"),
    ({"selection": "relu", "preact": 1.0}, "preact: expected jumprelu"),
    ({"selection": "relu", "group_ends": ()}, "group_ends: expected ascending"),
    ({"selection": "relu", "group_ends": (3, 1)}, "group_ends: expected ascending"),
    ({"selection": "relu", "group_weights": (1.0,)}, "group_weights: expected one for each"),
    (
        {"selection": "jumprelu", "bandwidth": 1, "penalty": "target_l0"},
        "target_l0: expected a positive number",
    ),
    (
        {"selection": "jumprelu", "bandwidth": 1, "penalty": "l0", "norm_weighted": True},
        "norm_weighted: expected l1, lp or tanh",
    ),
]


@pytest.mark.parametrize(
    ("settings", "message"), REFUSED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_settings_without_a_meaning_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DenseSpec(**settings)


@pytest.mark.parametrize(
    ("selection", "penalty"),
    list(itertools.product(["topk", "batchtopk", "relu", "gated"], ["l0", "target_l0"])),
)
def test_counting_penalties_need_jumprelu(selection: Any, penalty: Any) -> None:
    with pytest.raises(ValueError, match="use l1, lp or tanh"):
        DenseSpec(selection, k=1, penalty=penalty, target_l0=1.0)


def test_tensors_that_do_not_fit_are_refused() -> None:
    p, x = identity(3), t([[1, 2, 3]])
    without = {name: value for name, value in p.items() if name != "b_enc"}
    jump = raw("jumprelu", bandwidth=1.0, preact=1.0)
    theta = {"threshold": t(1, 1, 1)}
    for spec, parameters, arguments, message in (
        (raw("relu"), without, (x,), "parameters: expected W_enc, b_enc, W_dec, b_dec"),
        (raw("gated"), p, (x,), "W_dec, b_dec, r_mag, b_mag and"),
        (raw("relu"), p | theta, (x,), "got W_enc, b_enc, W_dec, b_dec, threshold"),
        (jump, p | theta | {"log_threshold": t(1, 1, 1)}, (x,), "expected .*, log_threshold and"),
        (raw("relu"), p | {"b_enc": t([1.0])}, (x,), r"b_enc: expected shape \[3\], got \[1\]"),
        (raw("relu"), p, (x[0],), r"expected \[B, d_in\] and \[B, d_out\] with B > 0"),
        (raw("relu"), p, (x[:0],), r"with B > 0, got \[0, 3\]"),
        (raw("relu"), p, (x, x.repeat(2, 1)), r"got \[1, 3\] and \[2, 3\]"),
        (raw("topk", k=4), p, (x,), "k: expected at most n_latents = 3, got 4"),
        (raw("relu", group_ends=(1, 2)), p, (x,), "group_ends: expected to end in F = 3"),
        (raw("relu", n_layers=2), p, (x,), "n_layers: expected a divisor of d_out = 3"),
        (jump, p | theta, (x,), r"dead: preact needs a bool tensor of shape \[3\], got None"),
        (jump, p | theta, (x, x, t([1, 1, 1])), r"shape \[3\], got torch.float64 \[3\]"),
        (DenseSpec("relu"), randoms(3, 3, 2), (x, x[:, :2]), "expected d_in = d_out, got 3 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            dense_loss(spec, parameters, *arguments)
