"""Makes a small SAE's folder in every format."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from foreign import D, F, exact_tensors

from sae_kernels import nn
from sae_kernels.formats import write_dictionary_learning, write_saelens, write_sparsify
from sae_kernels.nn import JumpReLUConfig, ReLUConfig, SwitchConfig, TopKConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOPK = TopKConfig(D, F, k=2, relu="before")
SWITCH = SwitchConfig(D, F, k=2, n_experts=4)


def native(folder: Path) -> None:
    nn.from_weights(TOPK, exact_tensors(TOPK)).save_pretrained(folder)


def saelens(folder: Path) -> None:
    write_saelens(folder, TOPK, exact_tensors(TOPK))


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


MAKE: dict[str, Callable[[Path], None]] = {
    "native": native,
    "saelens": saelens,
    "sparsify": sparsify,
    "dictionary_learning": dictionary_learning,
    "gemma_scope": gemma_scope,
}
