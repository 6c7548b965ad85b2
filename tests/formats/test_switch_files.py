"""Switch SAEs in files: amudide/switch_sae's layout both ways, and what ours refuses."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from foreign import F64, D, F, K, assert_equal_tensors, assert_weights, exact_tensors, refuses
from foreign import tokens as tokens_of
from makers import SWITCH, native_switch
from safetensors.torch import load_file, save_file

from sae_kernels import nn
from sae_kernels.formats import (
    detect,
    read_dictionary_learning,
    write_dictionary_learning,
    write_saelens,
    write_sparsify,
)
from sae_kernels.nn import SwitchConfig
from sae_kernels.testing import assert_bitwise, assert_within, gamma

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

E = 4
CONFIGS = {
    "softmax": SwitchConfig(D, F, k=K, n_experts=E, encoder_bias=False),
    "heaviside": SwitchConfig(D, F, k=K, n_experts=E, gate="heaviside", encoder_bias=False),
}
EACH = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def tensors_of(config: SwitchConfig, dtype: torch.dtype = torch.float32) -> Any:
    """Exact weights of ours, with logits so small that gates are not all 1."""
    tensors = exact_tensors(config, dtype=dtype)
    return tensors | {"b_enc": torch.zeros(F, dtype=dtype), "W_router": tensors["W_router"] / 4096}


def state_of(tensors: Any) -> dict[str, Tensor]:
    """The state dict of their class."""
    names = {"encoder.weight": "W_enc", "router.weight": "W_router", "decoder": "W_dec"}
    names |= {"b_dec": "b_dec", "b_router": "b_router"}
    return {theirs: tensors[ours].clone() for theirs, ours in names.items()}


def trainer_of(config: SwitchConfig) -> dict[str, Any]:
    """What their trainer says of itself."""
    return {
        "trainer_class": "SwitchTrainer",
        "dict_class": "SwitchAutoEncoder",
        "lr": 1e-4,
        "steps": 100,
        "seed": None,
        "activation_dim": D,
        "dict_size": F,
        "k": config.k,
        "experts": config.n_experts,
        "heaviside": config.gate == "heaviside",
        "lb_alpha": 3,
        "layer": 8,
        "lm_name": "openai-community/gpt2",
        "submodule_name": None,
    }


def their_folder(folder: Path, config: SwitchConfig, state: Any = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(state_of(tensors_of(config)) if state is None else state, folder / "ae.pt")
    trainer = {n: v for n, v in (trainer_of(config) | changes).items() if v is not ...}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))
    return folder


def their_formula(state: Any, k: int, heaviside: bool, x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [B, F] and reconstruction, in fp64: all experts computed, all but one masked."""
    w = {name: tensor.to(F64) for name, tensor in state.items()}
    z = ((x - w["b_dec"]) @ w["encoder.weight"].T).relu()
    p = ((x - w["b_router"]) @ w["router.weight"].T).softmax(1)
    chosen = torch.nn.functional.one_hot(p.argmax(1), p.shape[1])
    gates = chosen.to(F64) if heaviside else chosen * p
    f = z * gates.repeat_interleave(F // p.shape[1], dim=1)
    top = f.topk(k, dim=1)
    codes = torch.zeros_like(f).scatter(1, top.indices, top.values)
    return codes, codes @ w["decoder"] + w["b_dec"]


PLACE = {"activations": {"model": "gpt2", "hook_name": "blocks.8.hook_resid_post"}}

# -- their layout ----------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_our_module_on_their_file_computes_their_formula(
    tmp_path: Path, config: SwitchConfig, dtype: torch.dtype
) -> None:
    came = read_dictionary_learning(their_folder(tmp_path, config))
    assert came.config == config
    assert came.metadata["activations"] == {"model": "openai-community/gpt2"}
    assert came.metadata["dictionary_learning"]["trainer"]["layer"] == 8
    x = tokens_of(config)
    state = state_of(tensors_of(config))
    codes, x_hat = their_formula(state, K, config.gate == "heaviside", x)
    sae = nn.from_weights(came.config, came.tensors).to(dtype)
    ours = sae(x.to(dtype))
    # Products and logits are exact: what rounds is the softmax (an exponential within 2 units, E
    # of them added, a quotient), the gate's product and K additions to b_dec.
    n = 0 if config.gate == "heaviside" else E + 6
    assert codes.count_nonzero() > len(x)
    assert_within("codes", ours.codes.to_dense(), codes, gamma(n, dtype) * codes)
    terms = codes @ state["decoder"].to(F64).abs() + state["b_dec"].to(F64).abs()
    n += K + 1 if n else 0
    assert_within("x_hat", ours.x_hat, x_hat, (gamma(n, dtype) + gamma(n, F64)) * terms)
    experts = ours.codes.routing.experts  # type: ignore[attr-defined]
    assert experts.unique().numel() > 1


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
def test_a_round_trip_is_bitwise(tmp_path: Path, config: SwitchConfig, dtype: torch.dtype) -> None:
    tensors = tensors_of(config, dtype)
    write_dictionary_learning(tmp_path / "a", config, tensors, PLACE)
    came = read_dictionary_learning(tmp_path / "a")
    assert_weights(came, config, tensors)
    assert came.metadata["activations"] == PLACE["activations"]
    write_dictionary_learning(tmp_path / "b", *came)
    assert (tmp_path / "a" / "ae.pt").read_bytes() == (tmp_path / "b" / "ae.pt").read_bytes()
    first, second = (json.loads((tmp_path / n / "config.json").read_text()) for n in "ab")
    assert first == second


@EACH
def test_what_we_write_is_their_layout(tmp_path: Path, config: SwitchConfig) -> None:
    tensors = tensors_of(config)
    write_dictionary_learning(tmp_path, config, tensors, PLACE)
    assert detect(tmp_path) == "dictionary_learning"
    state = torch.load(tmp_path / "ae.pt", weights_only=True)
    assert_equal_tensors(state, {name: state_of(tensors)[name] for name in state})
    assert sorted(state) == sorted(state_of(tensors))
    trainer = json.loads((tmp_path / "config.json").read_text())["trainer"]
    theirs = trainer_of(config) | {"lm_name": "gpt2", "submodule_name": "resid_post_layer_8"}
    assert trainer == {name: theirs[name] for name in trainer}
    needed = {"trainer_class", "dict_class", "activation_dim", "dict_size", "k", "experts"}
    assert needed | {"heaviside", "layer", "lm_name", "submodule_name"} == set(trainer)


def test_biases_that_share_their_memory_in_the_file_live_apart_here(tmp_path: Path) -> None:
    """Their trainer makes one tensor both biases, and torch.save keeps it so."""
    config = CONFIGS["softmax"]
    state = state_of(tensors_of(config))
    state["b_router"] = state["b_dec"]
    came = read_dictionary_learning(their_folder(tmp_path, config, state))
    assert_bitwise("b_router", came.tensors["b_router"], state["b_dec"])
    came.tensors["b_router"] += 1
    assert_bitwise("b_dec", came.tensors["b_dec"], state["b_dec"])
    nn.from_weights(config, came.tensors).save_pretrained(tmp_path / "native")
    write_dictionary_learning(tmp_path / "again", *came)
    assert_weights(read_dictionary_learning(tmp_path / "again"), config, came.tensors)


def test_parameters_and_checkpoints_are_read_too(tmp_path: Path) -> None:
    config = CONFIGS["softmax"]
    tensors = tensors_of(config)
    state = {name: torch.nn.Parameter(t) for name, t in state_of(tensors).items()}
    folder = their_folder(tmp_path, config, state)
    (folder / "checkpoints").mkdir()
    (folder / "ae.pt").rename(folder / "checkpoints" / "ae_500.pt")
    came = read_dictionary_learning(folder / "checkpoints" / "ae_500.pt")
    assert_weights(came, config, tensors)
    assert not any(t.requires_grad for t in came.tensors.values())


READ: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no experts": ({"experts": ...}, ["experts: expected an integer of at least 0, got None"]),
    "no expert": ({"experts": 0}, ["n_experts: expected a positive integer, got 0"]),
    "negative": ({"experts": -4}, ["experts: expected an integer of at least 0, got -4"]),
    "text": ({"experts": "4"}, ["experts: expected an integer of at least 0, got '4'"]),
    "true": ({"experts": True}, ["experts: expected an integer of at least 0, got True"]),
    "uneven": ({"experts": 3}, ["n_experts: expected a divisor of n_latents = 16, got 3"]),
    "more": ({"experts": 2}, ["router.weight: expected [2, 6], got [4, 6]"]),
    "absurd": ({"experts": 10**30}, ["n_experts: expected a number of at most 63 bits"]),
    "no k": ({"k": ...}, ["k: expected an integer of at least 0, got None"]),
    "wide k": ({"k": 5}, ["k: expected at most 4, the latents of one of 4 experts, got 5"]),
    "gate": ({"heaviside": "no"}, ["heaviside: expected true or false, got 'no'"]),
    "width": ({"dict_size": 32}, ["encoder.weight: expected [32, 6], got [16, 6]"]),
}


@pytest.mark.parametrize(("changes", "parts"), READ.values(), ids=READ)
def test_settings_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    folder = their_folder(tmp_path, CONFIGS["softmax"], **changes)
    refuses(lambda: read_dictionary_learning(folder), str(folder), *parts)


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    config = CONFIGS["softmax"]
    state = state_of(tensors_of(config))
    lacking = {name: t for name, t in state.items() if name != "b_router"}
    for wrong, part in (
        (lacking, "expected a tensor b_router [6], got b_dec, decoder"),
        (state | {"encoder.bias": torch.zeros(F)}, "got 'encoder.bias' too"),
        (state | {"": torch.zeros(F)}, "got '' too"),
        (state | {"decoder": state["decoder"].T}, "decoder: expected [16, 6], got [6, 16]"),
        (state | {"router.weight": state["router.weight"] / 0}, "expected finite numbers"),
        (state | {"b_router": torch.zeros(D).int()}, "b_router: expected one of torch.float32"),
    ):
        folder = their_folder(tmp_path, config, wrong)
        refuses(lambda f=folder: read_dictionary_learning(f), "ae.pt", part)


# -- what other formats cannot hold ----------------------------------------------------------------

PLAIN = CONFIGS["softmax"]
WRITE: dict[str, tuple[Any, str]] = {
    "shared": (
        dataclasses.replace(PLAIN, shared_expert=True),
        "expected shared_expert false, got true",
    ),
    "transcoder": (
        dataclasses.replace(PLAIN, d_out=5, subtract_b_dec=False),
        "expected an SAE, got a transcoder",
    ),
    "skip": (
        dataclasses.replace(PLAIN, skip=True, subtract_b_dec=False),
        "expected an SAE, got a transcoder",
    ),
    "crosscoder": (dataclasses.replace(PLAIN, n_layers=2), "expected n_layers 1, got 2"),
    "raw input": (
        dataclasses.replace(PLAIN, subtract_b_dec=False),
        "expected subtract_b_dec true, got false",
    ),
    "scaled": (dataclasses.replace(PLAIN, activation_scale=2.0), "expected activation_scale 1"),
}


@pytest.mark.parametrize(("config", "part"), WRITE.values(), ids=WRITE)
def test_what_their_class_cannot_hold(tmp_path: Path, config: Any, part: str) -> None:
    tensors = exact_tensors(config)
    refuses(
        lambda: write_dictionary_learning(tmp_path / "x", config, tensors),
        "dictionary_learning: ",
        part,
        error=ValueError,
    )
    assert not (tmp_path / "x").exists()


def test_an_encoder_bias_has_no_place_there(tmp_path: Path) -> None:
    tensors = tensors_of(PLAIN)
    tensors["b_enc"][3] = -0.25
    refuses(
        lambda: write_dictionary_learning(tmp_path / "x", PLAIN, tensors),
        "dictionary_learning: expected b_enc of zeros, got numbers up to 0.25",
        error=ValueError,
    )
    assert not (tmp_path / "x").exists()
    tensors["b_enc"][3] = torch.nan
    refuses(lambda: write_dictionary_learning(tmp_path / "x", PLAIN, tensors), "b_enc: expected")


def test_sparsify_and_saelens_have_no_switch_sae(tmp_path: Path) -> None:
    for write, part in (
        (write_sparsify, "sparsify: expected a TopK SAE, got SwitchConfig"),
        (write_saelens, "SAELens: it has no class for SwitchConfig"),
    ):
        refuses(lambda w=write: w(tmp_path / "x", PLAIN, tensors_of(PLAIN)), part, error=ValueError)
    assert not (tmp_path / "x").exists()


# -- our own files ---------------------------------------------------------------------------------

OURS: dict[str, tuple[dict[str, Any], str]] = {
    "zero": ({"n_experts": 0}, "n_experts: expected a positive integer, got 0"),
    "negative": ({"n_experts": -4}, "n_experts: expected a positive integer, got -4"),
    "half": ({"n_experts": 4.5}, "n_experts: expected a positive integer, got 4.5"),
    "float": ({"n_experts": 4.0}, "n_experts: expected a positive integer, got 4.0"),
    "text": ({"n_experts": "4"}, "n_experts: expected a positive integer, got '4'"),
    "true": ({"n_experts": True}, "n_experts: expected a positive integer, got True"),
    "list": ({"n_experts": [4]}, "n_experts: expected a positive integer, got [4]"),
    "null": ({"n_experts": None}, "n_experts: expected a positive integer, got None"),
    "uneven": ({"n_experts": 3}, "n_experts: expected a divisor of n_latents = 16, got 3"),
    "huge": ({"n_experts": 2**62}, "n_experts: expected a divisor of n_latents = 16"),
    "absurd": ({"n_experts": 10**400}, "n_experts: expected a number of at most 63 bits"),
    "others": ({"n_experts": 8}, "'W_router': [8, 6]"),
    "gate": ({"gate": "sigmoid"}, "gate: expected one of softmax, heaviside, got 'sigmoid'"),
    "gate-list": ({"gate": ["softmax"]}, "gate: expected one of softmax, heaviside"),
    "shared": ({"shared_expert": 1}, "shared_expert: expected true or false, got 1"),
    "shared-shape": ({"shared_expert": True}, "'W_router': [3, 6]"),
    "wide k": ({"k": 5}, "k: expected at most 4, the latents of one of 4 experts, got 5"),
    "topk": ({"architecture": "topk"}, "unknown key 'n_experts'"),
}


@pytest.mark.parametrize(("changes", "part"), OURS.values(), ids=OURS)
def test_settings_of_ours_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], part: str
) -> None:
    native_switch(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    refuses(lambda: nn.SparseAutoencoder.from_pretrained(tmp_path), str(tmp_path), part)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "transposed": (
        lambda t: t.update(W_router=t["W_router"].T.contiguous()),
        "got {",
    ),
    "missing": (lambda t: t.pop("b_router"), "'b_router': [6]"),
    "nan": (lambda t: t["W_router"][1].fill_(torch.nan), "W_router holds NaN or infinity"),
    "half": (lambda t: t.update(W_router=t["W_router"].half()), "one floating point dtype"),
}


@pytest.mark.parametrize(("damage", "part"), DAMAGE.values(), ids=DAMAGE)
def test_weights_of_ours_that_are_refused(tmp_path: Path, damage: Any, part: str) -> None:
    native_switch(tmp_path)
    path = tmp_path / "sae.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    damage(tensors)
    save_file(tensors, path)
    refuses(lambda: nn.SparseAutoencoder.from_pretrained(tmp_path), str(path), part)


def test_the_scale_is_folded_into_the_router_too(tmp_path: Path) -> None:
    """A power of two: the same codes and experts, bit for bit."""
    config = dataclasses.replace(SWITCH, activation_scale=8.0)
    tensors = exact_tensors(SWITCH) | {"W_router": exact_tensors(SWITCH)["W_router"] / 4096}
    sae = nn.from_weights(config, tensors)
    sae.save_pretrained(tmp_path)
    again = nn.SwitchSAE.from_pretrained(tmp_path)
    assert again.config == SWITCH
    assert_bitwise("W_router", again.W_router.detach(), tensors["W_router"] * 8)
    assert_bitwise("b_router", again.b_router.detach(), tensors["b_router"] / 8)
    x = tokens_of(SWITCH).float() / 8
    (x_hat, codes), (again_x_hat, again_codes) = sae(x), again(x)
    assert_bitwise("probabilities", *(c.routing.probabilities for c in (codes, again_codes)))
    assert_bitwise("indices", again_codes.indices, codes.indices)
    assert_bitwise("values", again_codes.values * 8, codes.values)
    assert_bitwise("x_hat", again_x_hat, x_hat)
