"""``sk.load``: anybody's SAE from a folder, a file or the hub, and what it says when it cannot."""

from __future__ import annotations

import json
import logging
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import huggingface_hub
import pytest
import torch
from foreign import D, F, refuses
from makers import MAKE, SWITCH, dictionary_learning_switch, gemma_scope, saelens, sparsify

import sae_kernels as sk
from sae_kernels import nn
from sae_kernels.config import OutputConfig
from sae_kernels.errors import DataError
from sae_kernels.formats import write_cross_layer
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = {
    "native": "sae.safetensors",
    "saelens": "sae_weights.safetensors",
    "sparsify": "sae.safetensors",
    "dictionary_learning": "ae.pt",
    "gemma_scope": "params.npz",
    "circuit_tracer": "layer_3.safetensors",
}


def assert_loaded(sae: sk.SparseAutoencoder, folder: Path) -> None:
    """The module in evaluation mode that the reader's tensors make."""
    config, tensors, _ = sk.formats.read(folder)
    assert sae.config == config
    assert type(sae) is type(sk.nn.build(config))
    assert not sae.training
    assert not sae.is_fresh
    for name, tensor in sae.state_dict().items():
        assert_bitwise(name, tensor.reshape(-1), tensors[name].reshape(-1))


@pytest.mark.parametrize("name", MAKE)
def test_a_folder_and_its_weights_file(tmp_path: Path, name: str, caplog: Any, capsys: Any) -> None:
    folder = tmp_path / "sae"
    MAKE[name](folder)
    with caplog.at_level(logging.INFO, logger="sae_kernels"):
        sae = sk.load(folder)
    assert_loaded(sae, folder)
    assert name in caplog.text
    assert_loaded(sk.load(str(folder / WEIGHTS[name])), folder)
    assert_loaded(sk.load(folder, format=name), folder)
    assert_loaded(sk.load(tmp_path), folder)  # the only one below
    assert sae.metadata.get("format") == (None if name == "native" else name)
    assert capsys.readouterr() == ("", "")
    with torch.no_grad():
        assert sae(torch.ones(3, D)).x_hat.isfinite().all()


def test_the_fork_of_dictionary_learning(tmp_path: Path) -> None:
    dictionary_learning_switch(tmp_path)
    sae = sk.load(tmp_path)
    assert isinstance(sae, sk.SwitchSAE)
    assert sae.config.n_experts == SWITCH.n_experts


def test_dtype_and_device(tmp_path: Path) -> None:
    gemma_scope(tmp_path)
    sae = sk.load(tmp_path, dtype=torch.bfloat16, device="meta")
    assert sae.W_enc.dtype == sae.b_dec.dtype == torch.bfloat16
    assert sae.threshold.dtype == torch.float32, "a threshold keeps its precision"
    assert sae.W_enc.device.type == "meta"


def test_what_is_loaded_goes_on_training_and_is_saved_with_its_origin(tmp_path: Path) -> None:
    saelens(tmp_path / "theirs")
    run = sk.train(sk.load(tmp_path / "theirs"), torch.randn(64, D), steps=2, batch_size=16)
    run.sae.save_pretrained(tmp_path / "ours")
    again = sk.load(tmp_path / "ours")
    assert again.metadata["format"] == "saelens"
    assert again.metadata["trained"]["steps"] == 2
    assert "saelens" in (tmp_path / "ours" / "README.md").read_text()


def test_several_are_listed(tmp_path: Path) -> None:
    for layer in range(14):
        sparsify(tmp_path / f"layer_{layer:02}")
    refuses(
        lambda: sk.load(tmp_path),
        f"{tmp_path}: expected one SAE, got a folder with 14 of them: "
        "layer_00 (topk, 6 to 16), layer_01 (topk, 6 to 16), ",
        "layer_11 (topk, 6 to 16), ...; name one",
    )
    shutil.rmtree(tmp_path / "layer_13")
    saelens(tmp_path / "layer_13" / "deep")
    refuses(lambda: sk.load(tmp_path), "with 14 of them")
    assert_loaded(sk.load(tmp_path, format="saelens"), tmp_path / "layer_13" / "deep")


def test_a_run_s_folder_gives_its_sae(tmp_path: Path) -> None:
    output = OutputConfig(checkpoint_every=1)
    data = torch.randn(64, D, generator=torch.Generator().manual_seed(0))
    settings: dict[str, Any] = {"steps": 3, "batch_size": 16, "output": output}
    run = sk.train(sk.TopKConfig(D, 16, k=2), data, folder=tmp_path / "run", **settings)
    assert len([*(tmp_path / "run" / "checkpoints").iterdir()]) == 2
    assert torch.equal(sk.load(tmp_path / "run").W_enc, run.sae.folded().W_enc)
    found = sk.formats.find(tmp_path)
    assert [(str(f.path.relative_to(tmp_path)), f.format) for f in found] == [("run/sae", "native")]
    shutil.rmtree(tmp_path / "run" / "sae")  # of a run that was killed
    refuses(lambda: sk.load(tmp_path / "run"), "with 2 of them: checkpoints/step_00000002 (topk, ")


def test_a_name_in_a_listing_is_plain(tmp_path: Path) -> None:
    for name in ("a", "b"):
        sparsify(tmp_path / name)
    (tmp_path / "a" / "cfg.json").write_text("{")  # what cannot be described is listed all the same
    refuses(lambda: sk.load(tmp_path), "with 2 of them: a, b (topk, 6 to 16); name one")


def test_nothing_and_two_in_one(tmp_path: Path) -> None:
    refuses(lambda: sk.load(tmp_path), str(tmp_path), "expected the files of a saved SAE: config")
    refuses(lambda: sk.load(tmp_path / "no"), "a hub name owner/repo, there is nothing")
    refuses(lambda: sk.load("nowhere"), "nowhere: expected a folder", "owner/repo")
    refuses(lambda: sk.load(tmp_path, format="saelen"), "'saelen'", "did you mean 'saelens'?")
    refuses(lambda: sk.load(tmp_path, format="saelens"), "cfg.json", "it is not there")
    (tmp_path / "notes.txt").write_text("x")
    refuses(lambda: sk.load(tmp_path / "notes.txt"), "expected the files of a saved SAE")
    MAKE["native"](tmp_path)
    MAKE["saelens"](tmp_path)
    refuses(lambda: sk.load(tmp_path), "native and saelens and sparsify", "which format")
    assert isinstance(sk.load(tmp_path, format="saelens"), sk.TopKSAE)


def test_an_unknown_architecture(tmp_path: Path) -> None:
    MAKE["native"](tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": "spiral"}))
    known = ", ".join(sk.nn.architectures())
    refuses(lambda: sk.load(tmp_path), str(path), known, "'spiral'", "sae_kernels.nn.register")


def test_from_pretrained_says_who_reads_the_others(tmp_path: Path) -> None:
    saelens(tmp_path)
    refuses(lambda: sk.SparseAutoencoder.from_pretrained(tmp_path), "sae_kernels.load")


class Hub:
    """The hub's client over a folder: what it was asked for, in order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[str] = []

    def model_info(self, repository: str, revision: str | None = None) -> Any:
        assert repository == "owner/repo"
        files = sorted(p for p in self.root.rglob("*") if p.is_file())
        names = [SimpleNamespace(rfilename=p.relative_to(self.root).as_posix()) for p in files]
        return SimpleNamespace(sha=f"commit of {revision}", siblings=names)

    def hf_hub_download(self, repository: str, file: str, *, revision: str, **_: Any) -> str:
        assert (repository, revision) == ("owner/repo", "commit of v2")
        self.asked.append(file)
        return str(self.root / file)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub(tmp_path / "repository")
    fake.root.mkdir()
    (fake.root / "README.md").write_text("a model card")
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: fake)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake.hf_hub_download)
    return fake


SETTINGS = {"saelens": "cfg.json", "sparsify": "cfg.json", "circuit_tracer": "config.yaml"}


@pytest.mark.parametrize("name", MAKE)
def test_a_repository_gives_the_settings_first_and_no_other_file(hub: Hub, name: str) -> None:
    MAKE[name](hub.root)
    assert_loaded(sk.load("owner/repo", revision="v2"), hub.root)
    settings = [] if name == "gemma_scope" else [SETTINGS.get(name, "config.json")]
    assert hub.asked == [*settings, WEIGHTS[name]]


def test_one_of_several_in_a_repository(hub: Hub) -> None:
    for layer in range(3):
        gemma_scope(hub.root / f"layer_{layer}" / "width_16k" / "average_l0_71")
    sparsify(hub.root / "other")
    refuses(
        lambda: sk.load("owner/repo", revision="v2"),
        "owner/repo: expected one SAE, got a folder with 4 of them: ",
        "layer_0/width_16k/average_l0_71, ",
    )
    inside = "layer_1/width_16k/average_l0_71"
    for name in (f"owner/repo/{inside}", f"owner/repo/{inside}/params.npz", "owner/repo/layer_1/"):
        hub.asked.clear()
        assert_loaded(sk.load(name, revision="v2"), hub.root / inside)
        assert hub.asked == [f"{inside}/params.npz"]
    assert isinstance(sk.load("owner/repo", format="sparsify", revision="v2"), sk.TopKSAE)
    refuses(lambda: sk.load("owner/repo/none", revision="v2"), "expected the files of a saved SAE")


def test_one_layer_of_a_set_in_a_repository(hub: Hub) -> None:
    config = sk.nn.ReLUConfig(D, 16, d_out=D, subtract_b_dec=False, unit_norm_decoder=False)
    hooks = {"hook_name": "blocks.{}.mlp.hook_in", "hook_name_out": "blocks.{}.hook_mlp_out"}
    made = []
    for layer in range(11):
        place = {key: name.format(layer) for key, name in hooks.items()}
        tensors = sk.nn.build(config, seed=layer).state_dict()
        made.append(sk.formats.Weights(config, tensors, {"activations": place}))
    sk.formats.write_transcoder_set(hub.root / "set", made)
    for name in ("owner/repo", "owner/repo/set"):
        hub.asked.clear()
        sae = sk.load(name, layer=10, revision="v2")
        assert torch.equal(sae.W_enc, made[10].tensors["W_enc"])
        assert sae.metadata["activations"]["hook_name"] == "blocks.10.mlp.hook_in"
        assert hub.asked == ["set/config.yaml", "set/layer_10.safetensors"]
    hub.asked.clear()
    assert sk.load("owner/repo/set/layer_3.safetensors", revision="v2").config == config
    assert hub.asked == ["set/config.yaml", "set/layer_3.safetensors"]
    refuses(
        lambda: sk.load("owner/repo", revision="v2"),
        "a folder with 11 of them: set/layer_0.safetensors, set/layer_1.safetensors, ",
    )
    refuses(lambda: sk.load("owner/repo", layer=11, revision="v2"), "expected one of layer 11")


def test_of_a_cross_layer_transcoder_all_layers_are_downloaded(hub: Hub) -> None:
    config = nn.CrossLayerJumpReLUConfig(D, 3 * F, n_layers=3, d_out=D, log_threshold=False)
    place = {"hook_name": "hook_resid_mid", "hook_name_out": "hook_mlp_out"}
    tensors = {name: torch.ones(size) for name, size in config.shapes().items()}
    write_cross_layer(hub.root, config, tensors, {"activations": place})
    sae = sk.load("owner/repo", revision="v2")
    assert torch.equal(sae.W_dec, tensors["W_dec"])
    weights = [f"W_{kind}_{i}.safetensors" for kind in ("dec", "enc") for i in range(3)]
    assert hub.asked == ["config.yaml", *weights]


def test_a_checkpoint_of_dictionary_learning_in_a_repository(hub: Hub) -> None:
    MAKE["dictionary_learning"](hub.root / "trainer_0")
    (hub.root / "trainer_0" / "checkpoints").mkdir()
    file = "trainer_0/checkpoints/ae_100.pt"
    (hub.root / "trainer_0" / "ae.pt").rename(hub.root / file)
    sae = sk.load(f"owner/repo/{file}", revision="v2")
    assert isinstance(sae, sk.ReLUSAE)
    assert hub.asked == ["trainer_0/config.json", file]


def test_a_hub_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise OSError("no route to the host\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi", lambda: SimpleNamespace(model_info=offline))
    refuses(lambda: sk.load("owner/repo"), "owner/repo", "(no route to the host)")


@pytest.mark.parametrize("name", ["owner/repo", "owner/repo/layer_3"])
def test_a_hub_that_cannot_be_reached(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, and a port of this machine at which nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"^owner/repo: no such folder, and the .* hub did not"):
        sk.load(name)


def test_the_cache_is_read_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "hub"
    commit = "0" * 40
    saelens(cache / "models--owner--repo" / "snapshots" / commit / "layer_3")
    (cache / "models--owner--repo" / "refs").mkdir()
    (cache / "models--owner--repo" / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    for name in ("owner/repo", "owner/repo/layer_3"):
        assert isinstance(sk.load(name, local_files_only=True), sk.TopKSAE)
    refuses(lambda: sk.load("owner/repo/no", local_files_only=True), "owner/repo/no", "cache")
    refuses(lambda: sk.load("owner/other", local_files_only=True), "owner/other")
