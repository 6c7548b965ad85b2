"""What ``train`` takes: modules, fresh or loaded, batches of any iterable, a step of one's own."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from sae_kernels.config import OutputConfig
from sae_kernels.nn import (
    BatchTopKSAE,
    GatedSAE,
    JumpReLUSAE,
    ReLUSAE,
    SparseAutoencoder,
    SwitchSAE,
    TopKConfig,
    TopKSAE,
)
from sae_kernels.step import FusedStep, StepResult
from sae_kernels.testing import assert_bitwise
from sae_kernels.training import RunConfig, evaluate, prepare, train
from sae_kernels.training.start import make_step
from tests.settings import settings
from tests.training.same_runs import Stop, assert_same, stop_at

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.config import TrainConfig
    from sae_kernels.step import TrainingStep
    from sae_kernels.step.state import State

D, D_OUT, F, B, STEPS = 12, 9, 64, 50, 14
GIVEN: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": B,
    "lr": 2e-3,
    "compute": "float32",
    "log_every": 1,
}
CONFIG = settings(TopKSAE, **GIVEN)


def tokens(n: int, width: int = D) -> Tensor:
    """Away from 0, and of another scale than the one of training."""
    return 3 * torch.randn(n, width, generator=torch.Generator().manual_seed(0)) + 1


def batches(n: int) -> list[Tensor]:
    return list(tokens(n * B).split(B))


# -- batches of any iterable -----------------------------------------------------------------


def by_hand(given: list[Tensor]) -> SparseAutoencoder:
    sae = prepare(given, TopKConfig(D, F, 4), CONFIG)
    step = make_step(sae, CONFIG)
    for i, x in zip(range(STEPS), itertools.cycle(given), strict=False):
        step(x, lr=CONFIG.learning_rate(i, F))
    return sae


def test_batches_are_taken_in_their_order_and_again() -> None:
    given = batches(5)
    result = train(TopKConfig(D, F, 4), given, CONFIG)
    for name, tensor in by_hand(given).state_dict().items():
        assert_bitwise(name, result.sae.state_dict()[name].reshape(-1), tensor.reshape(-1))
    assert result.metrics[-1]["tokens"] == STEPS * B


def test_a_generator_is_read_once_and_loses_no_batch() -> None:
    given = batches(STEPS)
    once = (x for x in given)
    assert_same(train(TopKConfig(D, F, 4), once, CONFIG), train(TopKConfig(D, F, 4), given, CONFIG))
    assert next(once, None) is None
    with pytest.raises(ValueError, match="expected one for each of the 14 steps, got 5; lower"):
        train(TopKConfig(D, F, 4), iter(batches(5)), CONFIG)


def test_a_data_loader_s_batches_may_lie_in_tuples() -> None:
    rows = torch.utils.data.TensorDataset(tokens(5 * B))
    loader = torch.utils.data.DataLoader(rows, batch_size=B)
    assert_same(
        train(TopKConfig(D, F, 4), loader, CONFIG), train(TopKConfig(D, F, 4), batches(5), CONFIG)
    )


def test_the_size_of_a_batch_is_its_own() -> None:
    given = [*batches(3), tokens(B // 2)]
    result = train(TopKSAE(D, F, k=4), given, steps=4, compute="float32", log_every=1)
    assert [line["tokens"] for line in result.metrics] == [B, 2 * B, 3 * B, 3 * B + B // 2]


@pytest.mark.parametrize("kind", ["list", "generator"])
def test_a_run_on_batches_goes_on_where_it_was(kind: str, tmp_path: Path) -> None:
    def source() -> Any:
        return batches(STEPS) if kind == "list" else iter(batches(STEPS))

    sae, output = TopKConfig(D, F, 4), OutputConfig(checkpoint_every=4)
    with pytest.raises(Stop):
        train(sae, source(), CONFIG, folder=tmp_path, output=output, on_step=stop_at(10))
    resumed = train(sae, source(), CONFIG, folder=tmp_path, output=output, resume=True)
    assert_same(resumed, train(sae, source(), CONFIG))
    with pytest.raises(Stop):
        train(
            sae,
            source(),
            CONFIG,
            folder=tmp_path,
            output=output,
            overwrite=True,
            on_step=stop_at(10),
        )
    with pytest.raises(
        ValueError, match=r"batches: expected those .* 8 up to its checkpoint, got 3"
    ):
        train(sae, iter(batches(3)), CONFIG, folder=tmp_path, output=output, resume=True)


# -- modules ---------------------------------------------------------------------------------

MODULES: dict[str, Any] = {
    "topk": lambda: TopKSAE(D, F, k=4),
    "topk-raw-input": lambda: TopKSAE(D, F, k=4, subtract_b_dec=False),
    "batchtopk": lambda: BatchTopKSAE(D, F, k=4),
    "jumprelu": lambda: JumpReLUSAE(D, F, threshold_init=0.5, bandwidth=0.2),
    "jumprelu-raw": lambda: JumpReLUSAE(D, F, threshold_init=0.5, log_threshold=False),
    "relu": lambda: ReLUSAE(D, F),
    "gated": lambda: GatedSAE(D, F),
    "switch": lambda: SwitchSAE(D, F, k=4, n_experts=4),
    "transcoder": lambda: TopKSAE(
        D, F, k=4, d_out=D_OUT, subtract_b_dec=False, unit_norm_decoder=False, skip=True
    ),
}


def source(sae: SparseAutoencoder) -> dict[str, Tensor]:
    x = tokens(600)
    return {"source": x, "target": x[:, :D_OUT].cos()} if sae.config.transcodes else {"source": x}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_trained_in_place_as_its_configuration_is(name: str) -> None:
    sae = MODULES[name]()
    config = settings(sae, **GIVEN)
    result = train(sae, **source(sae), config=config)
    assert result.sae is sae
    assert_same(result, train(MODULES[name]().config, **source(sae), config=config))


@pytest.mark.parametrize("name", MODULES)
def test_a_loaded_one_goes_on_from_its_function(name: str, tmp_path: Path) -> None:
    sae = MODULES[name]()
    config = settings(sae, **GIVEN)
    train(sae, **source(sae), config=config, folder=tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    x = tokens(40)
    before = loaded(x)
    assert loaded.config.activation_scale == 1
    rows = torch.cat(list(source(sae).values()), dim=1)
    assert prepare(rows, loaded, config) is loaded
    # Another scale in front of the same function: b_dec too is what it was, in that scale.
    assert loaded.config.activation_scale == pytest.approx(sae.config.activation_scale)
    after = loaded(x)
    torch.testing.assert_close(after.x_hat, before.x_hat, rtol=1e-4, atol=1e-4)
    dense = after.codes.to_dense() / loaded.config.activation_scale
    torch.testing.assert_close(dense, before.codes.to_dense(), rtol=1e-4, atol=1e-4)
    for key, tensor in sae.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], tensor, rtol=1e-4, atol=1e-5)

    fvu = evaluate(loaded, **source(sae)).fvu
    result = train(loaded, **source(sae), config=config)
    assert result.sae is loaded
    if name not in ("batchtopk", "switch"):  # which choose otherwise in evaluation, or gate
        assert result.metrics[0]["fvu"] == pytest.approx(fvu, rel=0.25)
    assert evaluate(loaded, **source(sae)).fvu < fvu


@pytest.mark.parametrize("same", [True, False], ids=["same", "another"])
def test_a_run_on_a_module_goes_on_in_that_module(same: bool, tmp_path: Path) -> None:
    x, output = tokens(600), OutputConfig(checkpoint_every=4)
    straight = train(TopKSAE(D, F, k=4), x, CONFIG)
    sae = TopKSAE(D, F, k=4)
    with pytest.raises(Stop):
        train(sae, x, CONFIG, folder=tmp_path, output=output, on_step=stop_at(10))
    sae = sae if same else TopKSAE(D, F, k=4, seed=9)  # its weights are the checkpoint's
    resumed = train(sae, x, CONFIG, folder=tmp_path, output=output, resume=True)
    assert resumed.sae is sae
    assert_same(resumed, straight)


def test_the_file_of_a_module_s_run_is_that_of_its_configuration(tmp_path: Path) -> None:
    """Which holds no estimate: whoever repeats the run makes it again."""
    for name, sae in (("module", TopKSAE(D, F, k=4)), ("config", TopKConfig(D, F, 4))):
        train(sae, tokens(600), CONFIG, folder=tmp_path / name)
    files = [(tmp_path / name / "run.toml").read_bytes() for name in ("module", "config")]
    assert files[0] == files[1]
    assert RunConfig.read(tmp_path / "module" / "run.toml").sae == TopKConfig(D, F, 4)


# -- a step of one's own ---------------------------------------------------------------------


class Halved:
    """A step that trains at half of the learning rate, and has what a trainer asks for."""

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig) -> None:
        self.sae, self.inner = sae, FusedStep(sae, config.objective, config.optimizer)
        self.dead = self.inner.dead
        self.calls = 0

    def __call__(self, x: Tensor, *, lr: float, **options: Any) -> StepResult:
        self.calls += 1
        return self.inner(x, lr=lr / 2, **options)

    def state(self) -> State:
        return self.inner.state()

    def load_state(self, state: State) -> None:
        self.inner.load_state(state)

    def weights(self) -> dict[str, Tensor]:
        return self.inner.weights()

    def restore_(self) -> None:
        self.inner.restore_()


def test_a_step_of_one_s_own_is_what_trains(tmp_path: Path) -> None:
    made: list[Halved] = []

    def step(sae: SparseAutoencoder, config: TrainConfig) -> TrainingStep:
        assert config is not None
        made.append(Halved(sae, config))
        return made[-1]

    x, sae = tokens(600), TopKConfig(D, F, 4)
    halved = settings(TopKSAE, **{**GIVEN, "lr": 1e-3})
    result = train(sae, x, CONFIG, step=step)
    assert [each.calls for each in made] == [STEPS]
    wanted = train(sae, x, halved).sae.state_dict()
    for name, tensor in result.sae.state_dict().items():
        assert_bitwise(name, tensor.reshape(-1), wanted[name].reshape(-1))
    assert result.metrics[0]["lr"] == CONFIG.learning_rate(0, F)
    # It is resumed as any other.
    output = OutputConfig(checkpoint_every=4)
    with pytest.raises(Stop):
        train(sae, x, CONFIG, step=step, folder=tmp_path, output=output, on_step=stop_at(10))
    again = train(sae, x, CONFIG, step=step, folder=tmp_path, output=output, resume=True)
    assert_same(again, result)


# -- what does not fit -----------------------------------------------------------------------


def test_settings_are_given_once() -> None:
    with pytest.raises(ValueError, match=r"expected config or settings by name, got both \(lr\)"):
        train(TopKSAE(D, F, k=4), tokens(200), CONFIG, lr=1e-3)
    with pytest.raises(ValueError, match="unknown setting 'stesp'; did you mean 'steps'"):
        train(TopKSAE(D, F, k=4), tokens(200), stesp=3)
    with pytest.raises(ValueError, match="unknown setting 'balance_coefficient'"):
        train(TopKSAE(D, F, k=4), tokens(200), balance_coefficient=0.1)


def test_flat_settings_are_those_of_the_config() -> None:
    assert_same(
        train(TopKSAE(D, F, k=4), tokens(600), **GIVEN, k_aux=3, clip_norm=1.0),
        train(TopKSAE(D, F, k=4), tokens(600), settings(TopKSAE, **GIVEN, k_aux=3, clip_norm=1.0)),
    )


def test_an_objective_of_another_architecture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a TopKObjective for a TopKSAE, got a ReLUObj"):
        train(TopKSAE(D, F, k=4), tokens(200), settings(ReLUSAE, **GIVEN), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sae", "data", "message"),
    [
        (3, tokens(200), "sae: expected a module or its configuration, got int"),
        (tokens(200), TopKConfig(D, F, 4), "activations: expected a tensor|sae: expected a module"),
        (TopKConfig(D, F, 4), 3, "activations: expected a tensor"),
    ],
    ids=["sae", "swapped", "source"],
)
def test_what_is_no_sae_or_no_source_is_named(sae: Any, data: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        train(sae, data, CONFIG)
