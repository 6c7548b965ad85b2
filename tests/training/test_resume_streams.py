"""Runs that learn from a live model go on, too, as if they had not been stopped."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config import OutputConfig, TrainConfig
from sae_kernels.errors import DataError
from sae_kernels.harvest import LiveBatches, TokenBatch, token_batches
from sae_kernels.nn import BatchTopKConfig, JumpReLUConfig, ReLUConfig, TopKConfig
from sae_kernels.runs.metrics import read_metrics
from sae_kernels.training import train, train_many
from sae_kernels.training.end_to_end import EndToEnd, prepare_end_to_end, train_end_to_end
from tests.harvest.causal import CONTEXT, D, documents, gpt2, tokenizer
from tests.settings import settings
from tests.training.same_runs import Stop, assert_same, stop_at, untimed

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sae_kernels.nn import SAEConfig
    from sae_kernels.training import TrainingResult

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

F, B, STEPS = 48, 25, 16
TEXT = documents(40)
SAVING = OutputConfig(checkpoint_every=5)
FREE = {"subtract_b_dec": False, "unit_norm_decoder": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return gpt2()


def live(model: Any, layer: Any = "h.1", text: list[str] = TEXT, **options: Any) -> LiveBatches:
    """A stream whose text has fewer batches than the run has steps."""
    given = {"window_rows": 60, "model_batch_size": 2, "context_length": CONTEXT, **options}
    return LiveBatches(model, tokenizer(), text, layer, given.pop("batch_size", B), **given)


def config(sae: Any, **changes: Any) -> TrainConfig:
    given = {"steps": STEPS, "batch_size": B, "lr": 2e-3, "compute": "float32", "log_every": 1}
    return settings(sae, **given | {"dead_after_tokens": 200} | changes)


def stopped_and_resumed(folder: Path, begin: Callable[..., TrainingResult]) -> TrainingResult:
    """Stopped before the first checkpoint, between two, and again."""
    for step in (3, 8, 13):
        with pytest.raises(Stop):
            begin(folder=folder, output=SAVING, resume=True, on_step=stop_at(step))
    return begin(folder=folder, output=SAVING, resume=True)


SAES: dict[str, tuple[Any, SAEConfig, dict[str, Any]]] = {
    "fused": ("h.1", TopKConfig(D, F, 4), {}),
    "autograd": ("h.1", TopKConfig(D, F, 4), {"route": "autograd"}),
    "crosscoder": (
        ["h.0", "h.2"],
        BatchTopKConfig(D, F, k=4, n_layers=2, unit_norm_decoder=False, decoder_norm="sum"),
        {},
    ),
    "transcoder": (["h.0.ln_2", "h.0.mlp"], TopKConfig(D, F, 4, d_out=D, **FREE), {}),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", SAES)
def test_on_a_stream(name: str, model: Any, tmp_path: Path) -> None:
    layer, sae, changes = SAES[name]

    def begin(**options: Any) -> TrainingResult:
        return train(sae, live(model, layer), config(sae, **changes), **options)

    straight = begin(folder=tmp_path / "straight")
    resumed = stopped_and_resumed(tmp_path / "stopped", begin)
    assert_same(resumed, straight)
    assert straight.metrics[-1]["tokens"] == STEPS * B
    files = [tmp_path / run / "sae" / "sae.safetensors" for run in ("straight", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    lines = read_metrics(tmp_path / "stopped" / "metrics.jsonl")
    assert untimed(lines) == untimed(straight.metrics)


def test_the_rows_are_those_of_the_stream(model: Any) -> None:
    """What a stream gives from memory is the same training as on its batches stored."""
    batches = live(model)
    rows = torch.cat([next(batches) for _ in range(3)])

    class Stored:
        d_in, batch_size = D, B
        position = 0

        def sample(self, n: int) -> torch.Tensor:
            return live(model).sample(n)

        def __next__(self) -> torch.Tensor:
            self.position += 1
            return rows[(self.position - 1) * B :][:B]

        def state_dict(self) -> dict[str, Any]:
            return {"position": self.position}

        def load_state_dict(self, state: Any) -> None:
            self.position = state["position"]

    sae, three = TopKConfig(D, F, 4), config(TopKConfig, steps=3)
    assert_same(train(sae, live(model), three), train(sae, Stored(), three))


def test_several_on_one_stream(model: Any, tmp_path: Path) -> None:
    runs: dict[str, tuple[SAEConfig, TrainConfig]] = {
        "topk": (TopKConfig(D, F, 4), config(TopKConfig)),
        "short": (ReLUConfig(D, F), config(ReLUConfig, steps=9, seed=2, data_seed=0)),
    }
    for step in (7, 14):
        with pytest.raises(Stop):
            train_many(
                runs,
                live(model),
                folder=tmp_path,
                output=SAVING,
                resume=True,
                on_step={"topk": stop_at(step)},
            )
    results = train_many(runs, live(model), folder=tmp_path, output=SAVING, resume=True)
    for name, (sae, settled) in runs.items():
        straight = train(sae, live(model), settled, folder=tmp_path / "alone" / name)
        file = tmp_path / name / "sae" / "sae.safetensors"
        assert (tmp_path / "alone" / file.relative_to(tmp_path)).read_bytes() == file.read_bytes()
        assert (name in results) == (name == "topk")  # the other was done before the last stop
        if name in results:
            assert_same(results[name], straight)


def test_another_stream_is_refused(model: Any, tmp_path: Path) -> None:
    sae = TopKConfig(D, F, 4)
    with pytest.raises(Stop):
        train(sae, live(model), config(sae), folder=tmp_path, output=SAVING, on_step=stop_at(7))
    for options, message in (
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"layer": "h.0"}, "layer was"),
        ({"text": TEXT[::-1]}, "documents: expected the text that the saved stream read"),
    ):
        with pytest.raises(ValueError, match=message):
            train(sae, live(model, **options), config(sae), folder=tmp_path, resume=True)
    assert (
        train(sae, live(model), config(sae), folder=tmp_path, resume=True).metrics[-1]["step"]
        == STEPS
    )


@pytest.mark.parametrize(
    ("batch_size", "sae", "changes", "message"),
    [
        (B + 1, TopKConfig(D, F, 4), {}, "batch_size: expected 26, as the stream's batches, got"),
        (B, ReLUConfig(D, F), {"fix_shrinkage": True}, "fix_shrinkage: expected false on a stream"),
        (B, TopKConfig(D + 1, F, 4), {}, "d_in: expected 16, the width of the activations, got 17"),
        (B, TopKConfig(D, F, 4, n_layers=2), {}, "n_layers: expected activations of 2 layers"),
    ],
)
def test_what_does_not_fit_a_stream_leaves_no_folder(
    batch_size: int,
    sae: SAEConfig,
    changes: dict[str, Any],
    message: str,
    model: Any,
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match=message):
        train(
            sae, live(model, batch_size=batch_size), config(sae, **changes), folder=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_a_stream_holds_its_targets_itself(model: Any) -> None:
    sae = TopKConfig(D, F, 4, d_out=D, **FREE)
    with pytest.raises(ValueError, match="target: expected none with a stream"):
        train(sae, live(model), config(sae), target=torch.zeros(600, D))


E2E: dict[str, tuple[SAEConfig, dict[str, Any]]] = {
    "batchtopk": (BatchTopKConfig(D, F, k=4), {"clip_norm": 1.0}),
    "jumprelu": (
        JumpReLUConfig(D, F, threshold_init=0.3, bandwidth=0.2),
        {"sparsity": "target_l0", "target_l0": 5.0, "sparsity_coefficient": 0.3},
    ),
    "relu": (
        ReLUConfig(D, F),
        {"sparsity": "l1", "sparsity_coefficient": 0.01, "target_l0": 5.0},
    ),
}


class Through:
    """Training through a model, always begun from the same start."""

    def __init__(self, model: Any, sae_config: SAEConfig, config: TrainConfig) -> None:
        self.model, self.sae_config, self.config = model, sae_config, config

    def batches(self) -> list[TokenBatch]:
        options = {"batch_size": 8, "context_length": CONTEXT}
        return [
            batch.keeping_first()
            for batch in token_batches(self.model, tokenizer(), TEXT, **options)
        ]

    def __call__(self, **options: Any) -> TrainingResult:
        weights = EndToEnd(0.7, 1.3, 0.4, downstream_layers=("h.2",))
        start = self.batches()
        batches = options.pop("batches", start)
        sae = prepare_end_to_end(self.model, start, "h.1", self.sae_config, self.config)
        return train_end_to_end(self.model, batches, "h.1", sae, self.config, weights, **options)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", E2E)
def test_end_to_end(name: str, model: Any, tmp_path: Path) -> None:
    sae_config, changes = E2E[name]
    begin = Through(model, sae_config, config(sae_config, **changes))
    straight = begin(folder=tmp_path / "straight")
    resumed = stopped_and_resumed(tmp_path / "stopped", begin)
    assert_same(resumed, straight)
    assert resumed.skipped == straight.skipped == 0
    assert untimed(read_metrics(tmp_path / "stopped" / "metrics.jsonl")) == untimed(
        straight.metrics
    )
    files = [tmp_path / run / "sae" / "sae.safetensors" for run in ("straight", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(DataError, match="it has made all its steps"):
        begin(folder=tmp_path / "stopped", resume=True)


def test_end_to_end_with_other_settings_is_refused(model: Any, tmp_path: Path) -> None:
    begin = Through(model, TopKConfig(D, F, 4), config(TopKConfig, steps=4))
    with pytest.raises(Stop):
        begin(folder=tmp_path, output=OutputConfig(checkpoint_every=2), on_step=stop_at(3))
    other = Through(model, TopKConfig(D, F, 4), dataclasses.replace(begin.config, lr=0.5))
    with pytest.raises(DataError, match=r"train\.lr was 0\.002, is 0\.5"):
        other(folder=tmp_path, resume=True)
    with pytest.raises(DataError, match=r"end_to_end\.text was None, is 'b'"):
        begin(folder=tmp_path, resume=True, metadata={"text": "b"})
    with pytest.raises(ValueError, match="batches: expected"):
        begin(folder=tmp_path, resume=True, batches=iter(begin.batches()[:1]))


def test_the_shrinkage_fix_needs_stored_activations_end_to_end(model: Any, tmp_path: Path) -> None:
    begin = Through(model, ReLUConfig(D, F), config(ReLUConfig, fix_shrinkage=True))
    with pytest.raises(ValueError, match="fix_shrinkage: expected false end to end"):
        begin(folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
