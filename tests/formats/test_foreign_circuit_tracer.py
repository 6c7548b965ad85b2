"""circuit-tracer's sets: its formulas on the files, several layers, what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from foreign import (
    F64,
    D,
    F,
    K,
    assert_equal_tensors,
    assert_same,
    assert_weights,
    exact_tensors,
    formula,
    refuses,
    tokens,
    wide,
)
from safetensors.torch import load_file, save_file

import sae_kernels as sk
from sae_kernels import nn
from sae_kernels.formats import (
    Weights,
    describe,
    detect,
    read,
    read_circuit_tracer,
    write_circuit_tracer,
    write_transcoder_set,
)
from sae_kernels.io.yaml_files import read_yaml
from sae_kernels.nn import BatchTopKConfig, GatedConfig, JumpReLUConfig, ReLUConfig, TopKConfig

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.nn import SAEConfig

RAW: dict[str, Any] = {"d_out": D, "subtract_b_dec": False, "unit_norm_decoder": False}
CONFIGS: dict[str, SAEConfig] = {
    "relu": ReLUConfig(D, F, **RAW),
    "relu, skip": ReLUConfig(D, F, skip=True, **RAW),
    "jumprelu": JumpReLUConfig(D, F, log_threshold=False, **RAW),
    "jumprelu, skip": JumpReLUConfig(D, F, log_threshold=False, skip=True, **RAW),
}
OTHERS: dict[str, SAEConfig] = {
    "logarithms": JumpReLUConfig(D, F, **RAW),
    "batchtopk": BatchTopKConfig(D, F, k=2.5, **RAW),
    "ranked batchtopk": BatchTopKConfig(D, F, k=K, rank_by_decoder_norm=True, skip=True, **RAW),
    "no transcoder by its file": JumpReLUConfig(D, F, log_threshold=False, subtract_b_dec=False),
}


def place(layer: int, **changes: Any) -> dict[str, Any]:
    hooks = {"hook_name": f"blocks.{layer}.mlp.hook_in"}
    hooks |= {"hook_name_out": f"blocks.{layer}.hook_mlp_out"}
    return {"activations": {"model": "google/gemma-2-2b", **hooks, **changes}}


def their_formula(theirs: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SingleLayerTranscoder of circuit_tracer 0.5.0, in fp64."""
    w = wide(theirs)
    h = x @ w["W_enc"].T + w["b_enc"]
    threshold = w.get("activation_function.threshold")
    codes = h.relu() if threshold is None else h * (h > threshold)
    y = codes @ w["W_dec"] + w["b_dec"]
    return codes, y + x @ w["W_skip"].T if "W_skip" in w else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_round_trip_is_bitwise(tmp_path: Path, config: SAEConfig, dtype: torch.dtype) -> None:
    tensors = exact_tensors(config, dtype=dtype)
    write_circuit_tracer(tmp_path, config, tensors, place(7))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.yaml", "layer_7.safetensors"]
    assert detect(tmp_path) == detect(tmp_path / "layer_7.safetensors") == "circuit_tracer"
    for path in (tmp_path, tmp_path / "layer_7.safetensors"):
        came = read(path)
        assert_weights(came, config, tensors)
        assert came.metadata["activations"] == place(7)["activations"]
        assert describe(path) == config


@pytest.mark.parametrize("config", (CONFIGS | OTHERS).values(), ids=CONFIGS | OTHERS)
def test_their_formula_gives_our_codes(tmp_path: Path, config: SAEConfig) -> None:
    tensors, x = exact_tensors(config), tokens(config)
    write_circuit_tracer(tmp_path, config, tensors, place(0))
    theirs = their_formula(load_file(tmp_path / "layer_0.safetensors"), x)
    assert_same(config, x, tensors, formula(config, tensors, x), theirs)
    out = nn.from_weights(*read(tmp_path)[:2])(x.float())
    assert torch.equal(out.codes.to_dense().to(F64), theirs[0])
    assert torch.equal(out.x_hat.to(F64), theirs[1])


def test_the_layout(tmp_path: Path) -> None:
    config = CONFIGS["jumprelu, skip"]
    tensors = exact_tensors(config)
    write_circuit_tracer(tmp_path, config, tensors, place(3))
    theirs = dict(sorted(load_file(tmp_path / "layer_3.safetensors").items()))
    ours = {"activation_function.threshold": tensors.pop("threshold"), **tensors}
    order = ["W_dec", "W_enc", "W_skip", "activation_function.threshold", "b_dec", "b_enc"]
    assert_equal_tensors(theirs, {name: ours[name] for name in order})
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {
        "model_kind": "transcoder_set",
        "model_name": "google/gemma-2-2b",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
    }


def test_a_latent_that_never_fires(tmp_path: Path) -> None:
    config = CONFIGS["jumprelu"]
    tensors = exact_tensors(config)
    tensors["threshold"][::3] = torch.inf
    write_circuit_tracer(tmp_path, config, tensors, place(0))
    came = read(tmp_path)
    assert_weights(came, config, tensors)
    x = tokens(config)
    theirs = their_formula(load_file(tmp_path / "layer_0.safetensors"), x)
    out = nn.from_weights(*came[:2])(x.float())
    assert torch.equal(out.codes.to_dense().to(F64), theirs[0])


def layers(n: int) -> list[Weights]:
    config = CONFIGS["relu"]
    return [Weights(config, exact_tensors(config, seed=i), place(i)) for i in range(n)]


def test_a_set_of_several_layers(tmp_path: Path) -> None:
    given = layers(12)
    write_transcoder_set(tmp_path, iter(given))
    for i in (0, 3, 11):
        sae = sk.load(tmp_path, layer=i)
        assert torch.equal(sae.W_enc, given[i].tensors["W_enc"])
        assert sae.metadata["activations"]["hook_name"] == f"blocks.{i}.mlp.hook_in"
    refuses(
        lambda: sk.load(tmp_path),
        "got a folder with 12 of them: layer_0.safetensors (relu, 6 to 16), layer_1.safetensors",
        "layer_11.safetensors (relu, 6 to 16); name one",
    )
    refuses(lambda: sk.load(tmp_path, layer=12), "expected one of layer 12, got a folder with 12")
    refuses(lambda: read(tmp_path), "expected the file of one layer, got 12", "--layer")
    (tmp_path / "deep").mkdir()
    write_transcoder_set(tmp_path / "deep" / "set", layers(2))
    assert torch.equal(sk.load(tmp_path / "deep", layer=1).W_enc, given[1].tensors["W_enc"])


def test_a_layer_where_there_are_none(tmp_path: Path) -> None:
    sae = nn.TopKSAE(D, F, k=K)
    sae.save_pretrained(tmp_path / "a")
    sae.save_pretrained(tmp_path / "b")
    for path in (tmp_path, tmp_path / "a"):
        refuses(
            lambda p=path: sk.load(p, layer=3),
            "layer: expected none",
            "is no folder with a set of layers, got 3",
            error=ValueError,
        )


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"hook_name": "blocks.1.hook_resid_mid"}, "feature_input_hook: expected 'mlp.hook_in'"),
        ({"model": "gpt2"}, "model_name: expected 'google/gemma-2-2b', as in the layers before"),
        ({"hook_name": "blocks.0.mlp.hook_in"}, "expected layers that differ, got 0 twice"),
        ({"hook_name": "h.3"}, "got 'h.3'; name it with --hook-name"),
        ({"hook_name_out": None}, "got None; name it with --hook-name-out"),
    ],
    ids=str,
)
def test_layers_that_are_no_set(tmp_path: Path, changes: Any, part: str) -> None:
    other = layers(2)[1]._replace(metadata=place(1, **changes))
    refuses(
        lambda: write_transcoder_set(tmp_path, [*layers(1), other]),
        "circuit_tracer: ",
        part,
        error=ValueError,
    )
    assert not list(tmp_path.iterdir())


def test_no_layers_are_no_set(tmp_path: Path) -> None:
    refuses(lambda: write_transcoder_set(tmp_path, []), "at least one", error=ValueError)
    assert not list(tmp_path.iterdir())


UNWRITABLE: dict[str, tuple[SAEConfig, str]] = {
    "topk": (TopKConfig(D, F, k=K, **RAW), "a ReLU, JumpReLU or BatchTopK transcoder, got TopK"),
    "gated": (GatedConfig(D, F), "a ReLU, JumpReLU or BatchTopK transcoder, got GatedConfig"),
    "two widths": (ReLUConfig(D, F, d_out=9, subtract_b_dec=False), "d_out = d_in = 6, got 9"),
    "centred": (ReLUConfig(D, F), "subtract_b_dec false, got true"),
    "crosscoder": (ReLUConfig(D, F, n_layers=2), "n_layers 1, got 2"),
}


@pytest.mark.parametrize(("config", "part"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, config: SAEConfig, part: str
) -> None:
    refuses(
        lambda: write_circuit_tracer(tmp_path, config, exact_tensors(config), place(0)),
        part,
        error=ValueError,
    )
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_set(tmp_path: Path) -> None:
    write_transcoder_set(tmp_path, layers(2))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    bad = layers(2)
    bad[1].tensors["b_enc"][2] = torch.nan
    refuses(lambda: write_transcoder_set(tmp_path, bad), "b_enc: expected finite numbers")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def save(folder: Path, config: Any, **tensors: Any) -> Path:
    """As circuit-tracer would lay it out."""
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(config if isinstance(config, str) else json.dumps(config))
    theirs = exact_tensors(CONFIGS["relu"]) | tensors
    save_file({n: t for n, t in theirs.items() if t is not None}, folder / "layer_0.safetensors")
    return folder


def test_a_cross_layer_transcoder_is_another_format(tmp_path: Path) -> None:
    folder = save(tmp_path, {"model_kind": "cross_layer_transcoder"})
    refuses(
        lambda: read_circuit_tracer(folder),
        "config.yaml: expected model_kind transcoder_set, got 'cross_layer_transcoder'",
    )


TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "no bias": ({"b_enc": None}, "expected a tensor b_enc of one dimension, got W_dec"),
    "two dimensions": ({"b_dec": torch.ones(2, D)}, "b_dec of one dimension, got [2, 6]"),
    "turned": ({"W_dec": torch.ones(D, F)}, "W_dec: expected [16, 6], got [6, 16]"),
    "more": ({"log_thresholds": torch.ones(F)}, "got 'log_thresholds' too"),
    "nan": ({"W_enc": torch.full((F, D), torch.nan)}, "W_enc: expected finite numbers"),
    "one threshold": (
        {"activation_function.threshold": torch.tensor(1.0)},
        "activation_function.threshold: expected [16], got []",
    ),
    "minus infinity": (
        {"activation_function.threshold": torch.full((F,), -torch.inf)},
        "activation_function.threshold: expected finite numbers",
    ),
}


@pytest.mark.parametrize(("tensors", "part"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_refused(tmp_path: Path, tensors: Any, part: str) -> None:
    folder = save(tmp_path, {"model_kind": "transcoder_set"}, **tensors)
    refuses(lambda: read_circuit_tracer(folder), "layer_0.safetensors", part)


YAML: dict[str, tuple[str, str]] = {
    "aliases": ("a: &a [1]\nb: *a\n", "an alias"),
    "an object": ("!!python/object/apply:os.mkdir [ran]", "could not determine a constructor"),
    "a list": ("[1]", "expected a mapping, got list"),
    "nothing": ("", "expected a mapping, got NoneType"),
    "long": ("a: " + "x" * 40_000, "of at most 32768 bytes"),
    "deep": ("{a: " + "[" * 500 + "]" * 500 + "}", "expected a"),
    "a date": ("scan: 2024-01-01", "expected text, finite numbers, true and false, got date"),
    "a set": ("scan: !!set {a, b}", "got set"),
    "nan": ("scan: .nan", "got float"),
    "numbers for names": ("1: 2", "expected names for keys, got [1]"),
    "a tab": ("a:\n\t- b", "it cannot be read"),
    "binary": ("scan: !!binary aGVsbG8=", "got bytes"),
}


@pytest.mark.parametrize(("text", "part"), YAML.values(), ids=YAML)
def test_yaml_that_is_refused(
    tmp_path: Path, text: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "set", text)
    refuses(lambda: read_circuit_tracer(folder), "config.yaml", part)
    assert not (tmp_path / "ran").exists()


def test_yaml_of_plain_values(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: text\nb: 3\nc: [1.5, true, null]\nd: {e: 'x'}\n")
    assert read_yaml(path) == {"a": "text", "b": 3, "c": [1.5, True, None], "d": {"e": "x"}}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_circuit_tracer_itself_agrees(tmp_path: Path, config: SAEConfig) -> None:
    """In fp64, where nothing is rounded, both ways."""
    theirs = pytest.importorskip(
        "circuit_tracer.transcoder.single_layer_transcoder", reason="needs circuit-tracer"
    )
    given = [Weights(config, exact_tensors(config, seed=i), place(i)) for i in range(2)]
    write_transcoder_set(tmp_path, given)
    settings = yaml.safe_load((tmp_path / "config.yaml").read_text())
    paths = {i: str(tmp_path / f"layer_{i}.safetensors") for i in range(2)}
    hooks = settings["feature_input_hook"], settings["feature_output_hook"]
    made = theirs.load_transcoder_set(
        paths, "scan", *hooks, device=torch.device("cpu"), dtype=F64, lazy_encoder=False
    )
    x = tokens(config)
    for i, (_, tensors, _) in enumerate(given):
        with torch.no_grad():
            codes, y = made[i].encode(x), made[i](x)
        assert_same(config, x, tensors, formula(config, tensors, x), (codes, y))
    again = tmp_path / "again"
    made.to_safetensors(str(again))
    (again / "config.yaml").write_text((tmp_path / "config.yaml").read_text())
    for i, (_, tensors, _) in enumerate(given):
        came = read(again / f"layer_{i}.safetensors").tensors
        assert all(torch.equal(came[n].double(), tensors[n].double()) for n in tensors)
