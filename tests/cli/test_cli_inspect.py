"""``inspect``: what each kind of path is, what is said of it, and what is refused."""

from __future__ import annotations

import json
import pickle
import struct

import pytest
import torch
from safetensors.torch import save_file

from sae_kernels import formats
from sae_kernels.config import TrainConfig
from sae_kernels.config.output import OutputConfig
from sae_kernels.data import ShardDataset
from sae_kernels.nn import ReLUConfig, TopKConfig, TopKSAE, build
from sae_kernels.training import train

D_IN, TOKENS = 8, 600  # of the data fixture


@pytest.fixture
def trained(data, tmp_path):
    config = TrainConfig(steps=4, batch_size=64, log_every=2)
    train(
        TopKConfig(D_IN, 32, 4),
        ShardDataset(data),
        config,
        folder=tmp_path / "run",
        output=OutputConfig(checkpoint_every=2, keep_checkpoints=0),
        data={"folders": [str(data)]},
    )
    return tmp_path / "run"


@pytest.fixture
def look(run):
    """The one record of ``inspect --json``."""

    def look(*arguments):
        ran = run("inspect", *arguments, "--json")
        assert ran.code == 0, ran
        (record,) = ran.records()
        return record

    return look


def test_a_run(look, run, trained):
    seen = look(trained, "--verify")
    assert (seen["kind"], seen["finished"]) == ("run", True)
    assert seen["checkpoints"][-1] == "step_00000004"
    assert seen["result"]["steps"] == 4
    assert seen["settings"]["sae"]["k"] == 4
    assert seen["verified"] == f"{len(seen['checkpoints'])} checkpoints"
    (trained / "result.json").unlink()
    seen = look(trained)
    assert seen["finished"] is False
    assert seen["last"]["step"] == 4
    text = run("inspect", trained).out
    assert "settings.train.steps" in text
    assert "step_00000002, step_00000004" in text


def test_a_checkpoint_and_its_checksums(look, run, trained):
    path = trained / "checkpoints" / "step_00000004"
    seen = look(path, "--verify")
    assert (seen["kind"], seen["step"]) == ("checkpoint", 4)
    assert seen["config.json"]["k"] == 4
    assert seen["trainer.json"]["step"] == 4
    assert seen["tensors"]["W_enc"] == {"shape": [32, D_IN], "dtype": "float32"}
    sizes = {name: (path / name).stat().st_size for name in seen["bytes"]}
    assert seen["bytes"] == sizes
    state = path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-1] + b"\x55")
    assert run("inspect", path).code == 0
    assert "state.safetensors: changed since" in run("inspect", path, "--verify").refusal()
    assert "state.safetensors: changed since" in run("inspect", trained, "--verify").refusal()


def test_activations(look, run, data):
    seen = look(data, "--verify")
    assert (seen["kind"], seen["n_tokens"], seen["d_in"]) == ("activations", TOKENS, D_IN)
    assert (seen["dtype"], seen["columns"]) == ("float32", ["activations"])
    shard = data / "shard_00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert run("inspect", data).code == 0
    assert "shard_00001.safetensors changed" in run("inspect", data, "--verify").refusal()


def test_a_saved_sae_of_ours(look, saved):
    seen = look(saved, "--verify")
    assert (seen["kind"], seen["format"]) == ("sae", "native")
    assert (seen["config"]["architecture"], seen["config"]["k"]) == ("topk", 4)
    assert seen["tensors"]["W_dec"] == {"shape": [32, D_IN], "dtype": "float32"}
    assert seen["verified"] == "nothing, the format has no checksums"


@pytest.mark.parametrize("format", ["saelens", "sparsify"])
def test_a_saved_sae_of_a_peer(look, tmp_path, format):
    sae = TopKSAE(TopKConfig(D_IN, 32, 4))
    if format == "saelens":
        place = {"activations": {"layer": "h.3"}}
        formats.write_saelens(tmp_path, sae.config, sae.state_dict(), place)
    else:
        formats.write_sparsify(tmp_path, sae.config, sae.state_dict())
    seen = look(tmp_path)
    assert (seen["kind"], seen["format"]) == ("sae", format)
    assert seen["config"]["k"] == 4
    assert seen["tensors"]["W_enc"] == {"shape": [32, D_IN], "dtype": "float32"}


def test_a_folder_of_several_lists_them(look, run, tmp_path, trained, data):
    folder = tmp_path / "release"
    folder.mkdir()
    trained.rename(folder / "run")
    data.rename(folder / "acts")
    for k in (2, 3):
        TopKSAE(D_IN, 32, k=k).save_pretrained(folder / f"k{k}")
    formats.write_sparsify(
        folder / "x", TopKConfig(D_IN, 32, 4), TopKSAE(D_IN, 32, k=4).state_dict()
    )
    (folder / "k3" / "config.json").write_text("{")
    seen = look(folder)
    assert (seen["kind"], seen["n_saes"], seen["n_activations"]) == ("folder", 4, 1)
    native = {"format": "native", "architecture": "topk", "d_in": D_IN, "n_latents": 32}
    damaged, acts = seen["contents"][1], seen["contents"][4]
    assert damaged.pop("error").startswith(f"{folder}/k3/config.json: expected a JSON object")
    assert seen["contents"] == [
        {"path": "k2", **native},
        {"path": "k3", "format": "native"},
        {"path": "run/sae", **native},  # and not its checkpoints
        {"path": "x", **native, "format": "sparsify"},
        acts,
    ]
    assert acts["path"] == "acts"
    assert (acts["d_in"], acts["n_tokens"]) == (D_IN, TOKENS)
    text = run("inspect", folder).out
    assert "run/sae  native       topk, 8 to 32 latents" in text
    assert f"acts     activations  {TOKENS} rows [{D_IN}]" in text
    assert "damaged: " in text


def test_a_set_of_layers_lists_them(look, tmp_path):
    config = ReLUConfig(D_IN, 32, d_out=D_IN, subtract_b_dec=False)
    hooks = {"hook_name": "blocks.{}.mlp.hook_in", "hook_name_out": "blocks.{}.hook_mlp_out"}

    def of(layer):
        place = {key: hook.format(layer) for key, hook in hooks.items()}
        return formats.Weights(config, build(config).state_dict(), {"activations": place})

    formats.write_transcoder_set(tmp_path, [of(i) for i in range(3)])
    seen = look(tmp_path)
    assert (seen["kind"], seen["n_saes"]) == ("folder", 3)
    assert [each["path"] for each in seen["contents"]] == [
        f"layer_{i}.safetensors" for i in range(3)
    ]
    seen = look(tmp_path / "layer_2.safetensors")
    assert (seen["kind"], seen["format"]) == ("sae", "circuit_tracer")
    assert seen["metadata"]["activations"]["hook_name"] == "blocks.2.mlp.hook_in"


def test_the_help_names_every_format(run):
    text = " ".join(run("inspect", "--help").out.split())
    assert f"a saved SAE ({', '.join(formats.FORMATS)})" in text


def test_a_bare_file_is_known_by_its_header_alone(look, run, tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(tensors, path, metadata={"from": "a test\x1b[31m"})
    seen = look(path)
    expected = {
        "a": {"shape": [2, 3], "dtype": "float32"},
        "b": {"shape": [5], "dtype": "bfloat16"},
    }
    assert (seen["kind"], seen["tensors"]) == ("safetensors", expected)
    text = run("inspect", path).out
    assert "[2, 3]" in text
    assert "\x1b" not in text


def test_a_stranger_s_pickle_never_runs(run, tmp_path):
    class Planted:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "ae.pt"
    trainer = {"dict_class": "AutoEncoder", "activation_dim": 8, "dict_size": 32}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
    torch.save({"encoder.weight": Planted()}, path)
    assert str(path) in run("inspect", path).refusal()
    assert str(path) in run("inspect", tmp_path).refusal()
    path.write_bytes(pickle.dumps(Planted()))
    assert str(path) in run("inspect", path).refusal()
    assert not (tmp_path / "ran").exists()


def test_what_it_does_not_know_is_refused_with_what_it_knows(run, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "nowhere"):
        message = run("inspect", path).refusal()
        assert f"{path}: expected a run, a checkpoint, a folder of activations" in message


@pytest.mark.parametrize("content", [b"", b"no tensors", struct.pack("<Q", 1 << 40) + b"{}"])
def test_a_damaged_file_is_refused(run, tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert "x.safetensors: expected a safetensors file" in run("inspect", path).refusal()


@pytest.mark.parametrize(
    "manifest", ["{}", "[]", "{", '{"format": "sae_kernels.checkpoint", "files": 3}']
)
def test_a_manifest_that_is_none_is_refused(run, tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    assert "manifest.json" in run("inspect", tmp_path).refusal()
    assert "manifest.json" in run("inspect", tmp_path, "--verify").refusal()


def test_a_manifest_cannot_lead_out_of_its_folder(run, tmp_path):
    (tmp_path / "secret.json").write_text(json.dumps({"key": "value"}))
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    files = {"../secret.json": {"bytes": 1, "sha256": ""}}
    record = {"format": "sae_kernels.checkpoint", "version": 1, "step": 1, "files": files}
    (folder / "manifest.json").write_text(json.dumps(record))
    assert "value" not in run("inspect", folder).out
