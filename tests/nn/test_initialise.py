"""Where training starts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sae_kernels.config import TrainConfig
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    JumpReLUObjective,
    ReLUConfig,
    SAEConfig,
    SparseAutoencoder,
    TopKConfig,
    TopKSAE,
    build,
    geometric_median,
)
from sae_kernels.nn.initialise import bounds_at, scale_encoder_, unit_rows
from sae_kernels.testing import assert_bitwise, assert_within, gamma
from sae_kernels.training.fresh import prepare


def _distances(point: Tensor, x: Tensor) -> float:
    return float((x.double() - point.double()).norm(dim=1).sum())


@pytest.mark.parametrize(
    ("rows", "median"),
    [
        ([[3.0, -2.0]], [3.0, -2.0]),
        ([[5.0, 5.0]] * 4, [5.0, 5.0]),
        ([[0.0], [0.0], [9.0]], [0.0]),  # a row with most of the weight is the median
        ([[-1.0, 0.0], [1.0, 0.0], [0.0, -3.0], [0.0, 3.0]], [0.0, 0.0]),  # the crossing point
        # The Fermat point of the right isosceles triangle: (3 - sqrt 3) / 6 on either axis.
        ([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [0.2113249, 0.2113249]),
        # An angle of at least 120 degrees: its own corner.
        ([[0.0, 0.0], [10.0, 1.0], [-10.0, 1.0]], [0.0, 0.0]),
    ],
    ids=["one-row", "all-equal", "majority", "cross", "fermat-point", "obtuse-corner"],
)
def test_known_medians(rows: list[list[float]], median: list[float]) -> None:
    got = geometric_median(torch.tensor(rows), iterations=2000)
    # It stops when a step is under 1e-6 of the norm; steps shrink geometrically.
    assert got.tolist() == pytest.approx(median, abs=1e-4)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_a_start_on_a_row_is_left(offset: float) -> None:
    """The mean of these is the third row, the median is the fourth: plain Weiszfeld stays put."""
    x = torch.tensor([[-6.0], [-1.0], [0.0], [1.0], [2.0], [2.0], [2.0]]) + offset
    assert float(x.mean()) == offset
    assert float(geometric_median(x)) == pytest.approx(1.0 + offset, abs=2e-4 * max(1, offset))


def test_the_median_has_the_least_sum_of_distances() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=g)
    x[:20] *= 50  # outliers drag the mean, hardly the median
    median = geometric_median(x)
    least = _distances(median, x)
    assert least < _distances(x.mean(0), x)
    for _ in range(50):
        step = 0.01 * torch.nn.functional.normalize(torch.randn(6, generator=g), dim=0)
        assert _distances(median + step, x) > least


def test_half_precision_samples_do_not_overflow() -> None:
    x = torch.tensor([[3e4], [3e4], [6e4]], dtype=torch.float16)
    got = geometric_median(x)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([3e4], rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (5,), (2, 2, 2)], ids=str)
def test_geometric_median_of_nothing_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"x: expected shape \[N, D\] with N > 0, got \["):
        geometric_median(torch.zeros(shape))


def test_decoder_rows_are_random_unit_vectors_and_the_encoder_their_copy() -> None:
    sae = TopKSAE(TopKConfig(48, 3000, 4), seed=5)
    assert_bitwise("tied", sae.W_enc.data, sae.W_dec.data)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    norms = sae.W_dec.data.double().norm(dim=1)
    assert_within("norms", norms, torch.ones(3000), gamma(48 + 3, torch.float32))
    assert not sae.b_enc.any()
    assert not sae.b_dec.any()
    # Uniform on the sphere: components of mean 0 and variance 1 / D, within 5 standard errors.
    entries = sae.W_dec.data.double().flatten()
    assert abs(float(entries.mean())) < 5 * (1 / 48 / entries.numel()) ** 0.5
    assert float(entries.square().mean()) == pytest.approx(1 / 48, rel=1e-6)
    largest_mean = entries.view(3000, 48).mean(0).abs().max()
    assert float(largest_mean) < 5 * (1 / 48 / 3000) ** 0.5


def test_seeds_name_the_weights() -> None:
    config = TopKConfig(8, 20, 2)
    first = TopKSAE(config, seed=1)
    torch.manual_seed(99)  # the global generator has no part in it
    assert_bitwise("seed 1", TopKSAE(config, seed=1).W_dec.data, first.W_dec.data)
    assert (TopKSAE(config, seed=2).W_dec != first.W_dec).any()
    before = torch.random.get_rng_state()
    TopKSAE(config)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_unit_rows_of_width_one() -> None:
    assert unit_rows(50, 1, torch.Generator().manual_seed(0)).abs().eq(1).all()


SAMPLE, L0 = 1500, 6.0
TARGETED: dict[str, SAEConfig] = {
    "jumprelu": JumpReLUConfig(16, 80),
    "jumprelu-raw": JumpReLUConfig(16, 80, log_threshold=False),
    "jumprelu-transcoder": JumpReLUConfig(16, 80, d_out=5, subtract_b_dec=False),
    "gated": GatedConfig(16, 80),
    "relu": ReLUConfig(16, 80, subtract_b_dec=False),
    "relu-layers": ReLUConfig(8, 80, n_layers=2),
}


def _activations(width: int = 16) -> Tensor:
    """Columns of unlike spread around a point of their own, far from the scale of training."""
    g = torch.Generator().manual_seed(1)
    spread = torch.linspace(0.2, 3, width)
    return 40 * (torch.randn(SAMPLE, width, generator=g) * spread + torch.rand(width, generator=g))


@pytest.mark.parametrize("config", TARGETED.values(), ids=TARGETED)
def test_training_starts_at_the_l0_it_aims_at(config: SAEConfig) -> None:
    x = _activations(config.input_width + config.output_width * config.transcodes)
    objective = build(config).objective_class(target_l0=L0)
    sae = prepare(x, config, TrainConfig(batch_size=64, device="cpu", objective=objective)).eval()
    codes = sae.encode(x[:, : config.input_width])
    # A latent fires on n L0 / F tokens, rounded; ties and roundings at its bound take one or two.
    wanted = SAMPLE * L0 / config.n_latents
    fired = codes.indices.long().bincount(minlength=config.n_latents)
    assert int((fired - wanted).abs().max()) <= 2
    assert abs(len(codes.values) / SAMPLE - L0) < 0.02 * L0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("config", [JumpReLUConfig(16, 80), GatedConfig(16, 80)])
def test_modules_of_other_dtypes_start_there_too(config: SAEConfig, dtype: torch.dtype) -> None:
    objective = build(config).objective_class(target_l0=L0)
    settings = TrainConfig(batch_size=64, device="cpu", objective=objective)
    sae = prepare(_activations(), build(config).to(dtype), settings).eval()
    l0 = len(sae.encode(_activations()).values) / SAMPLE
    assert l0 == pytest.approx(L0, rel=0.1 if dtype == torch.bfloat16 else 0.02)


def test_given_thresholds_and_no_target_are_left_alone() -> None:
    x, about = (
        _activations(),
        TrainConfig(batch_size=64, device="cpu", normalize_activations="none"),
    )
    for config, objective in (
        (JumpReLUConfig(16, 80, threshold_init=0.7), JumpReLUObjective()),
        (JumpReLUConfig(16, 80), JumpReLUObjective(sparsity="l0", target_l0=None)),
    ):
        sae = prepare(x, config, dataclasses.replace(about, objective=objective))
        for name, parameter in build(config).named_parameters():
            if name != "b_dec":
                assert_bitwise(name, sae.get_parameter(name).data, parameter.data)


def test_a_fresh_encoder_has_the_size_that_reconstructs_best() -> None:
    x, sae = _activations() / 40, build(ReLUConfig(16, 80))
    sae.initialise_b_dec_(x)
    before, directions = sae.W_enc.detach().clone(), sae.W_dec.detach().clone()
    bounds = bounds_at(sae, x, 5.0)
    h = sae.centred(x) @ before.T
    codes = torch.where(h > bounds, h, 0)

    def error(factor: float) -> float:
        y = factor * codes @ directions + sae.b_dec
        return float((y - x).double().square().sum().detach())

    factor = scale_encoder_(sae, x, bounds)
    assert_within("one factor", sae.W_enc.data, before * factor, 1e-6 * before.abs())
    assert 0.1 < factor < 0.9  # rows overlap
    assert error(factor) < min(error(0.98 * factor), error(1.02 * factor), error(1.0))
    assert_bitwise("decoder", sae.W_dec.data, directions)


@pytest.mark.parametrize("config", [TopKConfig(16, 80, 5), BatchTopKConfig(16, 80, k=4.5)])
def test_the_k_largest_reconstruct_more_from_the_start(config: SAEConfig) -> None:
    x = _activations()

    def error(sae: SparseAutoencoder) -> float:
        return float((sae(x).x_hat - x).square().sum().detach())

    unfitted = build(config)
    unfitted.initialise_b_dec_(x)
    fitted = prepare(x, config, TrainConfig(batch_size=64, device="cpu"))
    assert error(fitted) < 0.5 * error(unfitted)


def test_where_nothing_is_reconstructed_nothing_is_scaled() -> None:
    x = _activations()
    transcoder = build(TopKConfig(16, 80, 5, d_out=4, subtract_b_dec=False))
    for sae, bounds in ((transcoder, torch.zeros(80)), (build(ReLUConfig(16, 80)), None)):
        before = sae.W_enc.detach().clone()
        above_all = torch.full((80,), 1e9) if bounds is None else bounds
        assert scale_encoder_(sae, x, above_all) == 1
        assert_bitwise("encoder", sae.W_enc.data, before)


@pytest.mark.parametrize("l0", [1e-4, 80.0])
def test_bounds_of_nothing_and_of_everything(l0: float) -> None:
    x, sae = _activations(), build(ReLUConfig(16, 80))
    h = sae.centred(x) @ sae.W_enc.T
    extreme = h.max(0) if l0 < 1 else h.min(0)
    within = gamma(17, torch.float32) * (x.abs() @ sae.W_enc.abs().T).amax(0).double()
    assert_within("bounds", bounds_at(sae, x, l0), extreme.values.double(), within)


def test_every_run_starts_alike_whatever_the_threads() -> None:
    x, config = _activations(), JumpReLUConfig(16, 80)
    starts = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        sae = prepare(x, config, TrainConfig(batch_size=64, device="cpu"))
        starts.append(torch.cat([sae.W_enc.flatten(), sae.log_threshold]))
    torch.set_num_threads(1)
    assert_bitwise("start", starts[0], starts[1])
