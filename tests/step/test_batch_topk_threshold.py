"""BatchTopK: how its threshold follows training, and what it does with it afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config import OptimizerConfig
from sae_kernels.nn import (
    BatchTopKConfig,
    BatchTopKSAE,
    JumpReLUConfig,
    JumpReLUSAE,
    SparseAutoencoder,
)
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.testing import assert_bitwise
from tests.settings import settings
from tests.step.architectures import ARCHITECTURES, batch, build
from tests.step.harness import ROUTES, state, stepping, tokens

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

# Rows whose pre-activations are themselves; of two tokens 1.5 latents each are kept.
FIRST = torch.tensor([[9.0, 4.0, 0.0], [1.0, 8.0, -2.0]])  # keeps 9, 8, 4
SECOND = torch.tensor([[2.0, 7.0, 6.0], [1.0, -1.0, 0.0]])  # keeps 7, 6, 2
THIRD = torch.tensor([[5.0, -7.0, -6.0], [-1.0, -1.0, 3.0]])  # keeps 5 and 3: no more is positive
NOTHING = -torch.ones(2, 3)
Step = FusedStep | AutogradStep
routes = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


def _step(route: type[Step], rule: str, **options: Any) -> Step:
    """An SAE whose codes are its inputs; it does not learn, its threshold does."""
    config = BatchTopKConfig(
        3, 3, k=1.5, subtract_b_dec=False, unit_norm_decoder=False, threshold_rule=rule, **options
    )
    sae = BatchTopKSAE(config)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3) * torch.tensor([[1.0], [2.0], [0.5]]))
    config = settings(sae.config, compute="float32", auxk_alpha=0, loss="mse")
    return stepping(route, sae, config)


def _thresholds(step: Step, batches: list[Tensor]) -> list[float]:
    found = []
    for x in batches:
        step(x, lr=0.0)
        found.append(float(step.sae.get_buffer("threshold")))
    return found


@routes
@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Unset is -1, and the first key is taken as it is.
        ("dictionary_learning", [4, 0.999 * 4 + 0.001 * 2, 0.999 * 3.998 + 0.001 * 3]),
        ("sae_lens", [0.01 * 4, 0.99 * 0.04 + 0.01 * 2, 0.99 * 0.0596 + 0.01 * 3]),
    ],
)
def test_it_is_the_average_of_the_smallest_kept_keys(
    route: type[Step], rule: str, expected: list[float]
) -> None:
    step = _step(route, rule)
    start = float(step.sae.get_buffer("threshold"))
    assert start == (-1 if rule == "dictionary_learning" else 0)
    # In fp64: an error of 1e-15, where an fp32 average would be off by 1e-7.
    assert _thresholds(step, [FIRST, SECOND, THIRD]) == pytest.approx(expected, rel=1e-14)


@routes
def test_keys_are_values_times_norms_where_norms_rank(route: type[Step]) -> None:
    """Of [9, 4, 0], [1, 8, -2] times norms [1, 2, 1/2]: 16, 9, 8."""
    step = _step(route, "dictionary_learning", rank_by_decoder_norm=True)
    # Of [2, 7, 6], [1, -1, 0]: 14, 3, 2.
    want = [8, 0.999 * 8 + 0.001 * 2]
    assert _thresholds(step, [FIRST, SECOND]) == pytest.approx(want, rel=1e-14)
    # Above a threshold of 7.994: 9 of latent 0, from 3.997 on in latent 1, from 15.988 in latent 2.
    codes = step.sae.eval().encode(torch.tensor([[9.0, 4.0, 15.0], [7.9, 3.9, 16.0]]))
    assert codes.to_dense().tolist() == [[9, 4, 0], [0, 0, 16]]


@routes
@pytest.mark.parametrize("rule", ["dictionary_learning", "sae_lens"])
def test_a_batch_that_keeps_nothing_or_is_skipped_does_not_move_it(
    route: type[Step], rule: str
) -> None:
    step = _step(route, rule)
    before = _thresholds(step, [NOTHING])[0]
    assert before == (-1 if rule == "dictionary_learning" else 0)
    after = _thresholds(step, [FIRST])[0]
    nan, inf = FIRST.clone(), FIRST.clone()
    nan[0, 1], inf[1, 2] = torch.nan, torch.inf
    assert _thresholds(step, [nan, inf, NOTHING]) == [after] * 3
    assert _thresholds(step, [FIRST])[0] == pytest.approx(after if after == 4 else 0.0796)


@routes
def test_a_finite_batch_whose_loss_is_not_does_not_move_it(route: type[Step]) -> None:
    """Its smallest key is a number, which must not count."""
    step = _step(route, "sae_lens")
    before = _thresholds(step, [FIRST])
    assert step(1e30 * FIRST, lr=0.0).skipped
    assert float(step.sae.get_buffer("threshold")) == before[0]


def _trained(**options: Any) -> BatchTopKSAE:
    sae = BatchTopKSAE(BatchTopKConfig(32, 128, k=5.5, **options))
    step = FusedStep(sae, optimizer=OptimizerConfig(compute="float32"))
    for i in range(40):
        step(tokens(64, seed=i), lr=5e-3)
    sae.threshold.copy_(sae.last_key)  # the average takes a thousand steps to get there
    return sae


@pytest.mark.parametrize("ranked", [False, True])
def test_in_evaluation_it_is_a_jumprelu_sae(ranked: bool, either_backend: str) -> None:
    """With the threshold over the norms in the place of each latent's own."""
    sae = _trained(rank_by_decoder_norm=ranked, unit_norm_decoder=not ranked).eval()
    sae.backend, x = either_backend, tokens(50)
    scale = sae.rank_scale() if ranked else torch.ones(128)
    config = JumpReLUConfig(32, 128, log_threshold=False)
    jump = JumpReLUSAE(config, backend=either_backend).eval()
    weights = {n: t for n, t in sae.state_dict().items() if n != "threshold"}
    jump.load_state_dict({**weights, "threshold": sae.threshold.float() / scale})
    ours, theirs = sae(x), jump(x)
    assert_bitwise("latents", ours.codes.indices, theirs.codes.indices)
    assert_bitwise("values", ours.codes.values, theirs.codes.values)
    assert_bitwise("x_hat", ours.x_hat, theirs.x_hat)
    # The threshold is one: about as many latents as k, and by no means the same in each token.
    counts = ours.codes.offsets.diff().float()
    assert 3 < float(counts.mean()) < 9
    assert float(counts.std()) > 0.5


def test_in_evaluation_a_token_does_not_depend_on_the_others() -> None:
    sae, x = _trained().eval(), tokens(20)
    together = sae.encode(x).to_dense()
    for i, row in enumerate(x):
        assert_bitwise("codes", sae.encode(row[None]).to_dense()[0], together[i])
    sae.train()
    alone = sae.encode(x[:1])
    assert alone.values.numel() == 5  # in training mode k holds in every batch


def test_a_value_at_the_threshold_is_not_kept() -> None:
    sae = _step(FusedStep, "dictionary_learning").sae
    sae.get_buffer("threshold").fill_(4.0)
    assert sae.eval().encode(FIRST).to_dense().tolist() == [[9, 0, 0], [0, 8, 0]]
    sae.get_buffer("threshold").fill_(-1.0)  # unset: every positive one
    assert sae.encode(FIRST).to_dense().tolist() == [[9, 4, 0], [1, 8, 0]]


def test_it_is_saved_bit_for_bit_and_follows_the_scale(tmp_path: Path) -> None:
    sae = _trained(activation_scale=1.0)
    sae.save_pretrained(tmp_path)
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert isinstance(again, BatchTopKSAE)
    assert again.threshold.dtype == torch.float64
    assert_bitwise("threshold", again.threshold[None], sae.threshold[None])
    assert again.to(torch.bfloat16).threshold.dtype == torch.float64


@pytest.mark.parametrize("copy_of", ["folded", "saved"])
def test_a_copy_can_be_trained_on(copy_of: str, tmp_path: Path) -> None:
    """The guess of the next key is not in the files; it must not be missed."""
    sae = _trained()
    if copy_of == "folded":
        again: Any = sae.folded()
    else:
        sae.save_pretrained(tmp_path)
        again = BatchTopKSAE.from_pretrained(tmp_path).to("cpu")
    steps = [FusedStep(each, optimizer=OptimizerConfig(compute="float32")) for each in (sae, again)]
    for i in range(3):
        results = [step(tokens(64, seed=i), lr=1e-3) for step in steps]
        assert float(results[0].loss) == float(results[1].loss)
    assert_bitwise("W_dec", *(step.sae.W_dec.detach() for step in steps))


GUESSES = [float("nan"), float("inf"), -3.0, 0.0, 1e-30, 1e30, 0.4]


@routes
@pytest.mark.parametrize("name", ["batchtopk", "batchtopk-ranked", "matryoshka-sum"])
def test_the_guess_of_the_smallest_key_is_only_a_guess(name: str, route: type[Step]) -> None:
    """Whatever stands there before a step, the step is the same bit for bit."""
    case = ARCHITECTURES[name]
    honest, misled = (build(case, route, "cpu") for _ in range(2))
    for i, guess in enumerate(GUESSES):
        misled.sae.get_buffer("last_key").fill_(guess)
        x, _ = batch(case, seed=i)
        results = [step(x, lr=1e-3) for step in (honest, misled)]
        assert float(results[0].loss) == float(results[1].loss)
    for n, (m, v) in state(honest).moments.items():
        assert_bitwise(n, state(misled).weights[n], state(honest).weights[n])
        assert_bitwise(n, state(misled).moments[n][0], m)
        assert_bitwise(n, state(misled).moments[n][1], v)
    thresholds = [step.sae.get_buffer("threshold") for step in (honest, misled)]
    assert_bitwise("threshold", *(t[None] for t in thresholds))
