"""Reports of runs: of every kind of architecture, finished or not, with data and without."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config import TrainConfig
from sae_kernels.config.output import OutputConfig
from sae_kernels.data import JointRows, ShardDataset, ShardWriter
from sae_kernels.errors import DataError, ModelError
from sae_kernels.harvest import harvest, load_model, minilm_folder
from sae_kernels.nn import (
    BatchTopKConfig,
    CrossLayerTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SparseAutoencoder,
    TopKConfig,
)
from sae_kernels.report import write_report
from sae_kernels.report.run import newest_sae, run_report
from sae_kernels.training import evaluate, train

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sae_kernels.nn import SAEConfig

D, F, TOKENS, STEPS = 8, 32, 600, 6
QUICK = TrainConfig(steps=STEPS, batch_size=64, log_every=2)
OFTEN = OutputConfig(checkpoint_every=2, keep_checkpoints=0)
ARCHITECTURES: dict[str, SAEConfig] = {
    "topk": TopKConfig(D, F, 4),
    "batchtopk": BatchTopKConfig(D, F, 4),
    "relu": ReLUConfig(D, F),
    "gated": GatedConfig(D, F),
    "jumprelu": JumpReLUConfig(D, F),
    "transcoder": TopKConfig(D, F, 4, d_out=D, subtract_b_dec=False, unit_norm_decoder=False),
    "crosscoder": BatchTopKConfig(D, F, 4, n_layers=2, unit_norm_decoder=False),
    "clt": CrossLayerTopKConfig(D, F, k=4, n_layers=2, d_out=D),
}


@pytest.fixture
def data(tmp_path: Path) -> Callable[[str], Path]:
    """Folders of activations by name; each name is other activations of the same tokens."""

    def data(name: str) -> Path:
        folder = tmp_path / name
        if not folder.exists():
            x = torch.randn(TOKENS, D, generator=torch.Generator().manual_seed(len(name)))
            with ShardWriter(folder, D) as writer:
                writer.write(x)
        return folder

    return data


@pytest.fixture
def trained(tmp_path: Path, data: Callable[[str], Path]) -> Callable[..., Path]:
    """A run of an architecture on the folder "own", and "other" where it takes two."""

    def trained(arch: str, **changes: Any) -> Path:
        config, own, other = ARCHITECTURES[arch], data("own"), data("other")
        folders = [own, other] if arch in ("crosscoder", "clt") else [own]
        targets = {"transcoder": [other], "clt": [other, own]}.get(arch, [])
        table = {"folders": [str(f) for f in folders], "target": [str(f) for f in targets]}
        layers = [ShardDataset(folder) for folder in folders]
        given: dict[str, Any] = {"folder": tmp_path / f"run-{arch}", "data": table, "output": OFTEN}
        train(
            config,
            JointRows(layers) if len(layers) > 1 else layers[0],
            QUICK,
            target=JointRows([ShardDataset(f) for f in targets]) if targets else None,
            **(given | changes),
        )
        return tmp_path / f"run-{arch}"

    return trained


@pytest.mark.sampled(2)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_measured_on_its_own_data_and_says_so(
    trained: Callable[..., Path], data: Callable[[str], Path], arch: str
) -> None:
    run = trained(arch)
    report = run_report(run)
    loaded = SparseAutoencoder.from_pretrained(run / "sae")
    source: Any = ShardDataset(data("own"))
    target: Any = ShardDataset(data("other")) if arch in ("transcoder", "clt") else None
    if arch == "clt":
        target = JointRows([target, source])
    if arch in ("crosscoder", "clt"):
        source = JointRows([source, ShardDataset(data("other"))])
    expected = evaluate(loaded, source, target=target)
    assert report.measured_fvu == expected.fvu
    assert report.latent_density is not None
    assert torch.equal(report.latent_density, expected.latent_density)
    assert report.measured_on == "training"
    assert "that it was trained on" in report.subtitle
    assert report.metrics["l0"] == expected.l0
    assert [point.step for point in report.curve] == [2, 4, 6]
    assert report.examples is None
    html = write_report(report, run).read_text(encoding="utf-8")
    assert "Training FVU" in html
    assert "eld-out" not in html
    assert html.count("<svg") == 4


def test_given_data_are_not_called_training_data(
    trained: Callable[..., Path], data: Callable[[str], Path]
) -> None:
    run = trained("topk")
    new = run_report(run, [data("new")], max_tokens=100)
    assert new.measured_on == "evaluation"
    assert "Measured on 100 tokens that were given" in new.subtitle
    assert run_report(run, [data("own")]).measured_on == "training"
    with pytest.raises(ValueError, match="target: expected the data"):
        run_report(run, target=[data("new")])
    with pytest.raises(ValueError, match="target: expected one for a transcoder"):
        run_report(trained("transcoder"), [data("new")])
    with pytest.raises(DataError, match="is not a data set"):
        run_report(run, [run / "nowhere"])


@pytest.mark.full
@pytest.mark.parametrize("table", [{}, {"folders": ["gone"]}])
def test_what_cannot_be_known_is_left_out(
    tmp_path: Path, table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(ARCHITECTURES["topk"], torch.randn(200, D), QUICK, folder=tmp_path / "run", data=table)
    report = run_report(tmp_path / "run")
    assert report.latent_density is None
    assert report.measured_fvu is None
    assert "Not measured on any activations" in report.subtitle
    assert set(report.metrics) == {"dead_fraction", "seconds", "tokens_per_second"}
    assert len(report.decoder_cosine) == F
    page = write_report(report, tmp_path / "page")
    html = page.read_text(encoding="utf-8")
    assert "Last batch&#39;s FVU" in html
    assert "The run in three pictures" in html
    assert "What the latents respond to" not in html
    assert "never fired" not in html
    assert not (page.parent / "density.png").exists()


def test_a_run_without_a_curve_has_no_empty_pictures(trained: Callable[..., Path]) -> None:
    run = trained("topk", data={})
    (run / "metrics.jsonl").unlink()
    html = write_report(run_report(run), run).read_text(encoding="utf-8")
    assert "The run in one picture<" in html


def unfinished(run: Path) -> Path:
    (run / "result.json").unlink()
    return run


def test_an_unfinished_run_is_as_far_as_its_newest_whole_checkpoint(
    trained: Callable[..., Path],
) -> None:
    run = unfinished(trained("topk"))
    newest = sorted((run / "checkpoints").iterdir())
    report = run_report(run)
    assert f"as of checkpoint {newest[-1].name} of a run that is not finished" in report.subtitle
    assert report.metrics["tokens_per_second"] > 0
    weights = newest[-1] / "sae.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert newest_sae(run) == newest[-2]
    for path in newest:
        (path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match=f"{newest[-1].name}.*expected sae_kernels.checkpoint"):
        run_report(run)


def test_a_run_that_has_saved_nothing_yet(trained: Callable[..., Path]) -> None:
    run = unfinished(trained("topk", output=OutputConfig(checkpoint_every=0)))
    assert newest_sae(run) == run / "sae"
    (run / "sae").rename(run / "elsewhere")
    with pytest.raises(DataError, match="neither yet; wait for its first checkpoint"):
        run_report(run)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"sae": {}}))  # the old layout
    with pytest.raises(DataError, match=r"expected the folder of a run, it has no run\.toml"):
        run_report(tmp_path)


@pytest.mark.full
def test_values_that_are_missing_are_nan_in_the_curve(trained: Callable[..., Path]) -> None:
    run = trained("topk")
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines[-1] |= {"fvu": None}
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = run_report(run)
    assert math.isnan(report.curve[-1].fvu)
    assert write_report(report, run).is_file()


def test_latents_in_context_need_tokens_and_their_tokenizer(
    tmp_path: Path, trained: Callable[..., Path], data: Callable[[str], Path]
) -> None:
    pytest.importorskip("transformers")
    model, tokenizer = load_model(minilm_folder())
    texts = [f"The cat number {i} sat on the mat and looked at the dog." for i in range(30)]
    acts = tmp_path / "acts"
    harvest(model, tokenizer, texts, "encoder.layer.0", acts)
    width = ShardDataset(acts).d_in
    run = tmp_path / "run"
    small = TrainConfig(steps=20, batch_size=64, lr=1e-3)
    config = TopKConfig(width, 64, 2)
    train(config, ShardDataset(acts), small, folder=run, data={"folders": [str(acts)]})
    named = run_report(run, tokenizer=minilm_folder())
    found = run_report(run)  # the index says which local model they came from
    assert named.examples is not None
    assert found.examples == named.examples
    words = {token for e in named.examples for context in e.contexts for token in context.tokens}
    assert words <= set(tokenizer.tokenize(" ".join(texts)))
    with pytest.raises(ModelError, match="tokenizer: expected a folder or a hub name"):
        run_report(run, tokenizer=tmp_path / "nowhere")
    # Without tokens in the shards there is nothing to show, and none is claimed.
    assert run_report(trained("topk"), tokenizer=minilm_folder()).examples is None
