"""dictionary_learning: files without config.json, and the folders that we write for it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
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
)
from test_foreign_dictionary_learning import CONFIGS, state_dict, their_formula

import sae_kernels as sk
from sae_kernels.formats import describe, read, write_dictionary_learning
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
)

if TYPE_CHECKING:
    from pathlib import Path

EVERY = pytest.mark.parametrize("name", CONFIGS)
ALIKE = ("AutoEncoderTopK", "BatchTopKSAE")  # both have k and a threshold


# -- without config.json ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ALIKE])
def test_the_tensors_say_which_class_it_is(tmp_path: Path, name: str) -> None:
    file = tmp_path / "downloaded.pt"
    torch.save(state_dict(name), file)
    came = read(file)
    assert came.config == CONFIGS[name]
    assert came.metadata == {}
    assert type(sk.load(file).config) is type(came.config)
    x, theirs = tokens(came.config), their_formula(name, state_dict(name), tokens(came.config))
    assert_same(came.config, x, came.tensors, formula(came.config, came.tensors, x), theirs)


def test_an_older_topk_has_no_threshold(tmp_path: Path) -> None:
    state = state_dict("AutoEncoderTopK")
    del state["threshold"]
    torch.save(state, tmp_path / "ae.pt")
    assert read(tmp_path).config == CONFIGS["AutoEncoderTopK"]
    del state["k"]
    torch.save(state, tmp_path / "ae.pt")
    refuses(lambda: read(tmp_path), "k: expected a positive integer, got None")


@pytest.mark.parametrize("name", ALIKE)
def test_what_two_classes_have_is_told_with_what_to_write(tmp_path: Path, name: str) -> None:
    torch.save(state_dict(name), tmp_path / "ae.pt")
    refuses(
        lambda: read(tmp_path),
        f"ae.pt: expected {tmp_path / 'config.json'} to say which class it is; AutoEncoderTopK and "
        "BatchTopKSAE both have the tensors b_dec, decoder.weight, ",
        'Write there {"trainer": {"dict_class": "BatchTopKSAE"}}',
    )
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name}}))
    assert read(tmp_path).config == CONFIGS[name]


@pytest.mark.parametrize(
    "state",
    [{}, {"x": torch.ones(2)}, state_dict("AutoEncoder") | {"x": torch.ones(2)}],
    ids=["nothing", "another", "one more"],
)
def test_tensors_of_no_class(tmp_path: Path, state: Any) -> None:
    torch.save(state, tmp_path / "ae.pt")
    refuses(lambda: read(tmp_path), "to say which class it is; no known class has the tensors")


def test_a_description_needs_no_weights(tmp_path: Path) -> None:
    for name, config in CONFIGS.items():
        write_dictionary_learning(tmp_path / name, config, exact_tensors(config))
        said = describe(tmp_path / name)
        sizes = [(c.d_in, c.n_latents, getattr(c, "k", None)) for c in (said, config)]
        assert sizes[0] == sizes[1]


# -- written ---------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64], ids=str)
def test_a_round_trip_is_bitwise(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    config = CONFIGS[name]
    tensors = exact_tensors(config, dtype=dtype)
    write_dictionary_learning(tmp_path, config, tensors)
    assert_weights(read(tmp_path), config, tensors)
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == name


@EVERY
def test_the_layout_is_theirs(tmp_path: Path, name: str) -> None:
    write_dictionary_learning(tmp_path, CONFIGS[name], exact_tensors(CONFIGS[name]))
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    theirs = state_dict(name)
    if name == "AutoEncoderTopK":  # whose threshold we do not have
        theirs["threshold"] = torch.tensor(-1.0)
    assert_equal_tensors(dict(sorted(state.items())), dict(sorted(theirs.items())))


OTHERS: dict[str, SAEConfig] = {
    "JumpReluAutoEncoder": JumpReLUConfig(D, F, subtract_b_dec=False),
    "AutoEncoderTopK": TopKConfig(D, F, k=K, relu="after", groups=(8, 8)),
}


@pytest.mark.parametrize(("name", "config"), OTHERS.items(), ids=OTHERS)
def test_another_form_of_the_same_function(tmp_path: Path, name: str, config: Any) -> None:
    tensors, x = exact_tensors(config), tokens(config)
    write_dictionary_learning(tmp_path, config, tensors)
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert_same(config, x, tensors, formula(config, tensors, x), their_formula(name, state, x))


UNWRITABLE: dict[str, tuple[SAEConfig, str]] = {
    "raw topk": (TopKConfig(D, F, k=K, subtract_b_dec=False), "subtract_b_dec true, got false"),
    "raw gated": (GatedConfig(D, F, subtract_b_dec=False), "subtract_b_dec true, got false"),
    "centred jumprelu": (JumpReLUConfig(D, F), "subtract_b_dec false, got true"),
    "negative": (TopKConfig(D, F, k=K, relu="none"), "relu 'before' or 'after', got 'none'"),
    "ranked": (
        BatchTopKConfig(D, F, k=K, rank_by_decoder_norm=True),
        "rank_by_decoder_norm false, got true",
    ),
    "half k": (BatchTopKConfig(D, F, k=2.5), "a whole k, got 2.5"),
    "transcoder": (ReLUConfig(D, F, d_out=D, subtract_b_dec=False), "an SAE, got a transcoder"),
    "scaled": (ReLUConfig(D, F, activation_scale=2), "activation_scale 1, got 2"),
}


@pytest.mark.parametrize(("config", "part"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_no_class_can_hold(tmp_path: Path, config: SAEConfig, part: str) -> None:
    refuses(
        lambda: write_dictionary_learning(tmp_path / "x", config, exact_tensors(config)),
        "dictionary_learning: ",
        part,
        error=ValueError,
    )
    assert not (tmp_path / "x").exists()


def test_a_negative_threshold_has_no_place(tmp_path: Path) -> None:
    config = CONFIGS["JumpReluAutoEncoder"]
    tensors = exact_tensors(config) | {"threshold": torch.full((F,), -0.5)}
    refuses(
        lambda: write_dictionary_learning(tmp_path / "x", config, tensors),
        "dictionary_learning: expected thresholds of at least 0, got -0.5",
        error=ValueError,
    )


@EVERY
def test_dictionary_learning_itself_reads_them(tmp_path: Path, name: str) -> None:
    utils = pytest.importorskip("dictionary_learning.utils", reason="needs dictionary-learning")
    config = CONFIGS[name]
    tensors, x = exact_tensors(config), tokens(config)
    if name == "AutoEncoder":  # whose rows its loader normalises: codes grow by the norms
        tensors["W_dec"] = tensors["W_dec"] / tensors["W_dec"].norm(dim=1, keepdim=True)
    write_dictionary_learning(tmp_path, config, tensors)
    theirs, _ = utils.load_dictionary(str(tmp_path), device="cpu")
    with torch.no_grad():
        double = theirs.double()
        codes = double.encode(x)
        found = codes, double.decode(codes)
    assert_same(config, x, tensors, formula(config, tensors, x), found)
