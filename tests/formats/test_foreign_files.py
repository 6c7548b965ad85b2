"""Which format a folder has, files that are damaged on purpose, and writing that fails."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
import torch
from foreign import D, F, assert_weights, exact_tensors, refuses
from makers import MAKE, TOPK, dictionary_learning, gemma_scope, saelens, sparsify
from safetensors.torch import save_file

from sae_kernels import formats, nn
from sae_kernels.formats import detect, read, write_saelens
from sae_kernels.io import tensor_files
from sae_kernels.nn import (
    BatchTopKConfig,
    CrossLayerJumpReLUConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    SwitchConfig,
    TopKConfig,
)

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", MAKE)
def test_every_format_is_known_by_its_files(tmp_path: Path, name: str) -> None:
    MAKE[name](tmp_path / "sae")
    assert detect(tmp_path / "sae") == name
    direct = getattr(formats, f"read_{name}")(tmp_path / "sae")
    for came in (read(tmp_path / "sae"), read(str(tmp_path / "sae"), name)):
        assert_weights(came, direct.config, direct.tensors)
        assert came.metadata == direct.metadata


def test_single_files_are_known_too(tmp_path: Path) -> None:
    dictionary_learning(tmp_path)
    gemma_scope(tmp_path)
    assert detect(tmp_path / "ae.pt") == "dictionary_learning"
    assert detect(tmp_path / "params.npz") == "gemma_scope"
    assert read(tmp_path / "ae.pt").config == ReLUConfig(D, F)
    save_file({"x": torch.ones(1)}, tmp_path / "params.safetensors")
    assert detect(tmp_path / "params.safetensors") == "gemma_scope"


def test_what_is_no_saved_sae(tmp_path: Path) -> None:
    refuses(lambda: detect(tmp_path / "no"), str(tmp_path / "no"), "there is nothing")
    known = ["config.json and sae.safetensors (native)", "cfg.json and sae_weights.safetensors"]
    known += ["config.yaml and layer_*.safetensors (circuit_tracer)"]
    refuses(lambda: detect(tmp_path), str(tmp_path), "expected the files of a saved SAE", *known)
    (tmp_path / "cfg.json").write_text("{}")
    refuses(lambda: read(tmp_path), "expected the files of a saved SAE", *known)
    refuses(lambda: detect(tmp_path / "cfg.json"), "expected the files of a saved SAE")
    refuses(lambda: read(tmp_path, "sae_lens"), "'sae_lens'", "did you mean 'saelens'?")
    refuses(lambda: read(tmp_path, "saelens"), "sae_weights.safetensors: expected the file of a")


def test_the_files_of_two_formats(tmp_path: Path) -> None:
    saelens(tmp_path)
    (tmp_path / "cfg.json").unlink()
    sparsify(tmp_path)
    refuses(lambda: read(tmp_path), "got those of saelens and sparsify", "which format")
    assert read(tmp_path, "sparsify").config == TOPK


SAFE = [("saelens", "sae_weights.safetensors"), ("sparsify", "sae.safetensors")]


@pytest.mark.parametrize(("name", "file"), SAFE)
def test_every_truncation_is_noticed(tmp_path: Path, name: str, file: str) -> None:
    MAKE[name](tmp_path)
    whole = (tmp_path / file).read_bytes()
    cuts = [whole[: len(whole) * sixteenth // 16] for sixteenth in range(16)]
    for damaged in (*cuts, whole[:-1], whole + b"\0", b"\xff" * 100):
        (tmp_path / file).write_bytes(damaged)
        refuses(
            lambda: read(tmp_path, name), file, "expected a safetensors file, it cannot be read"
        )


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning"])
@pytest.mark.parametrize(
    "content",
    [b"[1, 2]", b"3", b"", b'{"d_in": 6, ', b"\xff\xfe\x00\x81", b"[" * 200_000],
    ids=repr,
)
def test_a_configuration_that_is_no_object(tmp_path: Path, name: str, content: bytes) -> None:
    MAKE[name](tmp_path)
    config = tmp_path / ("config.json" if name == "dictionary_learning" else "cfg.json")
    config.write_bytes(content)
    refuses(lambda: read(tmp_path, name), str(config), "expected a JSON object")


@pytest.mark.parametrize(("name", "file"), SAFE)
def test_tensors_that_a_file_should_not_hold(tmp_path: Path, name: str, file: str) -> None:
    tensors = exact_tensors(TOPK)
    theirs = {"saelens": "W_enc", "sparsify": "encoder.weight"}[name]
    for tensor, part in (
        (torch.ones(F + 1, D + 1), f"{theirs}: expected ["),
        (torch.ones(3), f"{theirs}: expected ["),
        (tensors["W_enc"].to(torch.float8_e4m3fn), "got torch.float8_e4m3fn"),
        (tensors["W_enc"].int(), "got torch.int32"),
        (tensors["W_enc"] / 0, "expected finite numbers"),
    ):
        MAKE[name](tmp_path)
        found = tensor_files.read_safetensors(tmp_path / file)
        fits = tensor.shape == tensors["W_enc"].shape and name == "saelens"
        save_file(found | {theirs: tensor.T.contiguous() if fits else tensor}, tmp_path / file)
        refuses(lambda: read(tmp_path, name), file, part)


ARCHITECTURES: list[SAEConfig] = [
    TopKConfig(D, F, k=2, n_layers=3),
    BatchTopKConfig(D, F, k=2, d_out=5, subtract_b_dec=False),
    JumpReLUConfig(D, F),
    JumpReLUConfig(D, F, log_threshold=False, skip=True, subtract_b_dec=False),
    ReLUConfig(D, F, d_out=5, skip=True, subtract_b_dec=False),
    GatedConfig(D, F),
    SwitchConfig(D, F, k=2, n_experts=4),
    SwitchConfig(D, F, k=2, n_experts=4, shared_expert=True, d_out=5, subtract_b_dec=False),
]


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: config.architecture)
def test_shapes_are_the_modules(config: SAEConfig) -> None:
    state = nn.build(config).state_dict()
    assert config.shapes() == {name: tuple(t.shape) for name, t in state.items()}


@pytest.mark.parametrize("name", ["saelens", "sparsify"])
@pytest.mark.parametrize("victim", ["weights", "config", "replace"])
def test_a_failed_write_leaves_the_old_files_and_no_litter(
    tmp_path: Path, name: str, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    MAKE[name](tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    module = {"saelens": "saelens_writer", "sparsify": "sparsify"}[name]
    target: Any = {
        "weights": (f"sae_kernels.formats.{module}.save_file",),
        "config": ("pathlib.Path.write_text",),
        "replace": (os, "replace"),
    }[victim]
    monkeypatch.setattr(*target, full)
    with pytest.raises(OSError, match="No space left"):
        MAKE[name](tmp_path)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_reading_and_writing_over_the_same_folder(tmp_path: Path) -> None:
    """The tensors that were read do not change under their reader."""
    saelens(tmp_path)
    came = read(tmp_path)
    write_saelens(tmp_path, came.config, {n: t + 1 for n, t in came.tensors.items()})
    expected = exact_tensors(TOPK)
    assert all(torch.equal(came.tensors[n], expected[n]) for n in expected)
    assert torch.equal(read(tmp_path).tensors["b_enc"], expected["b_enc"] + 1)


@pytest.mark.parametrize("name", ["saelens", "sparsify"])
def test_weights_of_several_dtypes_are_written_in_the_widest(tmp_path: Path, name: str) -> None:
    tensors = exact_tensors(TOPK)
    half = tensors | {"W_enc": tensors["W_enc"].bfloat16(), "b_enc": tensors["b_enc"].half()}
    getattr(formats, f"write_{name}")(tmp_path, TOPK, half)
    came = read(tmp_path).tensors
    assert {t.dtype for t in came.values()} == {torch.float32}
    assert all(torch.equal(came[n], tensors[n]) for n in tensors)


@pytest.mark.parametrize("to", [name for name, format in formats.FORMATS.items() if format.write])
def test_write_makes_the_format_that_is_named(tmp_path: Path, to: str) -> None:
    config: SAEConfig = TOPK
    if to == "circuit_tracer":
        config = ReLUConfig(D, F, d_out=D, subtract_b_dec=False)
    tensors = exact_tensors(config)
    if to == "circuit_tracer_clt":
        config = CrossLayerJumpReLUConfig(D, 3 * F, n_layers=3, d_out=D, log_threshold=False)
        tensors = {name: torch.rand(size) for name, size in config.shapes().items()}
    place = {"hook_name": "blocks.3.hook_resid_mid", "hook_name_out": "blocks.3.hook_mlp_out"}
    weights = formats.Weights(config, tensors, {"activations": place})
    formats.write(tmp_path / "sae", weights, to)
    assert detect(tmp_path / "sae") == to
    came = read(tmp_path / "sae").tensors
    assert all(torch.equal(came[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("to", ["gemma_scope", "sparsfy", ""])
def test_a_format_that_is_not_written(tmp_path: Path, to: str) -> None:
    weights = formats.Weights(TOPK, exact_tensors(TOPK), {})
    refuses(lambda: formats.write(tmp_path / "sae", weights, to), f"to: got {to!r}")
    assert not (tmp_path / "sae").exists()
