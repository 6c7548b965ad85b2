"""Gemma Scope's files, made as they are laid out: our formula on what we read is its own."""

from __future__ import annotations

import io
import json
import os
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from foreign import F64, D, F, assert_same, exact_tensors, formula, refuses, tokens, wide
from safetensors.torch import save_file

from sae_kernels import nn
from sae_kernels.formats import read_gemma_scope
from sae_kernels.nn import JumpReLUConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

RAW: dict[str, Any] = {"subtract_b_dec": False, "log_threshold": False}
CONFIG = JumpReLUConfig(D, F, **RAW)


def their_formula(p: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """x @ W_enc + b_enc, gated and decoded on their own layout, in fp64."""
    p = {name.lower(): t for name, t in wide(p).items()}
    h = x @ p["w_enc"] + p["b_enc"]
    codes = (h > p["threshold"]) * h.relu()
    y = codes @ p["w_dec"] + p["b_dec"]
    skip = p.get("affine_skip_connection")
    return codes, y if skip is None else y + x @ skip


def params(config: JumpReLUConfig = CONFIG, w: str = "W") -> dict[str, Tensor]:
    t = exact_tensors(config)
    params = {
        f"{w}_enc": t["W_enc"].T.contiguous(),
        f"{w}_dec": t["W_dec"],
        "b_enc": t["b_enc"],
        "b_dec": t["b_dec"],
        "threshold": t["threshold"],
    }
    return params | ({"affine_skip_connection": t["W_skip"].T.contiguous()} if config.skip else {})


def save_npz(folder: Path, tensors: dict[str, Any]) -> Path:
    np.savez(folder / "params.npz", **{name: np.asarray(t) for name, t in tensors.items()})
    return folder / "params.npz"


def save_2(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    save_file(tensors, folder / "params.safetensors")
    values = {"architecture": "jump_relu", "model_name": "gemma-v3-4b-pt"} | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def check(came: Any, config: JumpReLUConfig, theirs: Any) -> None:
    assert came.config == config
    x = tokens(config)
    expected = their_formula(theirs, x)
    assert_same(config, x, came.tensors, formula(config, came.tensors, x), expected)
    out = nn.from_weights(came.config, came.tensors)(x.float())
    assert torch.equal(out.codes.to_dense().to(F64), expected[0])
    assert torch.equal(out.x_hat.to(F64), expected[1])


@pytest.mark.parametrize("w", ["W", "w"])
def test_the_first_version(tmp_path: Path, w: str) -> None:
    path = save_npz(tmp_path, params(w=w))
    check(read_gemma_scope(tmp_path), CONFIG, params())
    check(read_gemma_scope(path), CONFIG, params())


def test_a_transcoder_of_two_widths(tmp_path: Path) -> None:
    config = JumpReLUConfig(D, F, d_out=9, **RAW)
    save_npz(tmp_path, params(config))
    check(read_gemma_scope(tmp_path), config, params(config))


@pytest.mark.parametrize("dtype", [">f4", "<f4", "f2", "f8"])
def test_numbers_of_any_size_and_byte_order(tmp_path: Path, dtype: str) -> None:
    save_npz(tmp_path, {n: np.asarray(t).astype(dtype) for n, t in params().items()})
    came = read_gemma_scope(tmp_path)
    kinds = {">f4": torch.float32, "<f4": torch.float32, "f2": torch.float16, "f8": F64}
    assert came.tensors["W_enc"].dtype == kinds[dtype]
    assert came.tensors["threshold"].dtype == torch.float32
    assert torch.equal(came.tensors["W_dec"].float(), params()["W_dec"])


def test_scaling_factors_of_one_say_nothing(tmp_path: Path) -> None:
    save_npz(tmp_path, params() | {"scaling_factor": np.ones(F, "f4")})
    check(read_gemma_scope(tmp_path), CONFIG, params())
    save_npz(tmp_path, params() | {"scaling_factor": np.full(F, 2, "f4")})
    refuses(lambda: read_gemma_scope(tmp_path), "scaling_factor: expected ones, got others")


def test_the_second_version(tmp_path: Path) -> None:
    point = "model.layers.9.output"
    folder = save_2(tmp_path, params(w="w"), hf_hook_point_in=point, hf_hook_point_out=point)
    came = read_gemma_scope(folder)
    check(came, CONFIG, params())
    hooks = {"hf_hook_point_in": point, "hf_hook_point_out": point}
    assert came.metadata == {
        "activations": {"model": "gemma-v3-4b-pt", "layer": point},
        "gemma_scope": {"model_name": "gemma-v3-4b-pt", **hooks},
    }
    (tmp_path / "config.json").unlink()
    check(read_gemma_scope(folder / "params.safetensors"), CONFIG, params())


def test_the_second_version_s_transcoders(tmp_path: Path) -> None:
    hooks = {"hf_hook_point_in": "a", "hf_hook_point_out": "b"}
    config = JumpReLUConfig(D, F, d_out=D, **RAW)
    check(read_gemma_scope(save_2(tmp_path, params(w="w"), **hooks)), config, params())
    config = JumpReLUConfig(D, F, d_out=9, skip=True, **RAW)
    skip = params(config, "w")
    check(read_gemma_scope(save_2(tmp_path, skip, **hooks)), config, skip)


def test_a_negative_threshold_is_zero_under_their_relu(tmp_path: Path) -> None:
    changed = params() | {"threshold": torch.linspace(-200, 300, F)}
    save_npz(tmp_path, changed)
    check(read_gemma_scope(tmp_path), CONFIG, changed)


# -- refusals --------------------------------------------------------------------------------------


def _without(name: str) -> dict[str, Tensor]:
    return {n: t for n, t in params().items() if n != name}


ARRAYS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no-encoder": (_without("W_enc"), ["expected a tensor W_enc [d_in, n_latents], got W_dec"]),
    "no-threshold": (_without("threshold"), ["expected a tensor threshold [16], got W_dec"]),
    "nothing": ({}, ["expected a tensor W_enc"]),
    "a-vector": (params() | {"W_dec": torch.ones(3)}, ["W_dec [n_latents, d_out], got [3]"]),
    "all-layers": (
        params() | {"W_dec": torch.ones(F, 3, D)},
        ["expected a tensor W_dec [n_latents, d_out], got [16, 3, 6]"],
    ),
    "lying": (params() | {"W_dec": torch.ones(17, D)}, ["W_dec: expected [16, 6], got [17, 6]"]),
    "bias": (params() | {"b_enc": torch.ones(D)}, ["b_enc: expected [16], got [6]"]),
    "both-cases": (params() | params(w="w"), ["got 'W_enc' too"]),
    "no-latents": (params() | {"W_enc": torch.ones(D, 0)}, ["n_latents: expected a positive"]),
    "nan": (params() | {"b_dec": torch.full((D,), torch.nan)}, ["b_dec: expected finite numbers"]),
    "integers": (params() | {"b_dec": torch.ones(D).int()}, ["b_dec: expected one of", "int32"]),
    "text": (params() | {"b_dec": np.array(["a"] * D)}, ["expected an .npz file of numbers"]),
}


@pytest.mark.parametrize(("arrays", "parts"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_are_refused(tmp_path: Path, arrays: dict[str, Any], parts: list[str]) -> None:
    save_npz(tmp_path, arrays)
    refuses(lambda: read_gemma_scope(tmp_path), "params.npz", *parts)


class _Bomb:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.target,)


def test_an_array_of_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    target = tmp_path / "ran"
    bomb = np.array([_Bomb(str(target))] * F, dtype=object)
    save_npz(tmp_path, params())
    np.savez(tmp_path / "params.npz", **_numpy(params() | {"threshold": bomb}))
    refuses(lambda: read_gemma_scope(tmp_path), "params.npz: expected an .npz file of numbers")
    (tmp_path / "params.npz").write_bytes(bomb.dumps())
    refuses(lambda: read_gemma_scope(tmp_path), "params.npz: expected an .npz file of numbers")
    assert not target.exists()


def _numpy(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(array) for name, array in arrays.items()}


def test_a_header_that_claims_more_than_there_is(tmp_path: Path) -> None:
    """An array of 16 numbers that says it has 10^13."""
    array = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        array, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**6)}
    )
    with zipfile.ZipFile(tmp_path / "params.npz", "w") as file:
        file.writestr("W_enc.npy", array.getvalue() + bytes(64))
    refuses(lambda: read_gemma_scope(tmp_path), "params.npz: expected an .npz file of numbers")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    path = save_npz(tmp_path, params())
    whole = path.read_bytes()
    for sixteenth in range(16):
        path.write_bytes(whole[: len(whole) * sixteenth // 16])
        refuses(lambda: read_gemma_scope(path), "params.npz: expected an .npz file of numbers")


def test_a_plain_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "params.npz")
    refuses(lambda: read_gemma_scope(tmp_path), "params.npz: expected an .npz file of numbers")


def test_folders_that_are_refused(tmp_path: Path) -> None:
    refuses(lambda: read_gemma_scope(tmp_path), "params.npz and params.safetensors", "neither")
    refuses(lambda: read_gemma_scope(tmp_path / "no.npz"), "no.npz: expected the file of a saved")
    save_2(tmp_path, params(w="w"), architecture="topk")
    refuses(lambda: read_gemma_scope(tmp_path), "architecture: expected 'jump_relu', got 'topk'")
    save_npz(tmp_path, params())
    refuses(lambda: read_gemma_scope(tmp_path), "got both; name the file")
