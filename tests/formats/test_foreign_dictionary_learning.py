"""dictionary_learning's files, made as it lays them out: our formula on what we read is its own."""

from __future__ import annotations

import json
import os
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from foreign import (
    F64,
    D,
    F,
    K,
    assert_same,
    exact_tensors,
    formula,
    keep_largest,
    refuses,
    tokens,
    wide,
)

from sae_kernels import nn
from sae_kernels.formats import read_dictionary_learning
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

CONFIGS: dict[str, SAEConfig] = {
    "AutoEncoder": ReLUConfig(D, F),
    "AutoEncoderNew": ReLUConfig(D, F, subtract_b_dec=False, unit_norm_decoder=False),
    "AutoEncoderTopK": TopKConfig(D, F, k=K, relu="before"),
    "BatchTopKSAE": BatchTopKConfig(D, F, k=K),
    "MatryoshkaBatchTopKSAE": BatchTopKConfig(D, F, k=K, groups=(2, 6, 8)),
    "GatedAutoEncoder": GatedConfig(D, F),
    "JumpReluAutoEncoder": JumpReLUConfig(D, F, subtract_b_dec=False, log_threshold=False),
}
EVERY = pytest.mark.parametrize("name", CONFIGS)


def state_dict(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The class's own, holding our exact weights."""
    t = exact_tensors(CONFIGS[name], dtype=dtype)
    k, unset = torch.tensor(K, dtype=torch.int), torch.tensor(-1.0)
    linear = {"encoder.weight": t["W_enc"], "decoder.weight": t["W_dec"].T}
    plain = {"W_enc": t["W_enc"].T, "b_enc": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    if name == "AutoEncoder":
        return linear | {"encoder.bias": t["b_enc"], "bias": t["b_dec"]}
    if name == "AutoEncoderNew":
        return linear | {"encoder.bias": t["b_enc"], "decoder.bias": t["b_dec"]}
    if name == "AutoEncoderTopK":
        biases = {"encoder.bias": t["b_enc"], "b_dec": t["b_dec"]}
        return linear | biases | {"k": k, "threshold": unset + 400}
    if name == "BatchTopKSAE":
        biases = {"encoder.bias": t["b_enc"], "b_dec": t["b_dec"]}
        return linear | biases | {"k": k, "threshold": t["threshold"].float()}
    if name == "GatedAutoEncoder":
        biases = {"gate_bias": t["b_enc"], "mag_bias": t["b_mag"], "decoder_bias": t["b_dec"]}
        return linear | biases | {"r_mag": t["r_mag"]}
    if name == "JumpReluAutoEncoder":
        return plain | {"threshold": t["threshold"]}
    groups = torch.tensor([2, 6, 8])
    return plain | {"k": k, "threshold": t["threshold"].float(), "group_sizes": groups}


def trainer(name: str) -> dict[str, Any]:
    return {
        "trainer_class": "SomeTrainer",
        "dict_class": name,
        "activation_dim": D,
        "dict_size": F,
        "lm_name": "EleutherAI/pythia-70m-deduped",
        "layer": 3,
        "submodule_name": "resid_post_layer_3",
        "steps": 1000,
    } | ({"k": K} if "TopK" in name else {})


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Writes trainer_0 with changes and gives the folder."""

    def save(name: str, tensors: Any = None, **changes: Any) -> Path:
        folder = tmp_path / "trainer_0"
        folder.mkdir(exist_ok=True)
        torch.save(state_dict(name) if tensors is None else tensors, folder / "ae.pt")
        config = {"trainer": trainer(name) | changes, "buffer": {"ctx_len": 128}}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return save


def their_formula(name: str, state: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The class's encode and decode on its own layout, in fp64."""
    w = wide(state)
    W_dec = w["W_dec"].T if "W_dec" in w else w["decoder.weight"]
    W_enc = w["W_enc"].T if "W_enc" in w else w["encoder.weight"]
    biases = ("b_dec", "bias", "decoder.bias", "decoder_bias")
    b_dec = next(w[bias] for bias in biases if bias in w)
    centred = x if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - b_dec
    product = centred @ W_enc.T
    if name == "GatedAutoEncoder":
        gate = product + w["gate_bias"] > 0
        codes = gate * (w["r_mag"].exp() * product + w["mag_bias"]).relu()
    else:
        h = (product + w.get("b_enc", w.get("encoder.bias"))).relu()
        if name == "AutoEncoderTopK":
            codes = keep_largest(h, h, K)
        else:
            codes = h * (h > w["threshold"]) if "threshold" in w else h
    return codes, codes @ W_dec.T + b_dec


@EVERY
def test_our_formula_on_what_was_read_is_theirs(save: Any, name: str) -> None:
    came = read_dictionary_learning(save(name))
    assert came.config == CONFIGS[name]
    assert came.metadata["activations"] == {
        "model": "EleutherAI/pythia-70m-deduped",
        "hook_name": "blocks.3.hook_resid_post",
    }
    x, theirs = tokens(came.config), their_formula(name, state_dict(name), tokens(came.config))
    assert_same(came.config, x, came.tensors, formula(came.config, came.tensors, x), theirs)
    sae = nn.from_weights(came.config, came.tensors)
    codes = sae.encode(x.float()).to_dense().to(F64)
    assert torch.equal(codes > 0, theirs[0] > 0)
    if name != "GatedAutoEncoder":  # rounded in fp32 there: its own tests have the budget
        assert torch.equal(codes, theirs[0])


@EVERY
def test_the_dtype_is_the_file_s(save: Any, name: str) -> None:
    tensors = read_dictionary_learning(save(name, state_dict(name, torch.bfloat16))).tensors
    threshold = tensors.pop("threshold", None)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    if threshold is not None:
        assert threshold.dtype == (torch.float32 if threshold.ndim else F64)


def test_files_and_checkpoints(save: Any) -> None:
    folder = save("AutoEncoder")
    whole = read_dictionary_learning(folder)
    assert torch.equal(
        read_dictionary_learning(folder / "ae.pt").tensors["W_enc"], whole[1]["W_enc"]
    )
    (folder / "checkpoints").mkdir()
    (folder / "ae.pt").rename(folder / "checkpoints" / "ae_500.pt")
    early = read_dictionary_learning(folder / "checkpoints" / "ae_500.pt")
    assert early.config == whole.config


def test_an_unset_threshold_stays_unset(save: Any) -> None:
    state = state_dict("BatchTopKSAE") | {"threshold": torch.tensor(-1.0)}
    assert read_dictionary_learning(save("BatchTopKSAE", state)).tensors["threshold"] == -1


def test_k_is_in_the_file_or_in_config_json(save: Any) -> None:
    state = state_dict("AutoEncoderTopK")
    del state["k"], state["threshold"]
    assert (
        read_dictionary_learning(save("AutoEncoderTopK", state)).config
        == CONFIGS["AutoEncoderTopK"]
    )
    folder = save("AutoEncoderTopK", k=None)
    assert read_dictionary_learning(folder).config == CONFIGS["AutoEncoderTopK"]
    for name in ("AutoEncoderTopK", "BatchTopKSAE"):  # while k falls, the file's is larger
        came = read_dictionary_learning(save(name, k=2))
        assert came.config == CONFIGS[name]
        assert came.metadata["dictionary_learning"]["trainer"]["k"] == 2


def test_a_negative_threshold_is_zero_under_their_relu(save: Any) -> None:
    name = "JumpReluAutoEncoder"
    state = state_dict(name) | {"threshold": torch.linspace(-200, 300, F)}
    came = read_dictionary_learning(save(name, state))
    assert (came.tensors["threshold"] >= 0).all()
    x = tokens(came.config)
    ours = formula(came.config, came.tensors, x)
    assert_same(came.config, x, came.tensors, ours, their_formula(name, state, x))


# -- refusals --------------------------------------------------------------------------------------


def _without(name: str, tensor: str) -> dict[str, Tensor]:
    return {n: t for n, t in state_dict(name).items() if n != tensor}


TENSORS: dict[str, tuple[Any, list[str]]] = {
    "missing": (
        _without("AutoEncoder", "bias"),
        ["expected a tensor bias [6], got decoder.weight"],
    ),
    "extra": (state_dict("AutoEncoder") | {"x": torch.ones(1)}, ["got 'x' too"]),
    "transposed": (
        state_dict("AutoEncoder") | {"decoder.weight": torch.ones(F, D)},
        ["decoder.weight: expected [6, 16], got [16, 6]"],
    ),
    "nan": (
        state_dict("AutoEncoder") | {"bias": torch.full((D,), torch.nan)},
        ["bias: expected finite numbers, got NaN or infinity"],
    ),
    "integers": (
        state_dict("AutoEncoder") | {"bias": torch.ones(D, dtype=torch.long)},
        ["bias: expected one of torch.float32", "got torch.int64"],
    ),
    "a-list": ([1, 2], ["expected a state dict of tensors, got list"]),
    "a-tensor": (torch.zeros(2), ["expected a state dict of tensors, got one tensor"]),
    "numbers": ({"bias": 3.0}, ["'bias': expected a dense tensor"]),
    "nested": ({"bias": {"bias": torch.ones(D)}}, ["'bias': expected a dense tensor"]),
    "names": ({1: torch.ones(D)}, ["expected names of tensors, got int"]),
    "sparse": (
        {"bias": torch.eye(D).to_sparse()},
        ["torch._utils._rebuild_sparse_tensor in the pickle is no part of a dense tensor"],
    ),
    "meta": (
        {"bias": torch.empty(10**9, device="meta")},
        ["torch._utils._rebuild_meta_tensor_no_storage in the pickle is no part of a dense"],
    ),
    "huge-view": (
        {"encoder.weight": torch.ones(1).expand(10**6, 10**6)},
        ["'encoder.weight': expected a dense tensor"],
    ),
}


@pytest.mark.parametrize(("tensors", "parts"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_refused(save: Any, tensors: Any, parts: list[str]) -> None:
    refuses(lambda: read_dictionary_learning(save("AutoEncoder", tensors)), "ae.pt", *parts)


CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "class": (
        {"dict_class": "IdentityDict"},
        [
            "dictionary_learning's class 'IdentityDict', which sae_kernels does not have (it has "
            "AutoEncoder, AutoEncoderNew, "
        ],
    ),
    "class-a-list": ({"dict_class": [1]}, ["dictionary_learning's class [1], which"]),
    "lying": ({"dict_size": 17}, ["encoder.weight: expected [17, 6], got [16, 6]"]),
    "no-width": ({"activation_dim": None}, ["activation_dim: expected an integer"]),
    "other-class": ({"dict_class": "AutoEncoderNew"}, ["expected a tensor decoder.bias [6]"]),
    "batch": ({"dict_class": "BatchTopKSAE", "k": 2}, ["expected a tensor b_dec [6]"]),
    "no-k": ({"dict_class": "BatchTopKSAE"}, ["k: expected a positive number, got None"]),
}


@pytest.mark.parametrize(("changes", "parts"), CHANGES.values(), ids=CHANGES)
def test_configurations_that_are_refused(
    save: Any, changes: dict[str, Any], parts: list[str]
) -> None:
    refuses(lambda: read_dictionary_learning(save("AutoEncoder", **changes)), "trainer_0", *parts)


@pytest.mark.parametrize(
    ("groups", "part"),
    [
        (torch.tensor([2, 6, 9]), "add up to n_latents = 16"),
        (torch.tensor([2.0, 6, 8]), "group_sizes: expected integers, got torch.float32"),
        (torch.ones(2, 2, dtype=torch.int), "group_sizes: expected at most 16 numbers in a row"),
    ],
)
def test_group_sizes_that_are_refused(save: Any, groups: Tensor, part: str) -> None:
    name = "MatryoshkaBatchTopKSAE"
    state = state_dict(name) | {"group_sizes": groups}
    refuses(lambda: read_dictionary_learning(save(name, state)), part)


def test_files_that_are_not_there(save: Any, tmp_path: Path) -> None:
    refuses(
        lambda: read_dictionary_learning(tmp_path / "no"),
        "no: expected the file of a saved SAE, it is not there",
    )
    folder = save("AutoEncoder")
    (folder / "ae.pt").unlink()
    refuses(lambda: read_dictionary_learning(folder), "ae.pt: expected the file of a saved SAE")
    (folder / "config.json").write_text('{"trainer": [1]}')
    refuses(lambda: read_dictionary_learning(folder), "trainer: expected an object, got list")


class _Bomb:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("writer", ["torch.save", "old torch.save", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(save: Any, tmp_path: Path, writer: str) -> None:
    folder, target = save("AutoEncoder"), tmp_path / "ran"
    bomb = state_dict("AutoEncoder") | {"bomb": _Bomb(str(target))}
    if writer == "pickle":
        (folder / "ae.pt").write_bytes(pickle.dumps({"bomb": _Bomb(str(target))}, protocol=2))
    else:
        zipped = writer == "torch.save"
        torch.save(bomb, folder / "ae.pt", _use_new_zipfile_serialization=zipped)
    refuses(
        lambda: read_dictionary_learning(folder), "ae.pt: expected a state dict", "weights_only"
    )
    assert not target.exists()


def test_every_truncation_is_noticed(save: Any) -> None:
    path = save("AutoEncoder") / "ae.pt"
    whole = path.read_bytes()
    for sixteenth in range(16):
        path.write_bytes(whole[: len(whole) * sixteenth // 16])
        refuses(lambda: read_dictionary_learning(path), "expected a state dict of tensors")


# -- the real thing --------------------------------------------------------------------------------


@EVERY
def test_dictionary_learning_itself_agrees(save: Any, name: str) -> None:
    """In fp64, where nothing is rounded, on files that its own classes saved."""
    module = pytest.importorskip(
        "dictionary_learning.dictionary", reason="needs the package dictionary-learning"
    )
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    known = {c.__name__: c for c in (AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE)}
    make = known.get(name) or getattr(module, name)
    more = ((K,) if "TopK" in name else ()) + (([2, 6, 8],) if name.startswith("Mat") else ())
    autoencoder = make(D, F, *more)
    autoencoder.load_state_dict(state_dict(name))
    came = read_dictionary_learning(save(name, autoencoder.state_dict()))
    x = tokens(came.config)
    with torch.no_grad():
        double = autoencoder.double()
        codes = double.encode(x)
        theirs = codes, double.decode(codes)
    assert_same(came.config, x, came.tensors, formula(came.config, came.tensors, x), theirs)
