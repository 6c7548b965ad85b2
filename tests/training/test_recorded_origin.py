"""What a run leaves in the SAE's metadata: figures and data, the same whether it was stopped."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sae_kernels as sk
from sae_kernels.config import OutputConfig
from sae_kernels.data import JointRows, ShardDataset, ShardWriter

if TYPE_CHECKING:
    from pathlib import Path

D, F, STEPS = 8, 32, 12
SETTINGS: dict[str, Any] = {"steps": STEPS, "batch_size": 32, "log_every": 5}


class Stopped(Exception):
    pass


def stop(step: int, _: Any) -> None:
    if step == 7:
        raise Stopped


def test_figures_are_those_of_the_last_line(tmp_path: Path) -> None:
    run = sk.train(sk.TopKSAE(D, F, k=4), torch.randn(256, D), folder=tmp_path, **SETTINGS)
    last = run.metrics[-1]
    expected = {"tokens": 32 * STEPS, "steps": STEPS}
    expected |= {name: last[name] for name in ("fvu", "l0", "dead_fraction")}
    assert run.sae.metadata == {"trained": expected, "sae_kernels_version": sk.__version__}
    saved = json.loads((tmp_path / "sae" / "config.json").read_text())
    assert saved["metadata"] == run.sae.metadata
    assert f"{last['fvu']:.4g}" in (tmp_path / "sae" / "README.md").read_text()


def test_a_resumed_run_leaves_the_same_files(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "acts", D) as writer:
        writer.write(torch.randn(256, D))
    data = ShardDataset(tmp_path / "acts")
    config = sk.TopKConfig(D, F, k=4)
    straight = sk.train(config, data, folder=tmp_path / "straight", **SETTINGS)
    assert straight.sae.metadata["data"] == data.fingerprint
    output = OutputConfig(checkpoint_every=5)
    options: dict[str, Any] = {"folder": tmp_path / "stopped", "output": output, "resume": True}
    with pytest.raises(Stopped):
        sk.train(config, data, on_step=stop, **options, **SETTINGS)
    sk.train(config, data, **options, **SETTINGS)
    for file in ("config.json", "sae.safetensors", "README.md"):
        files = [tmp_path / run / "sae" / file for run in ("straight", "stopped")]
        assert files[0].read_bytes() == files[1].read_bytes(), file


def test_figures_that_are_not_finite_are_left_out() -> None:
    batches = [torch.randn(32, D) for _ in range(STEPS)]
    batches[-1] = torch.full((32, D), torch.nan)
    run = sk.train(sk.TopKSAE(D, F, k=4), batches, **SETTINGS, on_nonfinite="skip")
    assert run.skipped == 1
    assert "fvu" not in run.sae.metadata["trained"]


# -- whose activations -----------------------------------------------------------------------------

BLOCK = {"model": "gpt2", "layer": "h.6", "context_length": 128}
HOOK = {"hook_name": "blocks.6.hook_resid_post"}


def stored(folder: Path, **metadata: Any) -> ShardDataset:
    with ShardWriter(folder, D, metadata=metadata) as writer:
        writer.write(torch.randn(256, D))
    return ShardDataset(folder)


def place(run: Any) -> Any:
    return run.sae.metadata.get("activations")


def test_stored_activations_say_where_they_are_from(tmp_path: Path) -> None:
    more = {"revision": "abc", "dataset": {"name": "wiki", "split": "train"}, "batch_size": 16}
    data = stored(tmp_path / "acts", **BLOCK, **more)
    run = sk.train(sk.TopKConfig(D, F, k=4), data, folder=tmp_path / "run", **SETTINGS)
    assert place(run) == {**BLOCK, **HOOK, "revision": "abc", "dataset": "wiki"}
    saved = json.loads((tmp_path / "run" / "sae" / "config.json").read_text())
    assert saved["metadata"]["activations"] == place(run)
    card = (tmp_path / "run" / "sae" / "README.md").read_text()
    assert "| layer in TransformerLens | blocks.6.hook_resid_post |" in card
    weights = sk.formats.Weights(run.sae.config, run.sae.state_dict(), run.sae.metadata)
    sk.formats.write(tmp_path / "saelens", weights, "saelens")
    cfg = json.loads((tmp_path / "saelens" / "cfg.json").read_text())
    assert cfg["metadata"]["model_name"] == "gpt2"
    assert cfg["metadata"]["hook_name"] == "blocks.6.hook_resid_post"
    assert cfg["metadata"]["sae_kernels"]["trained"]["tokens"] == 32 * STEPS


@pytest.mark.parametrize("layer", ["h.6.mlp", "encoder.layer.6", None])
def test_no_hook_is_invented(tmp_path: Path, layer: str | None) -> None:
    data = stored(tmp_path / "acts", model="gpt2", layer=layer)
    run = sk.train(sk.TopKConfig(D, F, k=4), data, **SETTINGS)
    assert place(run) == {"model": "gpt2", **({"layer": layer} if layer else {})}


def test_the_user_has_the_last_word(tmp_path: Path) -> None:
    data = stored(tmp_path / "acts", **BLOCK)
    names = {"model_name": "openai-community/gpt2", "hook_name": "blocks.6.hook_resid_mid"}
    output = OutputConfig(**names)
    for source in (data, torch.randn(256, D)):
        run = sk.train(sk.TopKConfig(D, F, k=4), source, output=output, **SETTINGS)
        assert place(run)["model"] == names["model_name"]
        assert place(run)["hook_name"] == names["hook_name"]
    assert place(sk.train(sk.TopKConfig(D, F, k=4), torch.randn(256, D), **SETTINGS)) is None


def test_both_ends_of_a_transcoder(tmp_path: Path) -> None:
    data = stored(tmp_path / "x", model="gpt2", layer="h.5")
    target = stored(tmp_path / "y", model="gpt2", layer="h.6")
    config = sk.TopKConfig(D, F, k=4, d_out=D, subtract_b_dec=False)
    run = sk.train(config, data, target=target, **SETTINGS)
    assert place(run) == {
        "model": "gpt2",
        "layer": "h.5",
        "target_layer": "h.6",
        "hook_name": "blocks.5.hook_resid_post",
        "hook_name_out": "blocks.6.hook_resid_post",
    }


def test_the_layers_of_a_crosscoder(tmp_path: Path) -> None:
    parts = [stored(tmp_path / str(i), model="gpt2", layer=f"h.{i}") for i in range(2)]
    config = sk.TopKConfig(D, F, k=4, n_layers=2)
    run = sk.train(config, JointRows(parts), **SETTINGS)
    assert place(run) == {"model": "gpt2", "layer": ["h.0", "h.1"]}


def test_what_a_loaded_sae_knows_stays_unless_the_data_say_more(tmp_path: Path) -> None:
    sae = sk.TopKSAE(D, F, k=4)
    sae.metadata = {"activations": {"model": "gpt2", "left_out": 3}, "license": "mit"}
    run = sk.train(sae, torch.randn(256, D), **SETTINGS)
    assert place(run) == {"model": "gpt2", "left_out": 3}
    run = sk.train(sae, stored(tmp_path / "acts", **BLOCK), **SETTINGS)
    assert place(run) == {"left_out": 3, **BLOCK, **HOOK}
    assert run.sae.metadata["license"] == "mit"


def test_a_checkpoint_knows_it_too(tmp_path: Path) -> None:
    data = stored(tmp_path / "acts", **BLOCK)
    options: dict[str, Any] = {
        "folder": tmp_path / "run",
        "output": OutputConfig(checkpoint_every=5),
    }
    with pytest.raises(Stopped):
        sk.train(sk.TopKConfig(D, F, k=4), data, on_step=stop, **options, **SETTINGS)
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert sk.load(checkpoint).metadata["activations"] == {**BLOCK, **HOOK}


def test_a_live_stream_and_a_run_through_the_model(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
    from sae_kernels.harvest import LiveBatches, token_batches
    from sae_kernels.training.end_to_end import train_end_to_end
    from tests.harvest.causal import CONTEXT, documents, gpt2, tokenizer
    from tests.harvest.causal import D as WIDTH

    model, text = gpt2(), documents(40)
    model.config._name_or_path = "tiny"
    options: dict[str, Any] = {"window_rows": 60, "model_batch_size": 2, "context_length": CONTEXT}
    settings = {"steps": 2, "batch_size": 25}
    expected = {"model": "tiny", "layer": "h.1", "context_length": CONTEXT}
    hook = {"hook_name": "blocks.1.hook_resid_post"}
    live = LiveBatches(model, tokenizer(), text, "h.1", 25, **options)
    run = sk.train(sk.TopKConfig(WIDTH, F, k=4), live, **settings)
    assert place(run).items() >= {**expected, **hook}.items()  # and which rows were left out
    live = LiveBatches(model, tokenizer(), text, ["h.0", "h.1"], 25, **options)
    config = sk.TopKConfig(WIDTH, F, k=4, d_out=WIDTH, subtract_b_dec=False)
    run = sk.train(config, live, **settings)
    assert place(run)["layer"] == "h.0"
    assert place(run)["target_layer"] == "h.1"
    batches = list(token_batches(model, tokenizer(), text, batch_size=4, context_length=CONTEXT))
    result = train_end_to_end(
        model,
        batches,
        "h.1",
        sk.TopKSAE(WIDTH, F, k=4),
        sk.TrainConfig(steps=2, device="cpu"),
        metadata={"context_length": CONTEXT},
    )
    assert place(result) == {**expected, **hook}
