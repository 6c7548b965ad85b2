"""An SAE per layer from one stream: each is the one it would have been on its layer alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config import OutputConfig
from sae_kernels.data import JointRows, ShardDataset, ShardWriter, TensorRows
from sae_kernels.harvest import LiveBatches
from sae_kernels.nn import BatchTopKConfig, TopKConfig
from sae_kernels.training import train, train_many
from tests.harvest.causal import CONTEXT, D, documents, gpt2, sinking, tokenizer
from tests.settings import settings
from tests.training.same_runs import Stop, assert_same, stop_at

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.config import TrainConfig
    from sae_kernels.nn import SAEConfig
    from sae_kernels.training import TrainingResult

pytestmark = pytest.mark.usefixtures("one_thread")
N, F, B, STEPS = 500, 48, 25, 16
TEXT = documents(40)
SAVING = OutputConfig(checkpoint_every=5)
FREE = {"subtract_b_dec": False, "unit_norm_decoder": False}
SAES: dict[str, SAEConfig] = {
    "first": TopKConfig(D, F, 4),
    "second": TopKConfig(D, F, 4),
    "again": BatchTopKConfig(D, F, k=3),  # on the layer of the second
    "transcoder": TopKConfig(D, F, 4, d_out=D, **FREE),
    "crosscoder": TopKConfig(D, F, 4, n_layers=2, unit_norm_decoder=False, decoder_norm="sum"),
}
LAYERS = {
    "first": "h.0",
    "second": "h.1",
    "again": "h.1",
    "transcoder": ["h.1", "h.0"],  # not in the order of the shared rows
    "crosscoder": ["h.0", "h.2"],
}


def config(sae: Any, **changes: Any) -> TrainConfig:
    given = {"steps": STEPS, "batch_size": B, "lr": 2e-3, "compute": "float32", "log_every": 1}
    return settings(sae, **given | {"dead_after_tokens": 200, "data_seed": 3} | changes)


RUNS = {name: (sae, config(sae)) for name, sae in SAES.items()}


class Live:
    """Streams of one model and one text."""

    def __init__(self) -> None:
        self.model, self.words, self.text = gpt2(), tokenizer(), TEXT

    def __call__(self, layer: Any, **options: Any) -> LiveBatches:
        given = {"window_rows": 60, "model_batch_size": 2, "context_length": CONTEXT, "seed": 3}
        given |= options
        return LiveBatches(self.model, self.words, self.text, layer, given.pop("batch", B), **given)


class Stored:
    """Data sets of one text, a folder a layer."""

    def __init__(self, folder: Path) -> None:
        rows = torch.Generator().manual_seed(0)
        for layer in ("h.0", "h.1", "h.2"):
            with ShardWriter(folder / layer, D, rows_per_shard=150, dtype=torch.float16) as writer:
                writer.write(torch.randn(N, D, generator=rows), torch.arange(N))
        self.folder = folder

    def __call__(self, layer: Any) -> Any:
        if isinstance(layer, str):
            return ShardDataset(self.folder / layer)
        return JointRows([ShardDataset(self.folder / each) for each in layer])


@pytest.fixture(params=["live", "stored"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """What opens the activations of a layer, or of several side by side."""
    if request.param == "live":
        pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
        return Live()
    return Stored(tmp_path / "data")


def alone(opened: Any, name: str, **options: Any) -> TrainingResult:
    sae, settled = RUNS[name]
    return train(sae, opened(LAYERS[name]), settled, **options)


def together(opened: Any, names: Any = RUNS, **options: Any) -> dict[str, TrainingResult]:
    streams = {name: opened(LAYERS[name]) for name in RUNS}
    return train_many({name: RUNS[name] for name in names}, streams, **options)


def files(run: Path) -> list[bytes]:
    return [(run / "sae" / name).read_bytes() for name in ("config.json", "sae.safetensors")]


def test_each_is_what_it_would_be_alone(opened: Any, tmp_path: Path) -> None:
    results = together(opened, folder=tmp_path / "all")
    assert list(results) == list(RUNS)
    for name, result in results.items():
        assert_same(result, alone(opened, name, folder=tmp_path / "alone" / name))
        assert files(tmp_path / "all" / name) == files(tmp_path / "alone" / name)


def test_the_model_runs_once_for_all() -> None:
    opened = Live()
    computed: list[int] = []
    opened.model.transformer.wte.register_forward_pre_hook(
        lambda _module, args: computed.append(args[0].numel())
    )
    alone(opened, "crosscoder")
    once = sum(computed)
    computed.clear()
    together(opened)
    # Besides, one sequence tells the widths of each stream.
    assert sum(computed) <= once + len(RUNS) * CONTEXT


def test_rows_of_enormous_norm_go_from_all_layers(tmp_path: Path) -> None:
    """Each SAE has the bounds of its own layers recorded; a sweep that stops goes on the same."""
    opened = Live()
    opened.model = sinking()
    straight = together(opened, folder=tmp_path / "straight")
    bounds = {name: run.sae.metadata["activations"]["max_norm"] for name, run in straight.items()}
    assert bounds["transcoder"] == bounds["second"] + bounds["first"]
    assert bounds["again"] == bounds["second"] != bounds["first"]
    assert bounds["crosscoder"][0] == bounds["first"][0]
    options: dict[str, Any] = {"folder": tmp_path / "stopped", "output": SAVING, "resume": True}
    for step in (3, 8):
        with pytest.raises(Stop):
            together(opened, on_step={"first": stop_at(step)}, **options)
    together(opened, **options)
    for name in RUNS:
        assert files(tmp_path / "stopped" / name) == files(tmp_path / "straight" / name)


def test_stopped_they_go_on_together_and_alone(opened: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"folder": tmp_path, "output": SAVING, "resume": True}
    for step in (3, 8):
        with pytest.raises(Stop):
            together(opened, on_step={"first": stop_at(step)}, **options)
    own: dict[str, Any] = {**options, "folder": tmp_path / "second"}
    with pytest.raises(Stop):  # one goes on by itself, and further than the others
        alone(opened, "second", on_step=stop_at(12), **own)
    alone(opened, "again", **{**own, "folder": tmp_path / "again"})
    results = together(opened, **options)
    assert list(results) == [name for name in RUNS if name != "again"]
    for name in RUNS:
        assert files(tmp_path / name)
        straight = alone(opened, name, folder=tmp_path / "straight" / name)
        assert files(tmp_path / name) == files(tmp_path / "straight" / name)
        if name in results:
            assert_same(results[name], straight)
    assert together(opened, **options) == {}


def test_another_layer_is_refused_on_resuming(opened: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"folder": tmp_path, "output": SAVING, "resume": True}
    with pytest.raises(Stop):
        together(opened, ["first", "second"], on_step={"first": stop_at(7)}, **options)
    runs = {name: RUNS[name] for name in ("first", "second")}
    swapped = {"first": opened("h.1"), "second": opened("h.0")}
    with pytest.raises(ValueError, match="expected the data that the run began with"):
        train_many(runs, swapped, **options)
    begun = {**options, "folder": tmp_path / "first"}
    with pytest.raises(ValueError, match=r"(data|layer) was .* is"):
        train(RUNS["first"][0], opened("h.1"), RUNS["first"][1], **begun)


def test_sources_that_cannot_be_read_together(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
    runs = {name: RUNS[name] for name in ("first", "second")}
    live, stored = Live(), Stored(tmp_path)

    def refused(first: Any, second: Any, **options: Any) -> str:
        with pytest.raises(ValueError) as caught:
            train_many(runs, {"first": first, "second": second}, **options)
        return str(caught.value)

    assert "differ in their layer alone" in refused(live("h.0"), Live()("h.1"))
    assert "differ in their layer alone" in refused(live("h.0"), live("h.1", window_rows=70))
    assert "LiveBatches of all, got LiveBatches, ShardDataset" in refused(
        live("h.0"), stored("h.1")
    )
    assert "expected the same tokens in each" in refused(
        stored("h.0"), TensorRows(torch.zeros(9, D))
    )
    assert "target: expected none" in refused(
        stored("h.0"), stored("h.1"), target=torch.zeros(N, D)
    )
    with pytest.raises(ValueError, match="one for each run, got none for second"):
        train_many(runs, {"first": stored("h.0")})
