"""Several SAEs on one stream: each is the one it would have been alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config import OutputConfig
from sae_kernels.data import ShardDataset, ShardWriter, TensorRows
from sae_kernels.errors import DataError, NonFiniteError
from sae_kernels.nn import BatchTopKConfig, JumpReLUConfig, ReLUConfig, TopKConfig
from sae_kernels.runs.folder import is_finished
from sae_kernels.runs.metrics import read_metrics
from sae_kernels.training import train, train_many
from tests.settings import settings
from tests.step.harness import D, tokens
from tests.training.same_runs import Stop, assert_same, untimed

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.config import TrainConfig
    from sae_kernels.data.rows import Rows
    from sae_kernels.nn import SAEConfig
    from sae_kernels.training import TrainingResult

N, F, B, STEPS = 700, 64, 48, 24
Settings = tuple["SAEConfig", "TrainConfig"]
GIVEN: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": B,
    "lr": 2e-3,
    "compute": "float32",
    "log_every": 3,
    "dead_after_tokens": 300,
    "data_seed": 5,
}


def run_of(sae: SAEConfig, **changes: Any) -> Settings:
    return sae, settings(sae, **GIVEN | changes)


def alone_on(x: torch.Tensor, run: Settings, **options: Any) -> TrainingResult:
    sae, config = run
    return train(sae, x, config, **options)


JUMPS = {"sparsity": "target_l0", "target_l0": 5.0, "sparsity_coefficient": 0.3, "auxk_alpha": 0.0}
L1 = {"sparsity": "l1", "sparsity_coefficient": 1.0, "loss": "mse", "auxk_alpha": 0.0}
RUNS: dict[str, Settings] = {
    "topk": run_of(TopKConfig(D, F, 5)),
    "wide": run_of(TopKConfig(D, 2 * F, 3), seed=1, lr=5e-3),
    "autograd": run_of(TopKConfig(D, F, 5), route="autograd", steps=STEPS - 7),
    "batchtopk": run_of(BatchTopKConfig(D, F, k=4), seed=2, steps=STEPS + 9),
    "jumprelu": run_of(JumpReLUConfig(D, F, threshold_init=1.0, bandwidth=0.1), **JUMPS),
    "relu": run_of(ReLUConfig(D, F), **L1, clip_norm=1.0),
    "bfloat16": run_of(TopKConfig(D, F, 5), compute="bfloat16", adam="lazy"),
}
FEW = {name: RUNS[name] for name in ("topk", "autograd", "batchtopk")}


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return tokens(N)


@pytest.fixture(scope="module")
def alone(x: torch.Tensor) -> dict[str, TrainingResult]:
    """Each run by itself, on one thread as in the tests."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    results = {name: alone_on(x, planned) for name, planned in RUNS.items()}
    torch.set_num_threads(before)
    return results


def test_each_is_what_it_would_be_alone(
    x: torch.Tensor, alone: dict[str, TrainingResult], tmp_path: Path
) -> None:
    together = train_many(RUNS, x, folder=tmp_path)
    assert list(together) == list(RUNS)
    for name, result in together.items():
        assert_same(result, alone[name])
        assert result.error is None
        assert untimed(read_metrics(tmp_path / name / "metrics.jsonl")) == untimed(result.metrics)
        alone_on(x, RUNS[name], folder=tmp_path / "alone" / name)
        for file in ("config.json", "sae.safetensors"):
            mine, other = (tmp_path / part / "sae" / file for part in (name, f"alone/{name}"))
            assert mine.read_bytes() == other.read_bytes()


def test_transcoders_share_inputs_and_targets(x: torch.Tensor) -> None:
    target = tokens(N, seed=3)[:, :7]
    free = {"d_out": 7, "subtract_b_dec": False, "unit_norm_decoder": False}
    runs = {f"k{k}": run_of(TopKConfig(D, F, k, **free)) for k in (3, 5)}
    for name, result in train_many(runs, x, target=target).items():
        assert_same(result, alone_on(x, runs[name], target=target))


class Counted:
    """A source of rows, as one on disk is, that knows how many were asked for."""

    def __init__(self, x: torch.Tensor) -> None:
        self._rows, self.read = TensorRows(x), 0
        self.n_tokens, self.d_in = x.shape

    def rows(self, start: int, stop: int) -> Rows:
        self.read += stop - start
        return self._rows.rows(start, stop)


def read_by(runs: dict[str, Settings], x: torch.Tensor) -> int:
    source = Counted(x)
    train_many(runs, source)
    return source.read


def test_the_data_are_read_once(x: torch.Tensor) -> None:
    one = {name: run_of(sae) for name, (sae, _) in FEW.items()}
    assert read_by(one, x) == read_by({"topk": one["topk"]}, x) > N


def test_a_run_that_diverges_ends_alone(
    x: torch.Tensor, alone: dict[str, TrainingResult], tmp_path: Path
) -> None:
    wild = run_of(TopKConfig(D, F, 5), lr=1e30, warmup_steps=0, log_every=1)
    results = train_many({"topk": RUNS["topk"], "wild": wild, "wide": RUNS["wide"]}, x)
    for name in ("topk", "wide"):
        assert results[name].error is None
        assert_same(results[name], alone[name])
    ended = results["wild"]
    assert isinstance(ended.error, NonFiniteError)
    assert "expected a finite loss" in str(ended.error)
    assert 0 < len(ended.metrics) < STEPS
    assert ended.sae.W_dec.isfinite().all()
    with pytest.raises(NonFiniteError):
        alone_on(x, wild, folder=tmp_path / "alone")
    lines = read_metrics(tmp_path / "alone" / "metrics.jsonl")
    assert untimed(lines) == untimed(ended.metrics)


def test_a_run_that_diverged_is_saved_and_not_finished(x: torch.Tensor, tmp_path: Path) -> None:
    wild = run_of(TopKConfig(D, F, 5), lr=1e30, warmup_steps=0)
    train_many({"topk": RUNS["topk"], "wild": wild}, x, folder=tmp_path)
    assert (tmp_path / "topk" / "result.json").exists()
    assert not (tmp_path / "wild" / "result.json").exists()
    assert (tmp_path / "wild" / "sae" / "sae.safetensors").exists()
    again = train_many({"topk": RUNS["topk"], "wild": wild}, x, folder=tmp_path, resume=True)
    assert list(again) == ["wild"]
    assert again["wild"].error is not None


@pytest.mark.parametrize("every", [0, 5])
def test_stopped_and_resumed_they_are_the_same_runs(
    x: torch.Tensor, alone: dict[str, TrainingResult], tmp_path: Path, every: int
) -> None:
    saving = OutputConfig(checkpoint_every=every)

    def stop_at(step: int) -> dict[str, Any]:
        def on_step(i: int, line: object) -> None:
            if i + 1 == step:
                raise Stop

        return {"topk": on_step}

    for step in (4, 13, 22):
        with pytest.raises(Stop):
            train_many(FEW, x, folder=tmp_path, output=saving, resume=True, on_step=stop_at(step))
    results = train_many(FEW, x, folder=tmp_path, output=saving, resume=True)
    assert "topk" in results
    for name in FEW:
        if name in results:
            assert_same(results[name], alone[name])
        else:  # it had made its steps before the last stop
            assert is_finished(tmp_path / name)
        alone[name].sae.save_pretrained(tmp_path / "alone")
        saved = [tmp_path / folder / "sae.safetensors" for folder in (f"{name}/sae", "alone")]
        assert saved[0].read_bytes() == saved[1].read_bytes()


def test_runs_that_stand_at_different_steps_meet(
    x: torch.Tensor, alone: dict[str, TrainingResult], tmp_path: Path
) -> None:
    """One is new, one has a few steps, one more."""
    steps = {"topk": 6, "batchtopk": 14}
    for name, step in steps.items():

        def on_step(i: int, line: object, step: int = step) -> None:
            if i + 1 == step:
                raise Stop

        with pytest.raises(Stop):
            alone_on(
                x,
                FEW[name],
                folder=tmp_path / name,
                output=OutputConfig(checkpoint_every=2),
                on_step=on_step,
            )
    begun: dict[str, list[int]] = {name: [] for name in FEW}
    watch = {
        name: lambda i, line, name=name: begun[name].append(i)  # type: ignore[misc]
        for name in FEW
    }
    results = train_many(FEW, x, folder=tmp_path, resume=True, on_step=watch)
    assert begun["autograd"][0] == 0
    assert 0 < begun["topk"][0] < begun["batchtopk"][0] <= 14
    for name, result in results.items():
        assert begun[name] == list(range(begun[name][0], FEW[name][1].steps))
        assert_same(result, alone[name])


def test_what_is_finished_is_left_out(x: torch.Tensor, tmp_path: Path) -> None:
    train_many({"topk": FEW["topk"]}, x, folder=tmp_path)
    before = (tmp_path / "topk" / "sae" / "sae.safetensors").read_bytes()
    results = train_many(FEW, x, folder=tmp_path, resume=True)
    assert list(results) == ["autograd", "batchtopk"]
    assert (tmp_path / "topk" / "sae" / "sae.safetensors").read_bytes() == before
    assert train_many(FEW, x, folder=tmp_path, resume=True) == {}
    with pytest.raises(DataError, match="expected a folder without a run"):
        train_many(FEW, x, folder=tmp_path)


def test_one_that_has_made_its_steps_is_finished_while_others_go_on(
    x: torch.Tensor, tmp_path: Path
) -> None:
    """Else what stops the others has it make its last steps, and the stream go back, again."""

    def on_step(i: int, line: object) -> None:
        if i + 1 == STEPS + 3:  # the others have made theirs
            raise Stop

    with pytest.raises(Stop):
        train_many(FEW, x, folder=tmp_path, on_step={"batchtopk": on_step})
    finished = {name for name in FEW if (tmp_path / name / "result.json").exists()}
    assert finished == {"topk", "autograd"}
    assert list(train_many(FEW, x, folder=tmp_path, resume=True)) == ["batchtopk"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": B + 1}, r"batch_size: expected the same in all runs.*'b': 49"),
        ({"data_seed": 6}, "data_seed: expected the same in all runs"),
        ({"data_seed": None, "seed": 6}, "data_seed: expected the same in all runs"),
    ],
)
def test_runs_that_cannot_share_a_stream_are_refused(
    x: torch.Tensor, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    runs = {"a": FEW["topk"], "b": run_of(TopKConfig(D, F, 5), **changes)}
    with pytest.raises(ValueError, match=message):
        train_many(runs, x, folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../a", "/a", "a\\b", "C:a", "a\0"])
def test_names_that_leave_their_folder_are_refused(
    x: torch.Tensor, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match="expected names that a folder can have"):
        train_many({name: FEW["topk"]}, x, folder=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_no_runs_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected at least one, got none"):
        train_many({}, x)


def test_settings_that_do_not_fit_leave_no_folder(x: torch.Tensor, tmp_path: Path) -> None:
    runs = {"a": FEW["topk"], "b": run_of(TopKConfig(D + 1, F, 5))}
    with pytest.raises(ValueError, match="d_in: expected 32"):
        train_many(runs, x, folder=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*"))


def test_shards_do_as_a_tensor_does(x: torch.Tensor, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "data", D, rows_per_shard=250) as writer:
        writer.write(x)
    for name, result in train_many(FEW, ShardDataset(tmp_path / "data")).items():
        assert_same(result, alone_on(x, FEW[name]))
