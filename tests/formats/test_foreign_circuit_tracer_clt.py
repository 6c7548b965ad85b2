"""circuit-tracer's cross-layer transcoders: their files both ways, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from foreign import refuses
from safetensors.torch import load_file, save_file

import sae_kernels as sk
from sae_kernels.formats import (
    LazyCrossLayer,
    detect,
    read,
    read_cross_layer,
    write,
    write_cross_layer,
)
from sae_kernels.formats.circuit_tracer_clt import DECODER_FILE as DECODER
from sae_kernels.formats.circuit_tracer_clt import stored_decoders
from sae_kernels.nn import (
    CrossLayerBatchTopK,
    CrossLayerJumpReLU,
    CrossLayerJumpReLUConfig,
    CrossLayerTopK,
    JumpReLUConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable

L, D, F = 3, 4, 6
HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
PLACE = {"model": "gpt2", "hook_name": "blocks.5.hook_resid_mid", "hook_name_out": "hook_mlp_out"}
SHAPE: dict[str, Any] = {"n_layers": L, "d_out": D}


def theirs(folder: Path, jumps: bool = True, **config: Any) -> dict[str, torch.Tensor]:
    """Files as circuit-tracer lays them out; all their tensors."""
    folder.mkdir(exist_ok=True)
    settings = {"model_kind": "cross_layer_transcoder", "model_name": "gpt2", "extra": 1, **HOOKS}
    (folder / "config.yaml").write_text(json.dumps({**settings, **config}))
    g = torch.Generator().manual_seed(0)
    every = {}
    for i in range(L):
        sizes = {"W_enc": (F, D), "b_enc": (F,), "b_dec": (D,)}
        sizes |= {"threshold": (F,)} if jumps else {}
        own = {f"{name}_{i}": torch.randn(size, generator=g) for name, size in sizes.items()}
        rows = {f"W_dec_{i}": torch.randn(F, L - i, D, generator=g)}
        save_file(own, folder / f"W_enc_{i}.safetensors")
        save_file(rows, folder / f"W_dec_{i}.safetensors")
        every |= own | rows
    return every


def formula(t: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """CrossLayerTranscoder of circuit_tracer 0.5.0 in fp64, [B, L, D] in and out."""
    t, x = {name: tensor.double() for name, tensor in t.items()}, x.double()
    y = torch.stack([t[f"b_dec_{i}"] for i in range(L)]).expand(len(x), L, D).clone()
    for i in range(L):
        h = x[:, i] @ t[f"W_enc_{i}"].T + t[f"b_enc_{i}"]
        codes = h * (h > t[f"threshold_{i}"]) if f"threshold_{i}" in t else h.relu()
        y[:, i:] += torch.einsum("bf,fld->bld", codes, t[f"W_dec_{i}"])
    return y


@pytest.mark.parametrize("jumps", [True, False])
def test_their_files_are_their_function(tmp_path: Path, jumps: bool) -> None:
    tensors = theirs(tmp_path, jumps)
    assert detect(tmp_path) == detect(tmp_path / "W_enc_1.safetensors") == "circuit_tracer_clt"
    clt = sk.load(tmp_path)
    assert isinstance(clt, CrossLayerJumpReLU)
    x = torch.randn(50, L * D)
    y = formula(tensors, x.view(50, L, D)).flatten(1)
    torch.testing.assert_close(clt(x).x_hat.double(), y, rtol=1e-5, atol=1e-5)
    assert clt.metadata["activations"] == {"model": "gpt2", "hook_name": "hook_resid_mid"} | {
        "hook_name_out": "hook_mlp_out"
    }
    assert clt.metadata["circuit_tracer_clt"]["extra"] == 1


def test_read_and_written_again_they_are_the_same(tmp_path: Path) -> None:
    tensors = theirs(tmp_path / "first")
    write(tmp_path / "again", read(tmp_path / "first"), "circuit_tracer_clt")
    for i in range(L):
        for kind in ("enc", "dec"):
            for name, tensor in load_file(tmp_path / f"again/W_{kind}_{i}.safetensors").items():
                assert torch.equal(tensor, tensors[name]), name
    again = (tmp_path / "again" / "config.yaml").read_text()
    for part in ("cross_layer_transcoder", "gpt2", "extra: 1", "hook_resid_mid", "hook_mlp_out"):
        assert part in again


@pytest.mark.parametrize(
    "make",
    [
        lambda: CrossLayerJumpReLU(D, L * F, threshold_init=0.4, **SHAPE),
        lambda: CrossLayerBatchTopK(D, L * F, k=2, **SHAPE),
        lambda: CrossLayerBatchTopK(D, L * F, k=2, rank_by_decoder_norm=True, **SHAPE),
        lambda: CrossLayerBatchTopK(D, L * F, k=2, layers_together=False, **SHAPE),
    ],
)
def test_ours_are_the_same_function_there(tmp_path: Path, make: Callable[[], Any]) -> None:
    clt, g = make().eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (clt.W_enc, clt.W_dec, clt.b_enc, clt.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    if hasattr(clt, "threshold") and isinstance(clt, CrossLayerBatchTopK):
        clt.threshold.fill_(0.7).add_(torch.rand(clt.threshold.shape, generator=g))
    write_cross_layer(tmp_path, clt.config, clt.state_dict(), {"activations": PLACE})
    x = torch.randn(50, L * D, generator=g)
    expected = clt(x)
    assert 0 < expected.codes.values.numel() < 50 * L * F
    torch.testing.assert_close(sk.load(tmp_path)(x).x_hat, expected.x_hat)


def test_ours_are_for_raw_activations(tmp_path: Path) -> None:
    clt = CrossLayerJumpReLU(D, L * F, activation_scale=0.5, threshold_init=0.1, **SHAPE).eval()
    weights = sk.formats.Weights(clt.config, clt.state_dict(), {"activations": PLACE})
    write(tmp_path, weights, "circuit_tracer_clt")
    x = torch.randn(20, L * D)
    torch.testing.assert_close(sk.load(tmp_path)(x).x_hat, clt(x).x_hat)


def test_rows_are_read_from_the_files_on_demand(tmp_path: Path) -> None:
    theirs(tmp_path)
    whole: Any = sk.load(tmp_path)
    lazy = LazyCrossLayer(tmp_path)
    x = torch.randn(50, L * D)
    codes = lazy.encode(x)
    assert "W_dec" not in lazy.state_dict()
    assert torch.equal(codes.to_dense(), whole.encode(x).to_dense())
    torch.testing.assert_close(lazy(x).x_hat, whole(x).x_hat)
    torch.testing.assert_close(lazy(x.view(5, 10, -1)).x_hat, whole(x.view(5, 10, -1)).x_hat)
    assert torch.equal(lazy.W_dec, whole.W_dec)
    assert torch.equal(lazy.folded().W_dec, whole.W_dec)
    lazy.save_pretrained(tmp_path / "copy")
    torch.testing.assert_close(sk.load(tmp_path / "copy")(x).x_hat, whole(x).x_hat)
    prompt = x.view(50, L, D).transpose(0, 1)
    (features, rows), (expected, their_rows) = (s.encode_sparse(prompt) for s in (lazy, whole))
    assert torch.equal(features.to_dense(), expected.to_dense())
    assert torch.equal(rows, their_rows)
    torch.testing.assert_close(lazy.decode_sparse(features), whole.decode_sparse(expected))


def test_rows_on_demand_are_checked_as_far_as_they_are_not_read(tmp_path: Path) -> None:
    theirs(tmp_path)
    save_file({"W_dec_2": torch.zeros(F, 1, D, dtype=torch.int32)}, tmp_path / DECODER.format(2))
    refuses(lambda: LazyCrossLayer(tmp_path), "W_dec_2: expected one of", "got torch.int32")
    (tmp_path / DECODER.format(2)).unlink()
    refuses(lambda: LazyCrossLayer(tmp_path), "expected W_dec_2.safetensors, as of every layer")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_rows_that_are_not_asked_for_take_no_memory(tmp_path: Path) -> None:
    clt = CrossLayerJumpReLU(64, 4 * 8000, n_layers=4, d_out=64).eval()
    write_cross_layer(tmp_path, clt.config, clt.state_dict(), {"activations": PLACE})
    size = clt.W_dec.nbytes

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    decoders = stored_decoders(tmp_path)
    assert sum(rows.nbytes for rows in decoders) == size
    assert decoders[0][[5, 7999]].shape == (2, 4, 64)
    assert resident() - before < size / 10
    assert decoders[0].sum() != 0  # reads them
    assert resident() - before > size / 3


BROKEN: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "an encoder is missing": (
        lambda f: (f / "W_enc_1.safetensors").unlink(),
        ("expected W_enc_1.safetensors, as of every layer from 0 to 2; it is not there",),
    ),
    "a decoder is missing": (
        lambda f: (f / "W_dec_1.safetensors").unlink(),
        ("expected W_dec_1.safetensors, as of every layer from 0 to 2; it is not there",),
    ),
    "the last layer is missing": (
        lambda f: [(f / f"W_{kind}_2.safetensors").unlink() for kind in ("enc", "dec")],
        ("W_dec_0.safetensors: expected the files of 3 layers, as W_dec_0 [6, 3, 4] says, got",),
    ),
    "a layer is wider": (
        lambda f: save_file({"W_dec_1": torch.zeros(F, L - 1, D + 1)}, f / "W_dec_1.safetensors"),
        ("W_dec_1: expected [6, 2, 4], got [6, 2, 5]",),
    ),
    "a layer has more latents": (
        lambda f: _replaced(f, 2, W_enc_2=torch.zeros(F + 1, D)),
        ("W_enc_2: expected [6, 4], got [7, 4]",),
    ),
    "a layer without thresholds": (
        lambda f: _replaced(f, 1, threshold_1=None),
        ("W_enc_1.safetensors: expected a tensor threshold_1 [6]",),
    ),
    "a layer of another dtype": (
        lambda f: _replaced(f, 1, W_enc_1=torch.zeros(F, D, dtype=torch.bfloat16)),
        ("expected one dtype, got torch.float32 and torch.bfloat16 in W_enc",),
    ),
    "no number": (
        lambda f: _replaced(f, 1, b_enc_1=torch.full((F,), torch.nan)),
        ("b_enc_1: expected finite numbers",),
    ),
    "a skip connection": (
        lambda f: _replaced(f, 0, W_skip_0=torch.zeros(D, D)),
        ("got 'W_skip_0' too",),
    ),
    "another kind": (
        lambda f: (f / "config.yaml").write_text("model_kind: transcoder_set"),
        ("expected model_kind cross_layer_transcoder, got 'transcoder_set'",),
    ),
    "no tensor": (
        lambda f: save_file({"x": torch.zeros(1)}, f / "W_enc_0.safetensors"),
        ("W_enc_0.safetensors: expected a tensor W_enc_0 [F, D], got []",),
    ),
    "a damaged file": (
        lambda f: (f / "W_dec_2.safetensors").write_bytes(b"no safetensors"),
        ("W_dec_2.safetensors: expected a safetensors file",),
    ),
}


def _replaced(folder: Path, layer: int, **tensors: torch.Tensor | None) -> None:
    path = folder / f"W_enc_{layer}.safetensors"
    own = load_file(path) | tensors
    save_file({name: tensor for name, tensor in own.items() if tensor is not None}, path)


@pytest.mark.parametrize(("damage", "parts"), BROKEN.values(), ids=BROKEN)
def test_files_that_are_refused(
    tmp_path: Path, damage: Callable[[Path], object], parts: tuple[str, ...]
) -> None:
    theirs(tmp_path)
    damage(tmp_path)
    refuses(lambda: read_cross_layer(tmp_path), *parts)


@pytest.mark.parametrize(
    ("make", "place", "message"),
    [
        (lambda: CrossLayerTopK(D, L * F, k=2, **SHAPE), PLACE, "expected JumpReLU or BatchTopK"),
        (lambda: CrossLayerJumpReLU(D, L * F, n_layers=L), PLACE, "expected d_out = d_in = 4"),
        (
            lambda: CrossLayerJumpReLU(D, 12, causality="strict", **SHAPE),
            PLACE,
            "expected causality weak, got strict",
        ),
        (
            lambda: CrossLayerJumpReLU(D, L * F, target_scale=2.0, **SHAPE),
            PLACE,
            "expected target_scale 1",
        ),
        (
            lambda: CrossLayerJumpReLU(D, L * F, **SHAPE),
            {},
            "feature_input_hook: expected a hook as hook_resid_mid, got None; .* --hook-name",
        ),
    ],
)
def test_what_their_files_cannot_hold(
    tmp_path: Path, make: Callable[[], Any], place: dict[str, Any], message: str
) -> None:
    clt = make()
    with pytest.raises(ValueError, match=message):
        write_cross_layer(tmp_path, clt.config, clt.state_dict(), {"activations": place})
    assert not [*tmp_path.iterdir()]


def test_other_saes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a cross-layer transcoder, got a JumpReLUConfig"):
        write_cross_layer(tmp_path, JumpReLUConfig(D, F), {}, {"activations": PLACE})
    clt = CrossLayerJumpReLU(D, L * F, **SHAPE)
    place = {"hook_name": "blocks.0.hook_in", "hook_name_out": "blocks.0.hook_out"}
    weights = sk.formats.Weights(clt.config, clt.state_dict(), {"activations": place})
    for name in ("saelens", "sparsify", "dictionary_learning", "circuit_tracer"):
        with pytest.raises(ValueError, match="expected n_layers 1, got 3"):
            write(tmp_path, weights, name)


@pytest.mark.parametrize("lazy", [False, True])
def test_circuit_tracer_itself_agrees(tmp_path: Path, lazy: bool) -> None:
    theirs_module = pytest.importorskip(
        "circuit_tracer.transcoder.cross_layer_transcoder", reason="needs circuit-tracer"
    )
    config = CrossLayerJumpReLUConfig(D, L * F, threshold_init=0.4, **SHAPE)
    clt, g = CrossLayerJumpReLU(config).eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (clt.W_enc, clt.W_dec, clt.b_enc, clt.b_dec):
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    write_cross_layer(tmp_path / "ours", config, clt.state_dict(), {"activations": PLACE})
    made = theirs_module.load_clt(
        str(tmp_path / "ours"), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=lazy
    )
    x = torch.randn(50, L * D, generator=g)
    with torch.no_grad():
        y = made(x.view(50, L, D).transpose(0, 1)).transpose(0, 1).flatten(1)
    torch.testing.assert_close(clt(x).x_hat, y, rtol=1e-5, atol=1e-5)
    made.to_safetensors(str(tmp_path / "again"))
    (tmp_path / "ours" / "config.yaml").rename(tmp_path / "again" / "config.yaml")
    again = read_cross_layer(tmp_path / "again").tensors
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.equal(again[name], clt.state_dict()[name])
