"""Makes a small SAE's folder in every format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from foreign import D, F, exact_tensors

from sae_kernels import nn
from sae_kernels.formats import (
    write_circuit_tracer,
    write_dictionary_learning,
    write_saelens,
    write_sparsify,
)
from sae_kernels.nn import JumpReLUConfig, ReLUConfig, SwitchConfig, TopKConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOPK = TopKConfig(D, F, k=2, relu="before")
SWITCH = SwitchConfig(D, F, k=2, n_experts=4)


def native(folder: Path) -> None:
    nn.from_weights(TOPK, exact_tensors(TOPK)).save_pretrained(folder)


def saelens(folder: Path) -> None:
    place = {"model": "gpt2", "layer": "transformer.h.3"}
    write_saelens(folder, TOPK, exact_tensors(TOPK), {"activations": place})


def sparsify(folder: Path) -> None:
    write_sparsify(folder, TOPK, exact_tensors(TOPK))


def dictionary_learning(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    t = exact_tensors(ReLUConfig(D, F))
    linear = {"encoder.weight": t["W_enc"], "decoder.weight": t["W_dec"].T}
    torch.save(linear | {"encoder.bias": t["b_enc"], "bias": t["b_dec"]}, folder / "ae.pt")
    trainer = {"dict_class": "AutoEncoder", "activation_dim": D, "dict_size": F}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer}))


def native_switch(folder: Path) -> None:
    nn.from_weights(SWITCH, exact_tensors(SWITCH)).save_pretrained(folder)


def dictionary_learning_switch(folder: Path) -> None:
    tensors = exact_tensors(SWITCH) | {"b_enc": torch.zeros(F)}
    write_dictionary_learning(folder, SWITCH, tensors)


def gemma_scope(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    t = exact_tensors(JumpReLUConfig(D, F, log_threshold=False))
    np.savez(
        folder / "params.npz",
        **{n: np.asarray(v) for n, v in (t | {"W_enc": t["W_enc"].T}).items()},
    )


def circuit_tracer(folder: Path) -> None:
    config = JumpReLUConfig(D, F, d_out=D, log_threshold=False, subtract_b_dec=False)
    place = {"hook_name": "blocks.3.hook_resid_mid", "hook_name_out": "blocks.3.hook_mlp_out"}
    write_circuit_tracer(folder, config, exact_tensors(config), {"activations": place})


MAKE: dict[str, Callable[[Path], None]] = {
    "native": native,
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "gemma_scope": gemma_scope,
    "circuit_tracer": circuit_tracer,
}
