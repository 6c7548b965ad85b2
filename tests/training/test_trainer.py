"""The training loop, end to end on small data."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from sae_kernels.config.toml import read_tables
from sae_kernels.data import ShardDataset, ShardWriter, ShuffledBatches, estimate_scale
from sae_kernels.errors import DataError, NonFiniteError
from sae_kernels.nn import TopKConfig, TopKSAE, geometric_median
from sae_kernels.runs.metrics import read_metrics
from sae_kernels.testing import assert_bitwise
from sae_kernels.training import RunConfig, evaluate, prepare, train
from sae_kernels.training.start import make_step
from tests.settings import settings
from tests.step.harness import D, tokens
from tests.training.same_runs import assert_same

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.config import TrainConfig

F, K, N = 128, 6, 2000
SAE = TopKConfig(D, F, K)
GIVEN = {"steps": 25, "batch_size": 64, "lr": 2e-3, "compute": "float32", "dead_after_tokens": 500}
CONFIG = settings(SAE, **GIVEN)
KEYS = (
    "step",
    "tokens",
    "loss",
    "fvu",
    "l0",
    "aux_loss",
    "dead_fraction",
    "lr",
    "k",
    "skipped",
    "tokens_per_second",
)


def _config(**changes: Any) -> TrainConfig:
    return settings(SAE, **{**GIVEN, **changes})


@pytest.mark.parametrize("route", ["fused", "autograd"])
def test_training_learns(route: str) -> None:
    x = tokens(N)
    before = evaluate(prepare(x, SAE, CONFIG), tokens(500, seed=9)).fvu
    result = train(SAE, x, _config(steps=300, route=route))
    after = evaluate(result.sae, tokens(500, seed=9)).fvu
    assert after < 0.45 < before
    assert result.skipped == 0


def test_a_run_leaves_a_folder(tmp_path: Path) -> None:
    x, folder = tokens(N), tmp_path / "deep" / "run"
    result = train(SAE, x, CONFIG, folder=folder)
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [
        "metrics.jsonl",
        "result.json",
        "run.toml",
        "sae/README.md",
        "sae/config.json",
        "sae/sae.safetensors",
    ]

    config = RunConfig.read(folder / "run.toml")
    assert (config.sae, config.train) == (SAE, CONFIG)
    assert list(read_tables(folder / "run.toml")) == [
        "architecture",
        "sae",
        "objective",
        "optimizer",
        "train",
        "output",
        "parallel",
    ]
    left = json.loads((folder / "result.json").read_text())
    assert (left["steps"], left["tokens"], left["skipped"]) == (25, 25 * 64, 0)
    assert left["activation_scale"] == result.sae.config.activation_scale != 1
    assert left["last"] == result.metrics[-1]

    lines = read_metrics(folder / "metrics.jsonl")
    assert lines == result.metrics
    assert [line["step"] for line in lines] == [10, 20, 25]  # every log_every, and the last
    for line in lines:
        assert tuple(line) == KEYS
        assert line["tokens"] == line["step"] * 64
        assert line["lr"] == CONFIG.learning_rate(line["step"] - 1, F)
        assert (line["k"], line["l0"], line["skipped"]) == (K, K, 0)
        assert 0 < line["fvu"] <= line["loss"] == pytest.approx(line["fvu"] + line["aux_loss"])
        assert line["tokens_per_second"] > 0

    saved = TopKSAE.from_pretrained(folder / "sae")
    assert saved.config.activation_scale == 1.0
    assert_bitwise("W_dec", saved.W_dec.data, result.sae.W_dec.data)
    assert evaluate(saved, x).fvu == pytest.approx(evaluate(result.sae, x).fvu, rel=1e-5)
    assert result.dead.shape == (F,)
    assert result.metrics[-1]["dead_fraction"] == pytest.approx(float(result.dead.float().mean()))


def test_a_second_run_replaces_the_first_only_when_told_to(tmp_path: Path) -> None:
    train(SAE, tokens(N), CONFIG, folder=tmp_path)
    with pytest.raises(DataError, match=r"without a run, it holds run\.toml.*overwrite it"):
        train(SAE, tokens(N), _config(steps=10), folder=tmp_path)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] == 25
    train(SAE, tokens(N), _config(steps=10), folder=tmp_path, overwrite=True)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10]


def test_the_callback_sees_every_step() -> None:
    seen: list[tuple[int, Any]] = []
    result = train(SAE, tokens(N), CONFIG, on_step=lambda i, line: seen.append((i, line)))
    assert [i for i, _ in seen] == list(range(25))
    assert [line for _, line in seen if line is not None] == result.metrics
    assert seen[9][1] is result.metrics[0]


def test_an_interrupt_saves_what_there_is(tmp_path: Path) -> None:
    def interrupt(step: int, _: object) -> None:
        if step == 12:
            raise KeyboardInterrupt

    config = _config(seed=3)
    with pytest.raises(KeyboardInterrupt):
        train(SAE, tokens(N), config, folder=tmp_path, on_step=interrupt)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [10]
    saved = TopKSAE.from_pretrained(tmp_path / "sae")
    # Thirteen steps of the same run by hand.
    sae = prepare(tokens(N), SAE, config)
    step, batches = make_step(sae, config), ShuffledBatches(tokens(N), 64, seed=3)
    for i in range(13):
        step(next(batches), lr=config.learning_rate(i, F))
    assert_bitwise("W_enc", saved.W_enc.data, sae.W_enc.data)
    assert_bitwise("b_enc", saved.b_enc.data, sae.folded().b_enc.data)


def test_k_is_annealed() -> None:
    config = _config(k_start=20, k_anneal_steps=14, log_every=1)
    lines = train(SAE, tokens(N), config).metrics
    assert [line["k"] for line in lines] == [config.k_at(i, K) for i in range(25)]
    assert lines[0]["k"] == 20
    assert lines[0]["l0"] > 12
    assert [line["k"] for line in lines[14:]] == [K] * 11
    assert lines[-1]["l0"] == K


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_tensor_and_its_shards_give_the_same_run(tmp_path: Path, compute: str) -> None:
    x = tokens(N)
    with ShardWriter(tmp_path, D, rows_per_shard=300) as writer:
        writer.write(x)
    config = _config(compute=compute, steps=45)  # more than an epoch
    assert_same(train(SAE, x, config), train(SAE, ShardDataset(tmp_path), config))


def test_the_seed_names_the_run() -> None:
    x, first = tokens(N), train(SAE, tokens(N), CONFIG)
    torch.manual_seed(1)  # the global generator has no part in it
    assert_same(first, train(SAE, x, CONFIG))
    other = train(SAE, x, _config(seed=1))
    assert (other.sae.W_dec != first.sae.W_dec).any()


def test_threads_do_not_show() -> None:
    x, runs = tokens(N), []  # drawn by a product of torch's: once, on one thread
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(train(SAE, x, _config(compute="bfloat16", auxk_alpha=0)))
    assert_same(*runs)


def _spoiled(value: float) -> tuple[Tensor, int]:
    """Data with one bad row that the sample for scale and b_dec leaves out; the batch it is in."""
    x = tokens(2 * 16384, d_in=4, n_features=12)
    # Rows by number, in the order in which training reads them. The sample is the first 16384.
    numbers = torch.arange(len(x), dtype=torch.float32)[:, None]
    batches = ShuffledBatches(numbers, 1024)
    order = [next(batches) for _ in range(32)]
    x[int(order[20][3])] = value
    return x, 20


SMALL = TopKConfig(4, 16, 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("route", ["fused", "autograd"])
def test_a_bad_batch_stops_the_run(tmp_path: Path, route: str, value: float) -> None:
    x, at = _spoiled(value)
    config = _config(steps=32, batch_size=1024, route=route, log_every=5)
    with pytest.raises(NonFiniteError) as error:
        train(SMALL, x, config, folder=tmp_path)
    message = str(error.value)
    assert message.startswith(f"step {at + 1}: expected a finite loss and gradient norm, got NaN")
    assert "\n" not in message
    assert "on_nonfinite 'skip'" in message
    # What was written is whole, and what is saved is the state before that step.
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [5, 10, 15, 20]
    saved = TopKSAE.from_pretrained(tmp_path / "sae")
    step = make_step(prepare(x, SMALL, config), config)
    batches = ShuffledBatches(x, 1024)
    if route == "fused":
        for i in range(at):
            step(next(batches), lr=config.learning_rate(i, 16))
        assert_bitwise("W_enc", saved.W_enc.data, step.sae.W_enc.data)


@pytest.mark.parametrize("route", ["fused", "autograd"])
def test_a_bad_batch_is_skipped_and_counted(tmp_path: Path, route: str) -> None:
    x, at = _spoiled(float("nan"))
    config = _config(steps=32, batch_size=1024, route=route, log_every=1, on_nonfinite="skip")
    result = train(SMALL, x, config, folder=tmp_path)
    assert result.skipped == 1
    assert [line["skipped"] for line in result.metrics] == [0] * at + [1] * (32 - at)
    line = read_metrics(tmp_path / "metrics.jsonl")[at]
    assert line["loss"] is None  # NaN is no JSON
    assert all(p.isfinite().all() for p in result.sae.parameters())


@pytest.mark.parametrize("init", ["geometric_median", "mean", "zeros"])
def test_skipping_starts_from_the_finite_rows(init: str) -> None:
    """The sample that scale and b_dec come from may hold the bad rows too."""
    x = tokens(300)
    bad = x.clone()
    bad[::50] = torch.nan
    config = _config(on_nonfinite="skip", init_b_dec=init, batch_size=10)
    sae = prepare(bad, SAE, config)
    good = bad[bad.isfinite().all(1)]
    assert sae.config.activation_scale == pytest.approx(estimate_scale(good), rel=1e-6)
    assert all(p.isfinite().all() for p in sae.parameters())
    result = train(SAE, bad, config)
    assert 0 < result.skipped < 25


def test_bad_rows_in_the_sample_stop_the_run_before_it_starts(tmp_path: Path) -> None:
    x = tokens(300)
    x[7, 2] = torch.inf
    with pytest.raises(NonFiniteError, match="activations: expected finite numbers"):
        train(SAE, x, CONFIG, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(NonFiniteError, match="activations: expected finite numbers"):
        prepare(torch.full((64, D), torch.nan), SAE, _config(on_nonfinite="skip"))


def test_a_diverging_run_stops_with_finite_weights(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="Lower the learning rate"):
        train(SAE, tokens(N), _config(lr=1e30, warmup_steps=0), folder=tmp_path)
    TopKSAE.from_pretrained(tmp_path / "sae")  # which refuses weights that are not finite


def test_prepare_estimates_scale_and_b_dec() -> None:
    x = 7 * tokens(1500)
    scale = estimate_scale(x)
    for init, b_dec in (
        ("geometric_median", geometric_median(x)),
        ("mean", x.mean(0)),
        ("zeros", torch.zeros(D)),
    ):
        sae = prepare(x, SAE, _config(init_b_dec=init))
        # All rows are in the sample, in another order: fp32 sums of 1500 terms differ by 1e-4.
        assert sae.config.activation_scale == pytest.approx(scale, rel=1e-6)
        torch.testing.assert_close(sae.b_dec.data, b_dec * scale, rtol=1e-3, atol=1e-4)
        norms = (x * sae.config.activation_scale).norm(dim=1)
        assert float(norms.mean()) == pytest.approx(D**0.5, rel=1e-5)
    unscaled = prepare(x, SAE, _config(normalize_activations="none", init_b_dec="mean"))
    assert unscaled.config.activation_scale == 1.0
    torch.testing.assert_close(unscaled.b_dec.data, x.mean(0), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("x", "sae", "changes", "message"),
    [
        (tokens(100, d_in=5), SAE, {}, "d_in: expected 5, the width of the activations, got 32"),
        (tokens(63), SAE, {}, "batch_size: expected at most the 63 rows of activations, got 64"),
        (torch.zeros(0, D), SAE, {}, "batch_size: expected at most the 0 rows"),
        (tokens(100), SAE, {"k_start": 200}, "k_start: expected at most 128, .* got 200"),
        (torch.zeros(100, D), SAE, {}, "expected activations with a positive finite norm"),
        (torch.zeros(100, D).long(), SAE, {}, "expected floating point activations"),
    ],
    ids=["width", "few-rows", "no-rows", "k_start", "all-zero", "integers"],
)
def test_what_cannot_be_trained_on_is_named(
    x: Tensor, sae: TopKConfig, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        train(sae, x, _config(**changes), folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
