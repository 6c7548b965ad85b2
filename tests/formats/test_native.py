"""The package's own files: exact round trips, and one clear line for whatever is wrong."""

from __future__ import annotations

import json
import os
import pickle
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_kernels.errors import DataError
from sae_kernels.nn import TopKConfig, TopKSAE, pretrained
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

D, F, K = 6, 20, 3


def _sae(**options: Any) -> TopKSAE:
    sae = TopKSAE(TopKConfig(D, F, K, **options), seed=1)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in sae.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return sae


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _sae().save_pretrained(tmp_path / "sae")
    return tmp_path / "sae"


def _fails(folder: Path | str, *parts: str, **options: Any) -> None:
    """Loading raises one line that holds every part."""
    with pytest.raises(DataError) as error:
        TopKSAE.from_pretrained(folder, **options)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_round_trip_is_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    sae = _sae(relu="none", subtract_b_dec=False, rank_by_decoder_norm=True).to(dtype)
    sae.save_pretrained(tmp_path / "a" / "b")
    again = TopKSAE.from_pretrained(tmp_path / "a" / "b")
    assert again.config == sae.config
    for name, tensor in sae.state_dict().items():
        assert_bitwise(name, again.state_dict()[name], tensor)
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "README.md",
        "config.json",
        "sae.safetensors",
    ]


def test_a_loaded_sae_trains_and_owns_its_memory(folder: Path) -> None:
    sae = TopKSAE.from_pretrained(folder)
    assert all(p.requires_grad and p.is_leaf for p in sae.parameters())
    x = torch.randn(5, D)
    (sae(x).x_hat - x).square().sum().backward()
    with torch.no_grad():
        for p in sae.parameters():
            p -= 0.1 * p.grad
    again = TopKSAE.from_pretrained(folder)
    assert (again.W_enc != sae.W_enc).any()
    assert_bitwise("file", again.W_dec.data, _sae().W_dec.data)


def test_the_activation_scale_is_folded_into_what_is_saved(tmp_path: Path) -> None:
    sae = _sae(activation_scale=5.0)
    sae.save_pretrained(tmp_path)
    again, x = TopKSAE.from_pretrained(tmp_path), torch.randn(50, D)
    assert again.config.activation_scale == 1.0
    for name in ("W_enc", "W_dec"):
        assert_bitwise(name, getattr(again, name).data, getattr(sae, name).data)
    for name in ("b_enc", "b_dec"):
        assert_bitwise(name, getattr(again, name).data, getattr(sae, name).data / 5)
    (a, codes_a), (b, codes_b) = sae(x), again(x)
    assert torch.equal(codes_a.indices, codes_b.indices)
    # D + K terms of order one, each rounded; as in the tests of folded().
    torch.testing.assert_close(a, b, rtol=0, atol=(D + K + 10) * 2.0**-24 * 20)
    assert sae.config.activation_scale == 5.0, "saving must not change what is saved"


def test_config_is_readable_json_with_the_version(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    assert values.pop("sae_kernels_version")
    assert values.pop("architecture") == "topk"
    assert TopKConfig.from_dict(values) == _sae().config


@pytest.mark.parametrize("name", ["config.json", "sae.safetensors"])
def test_a_missing_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    _fails(folder, str(folder / name), "expected the file of a saved SAE", "sae_kernels.load")


def test_every_truncation_is_noticed(folder: Path) -> None:
    path = folder / "sae.safetensors"
    whole = path.read_bytes()
    for sixteenth in range(16):
        path.write_bytes(whole[: len(whole) * sixteenth // 16])
        _fails(folder, str(path), "expected a safetensors file, it cannot be read")
    path.write_bytes(whole[:-1])
    _fails(folder, "cannot be read")
    path.write_bytes(whole + b"\0")
    _fails(folder, "cannot be read")


def test_a_flipped_bit_in_the_header_is_an_error_or_the_same_weights(folder: Path) -> None:
    """Only what the header says is covered: safetensors has no checksum of the numbers."""
    path = folder / "sae.safetensors"
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    refusals = []
    for position in range(end):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        try:
            sae = TopKSAE.from_pretrained(folder)
        except DataError as error:
            refusals.append(str(error))
        else:
            shapes = [list(p.shape) for p in sae.parameters()]
            assert shapes == [list(p.shape) for p in _sae().parameters()]
    assert len(refusals) > 0.8 * end
    assert not any("\n" in message for message in refusals)


class _Bomb:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("writer", ["pickle", "torch.save"])
def test_a_pickle_is_refused_and_not_run(folder: Path, tmp_path: Path, writer: str) -> None:
    path, target = folder / "sae.safetensors", tmp_path / "ran"
    bomb = {"W_enc": _Bomb(str(target))}
    if writer == "pickle":
        path.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, path)
    _fails(folder, "expected a safetensors file, it cannot be read")
    assert not target.exists()


def _set(name: str, value: Any) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda weights: weights.__setitem__(name, value)


DAMAGE: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], list[str]]] = {
    "transposed": (
        lambda w: w.update(W_enc=w["W_enc"].T.contiguous()),
        ["expected tensors", "'W_enc': [20, 6]", "got", "'W_enc': [6, 20]"],
    ),
    "tensor-missing": (lambda w: w.pop("b_enc"), ["expected tensors", "'b_enc': [20]"]),
    "tensor-too-many": (_set("extra", torch.zeros(2)), ["got", "'extra': [2]"]),
    "no-tensors": (dict.clear, ["got {}"]),
    "nan": (lambda w: w["W_dec"][7].fill_(torch.nan), ["finite", "W_dec holds NaN or infinity"]),
    "inf": (lambda w: w["b_dec"][5:].fill_(-torch.inf), ["finite", "b_dec holds NaN"]),
    "integers": (
        lambda w: w.update({name: t.int() for name, t in w.items()}),
        ["expected weights of one floating point dtype, got torch.int32"],
    ),
    "mixed-dtypes": (
        lambda w: w.update(b_enc=w["b_enc"].half()),
        ["expected weights of one floating point dtype, got torch.float16, torch.float32"],
    ),
    "float8": (
        lambda w: w.update({name: t.to(torch.float8_e4m3fn) for name, t in w.items()}),
        ["expected weights of one floating point dtype, got torch.float8_e4m3fn"],
    ),
}


@pytest.mark.parametrize(("damage", "parts"), DAMAGE.values(), ids=DAMAGE)
def test_wrong_weights(folder: Path, damage: Callable[..., Any], parts: list[str]) -> None:
    path = folder / "sae.safetensors"
    weights = {name: t.clone() for name, t in load_file(path).items()}
    damage(weights)
    save_file(weights, path)
    _fails(folder, str(path), *parts)


CONFIGS: dict[str, tuple[Any, list[str]]] = {
    "unknown-key": ({"n_latent": 20}, ["unknown key 'n_latent'", "did you mean 'n_latents'?"]),
    "architecture": (
        {"architecture": "gate"},
        ["expected one of topk, ", "gated", "got 'gate'", "sae_kernels.nn.register"],
    ),
    "no-architecture": ({"architecture": None}, ["expected one of topk, ", "got None"]),
    "k-too-large": ({"k": 21}, ["k: expected at most n_latents = 20, got 21"]),
    "k-a-string": ({"k": "3"}, ["k: expected a positive integer, got '3'"]),
    "scale-a-string": ({"activation_scale": "1"}, ["activation_scale: expected a positive"]),
    "nan-scale": ({"activation_scale": float("nan")}, ["activation_scale: expected a positive"]),
    "other-shape": ({"d_in": 7}, ["expected tensors", "[20, 7]", "[20, 6]"]),
    "absurd-shape": ({"n_latents": 2**62}, ["expected tensors", "[20, 6]"]),
    "beyond-int64": ({"n_latents": 10**40}, ["n_latents: expected a number of at most 63 bits"]),
    "a-list": ([1, 2], ["expected a JSON object, got list"]),
    "a-number": (3, ["expected a JSON object, got int"]),
    "empty": ("", ["expected a JSON object"]),
    "half": ('{"d_in": 6, ', ["expected a JSON object"]),
    "not-text": (b"\xff\xfe\x00\x81", ["expected a JSON object"]),
    "bottomless": ("[" * 200_000, ["expected a JSON object"]),
    "yaml": ("d_in: 6\n", ["expected a JSON object"]),
}


@pytest.mark.parametrize(("content", "parts"), CONFIGS.values(), ids=CONFIGS)
def test_wrong_configs(folder: Path, content: Any, parts: list[str]) -> None:
    path = folder / "config.json"
    if isinstance(content, dict):
        content = json.dumps({**json.loads(path.read_text()), **content})
    elif not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    _fails(folder, str(folder), *parts)


def test_a_missing_key(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    del values["d_in"]
    path.write_text(json.dumps(values))
    _fails(folder, "expected the key 'd_in', it is not there")


def test_a_name_that_is_neither_folder_nor_hub(tmp_path: Path) -> None:
    for name in (str(tmp_path / "nowhere"), "./nowhere", "nowhere", "a/b/c"):
        _fails(name, name, "expected a folder with a saved SAE or a hub name owner/repo")
    (tmp_path / "file").write_text("x")
    _fails(tmp_path / "file", "expected a folder with a saved SAE")


@pytest.mark.parametrize("name", ["nobody-at-all/nothing", "bad owner/re--po", "x/.."])
def test_a_hub_name_that_cannot_be_had(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    _fails(
        name,
        name,
        "no such folder, and the Hugging Face hub did not give it",
        local_files_only=True,
    )


def test_the_hub_cache_is_read_offline(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A repository as huggingface_hub leaves it on disk."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--repo" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    (cache / "models--owner--repo" / "refs").mkdir()
    (cache / "models--owner--repo" / "refs" / "main").write_text("0" * 40)
    folder.rename(snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    sae = TopKSAE.from_pretrained("owner/repo", local_files_only=True)
    assert_bitwise("W_dec", sae.W_dec.data, _sae().W_dec.data)
    _fails("owner/repo", "owner/repo", revision="v2", local_files_only=True)


@pytest.mark.parametrize("victim", ["weights", "config", "replace"])
def test_a_failed_save_leaves_the_old_files_and_no_litter(
    folder: Path, victim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    target = {
        "weights": (pretrained, "save_file"),
        "config": (json, "dumps"),
        "replace": (os, "replace"),
    }
    monkeypatch.setattr(*target[victim], full)
    with pytest.raises(OSError, match="No space left"):
        TopKSAE(TopKConfig(3, 8, 2)).save_pretrained(folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_saving_over_an_older_sae_replaces_it(folder: Path) -> None:
    TopKSAE(TopKConfig(3, 8, 2)).save_pretrained(folder)
    assert TopKSAE.from_pretrained(folder).config == TopKConfig(3, 8, 2)
    assert len(list(folder.iterdir())) == 3


def test_saving_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OSError, match=re.escape("taken")):
        _sae().save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"
