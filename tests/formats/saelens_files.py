"""SAELens' files as SAELens lays them out, its formulas on them, and our SAEs that it can hold."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from foreign import D, F, K, exact_tensors, keep_largest, wide
from safetensors.torch import save_file

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

    from torch import Tensor

FREE: dict[str, Any] = {"unit_norm_decoder": False}
RAW: dict[str, Any] = {"unit_norm_decoder": False, "subtract_b_dec": False}
SIGNED: dict[str, Any] = {"relu": "none", "by_magnitude": True}
RAW_THRESHOLD: dict[str, Any] = {"log_threshold": False}

# What comes back as it went: SAELens' own words for everything that matters after training.
CONFIGS: dict[str, SAEConfig] = {
    "standard": ReLUConfig(D, F, **FREE),
    "standard, input as it is": ReLUConfig(D, F, **RAW),
    "topk": TopKConfig(D, F, k=K, **FREE),
    "topk ranked by norms": TopKConfig(D, F, k=K, rank_by_decoder_norm=True, **RAW),
    "abstopk": TopKConfig(D, F, k=K, **SIGNED, **FREE),
    "abstopk, input as it is": TopKConfig(D, F, k=K, **SIGNED, **RAW),
    "abstopk ranked by norms": TopKConfig(D, F, k=K, rank_by_decoder_norm=True, **SIGNED, **FREE),
    "jumprelu": JumpReLUConfig(D, F, **RAW_THRESHOLD, **FREE),
    "gated": GatedConfig(D, F, **FREE),
    "gated, input as it is": GatedConfig(D, F, **RAW),
    "transcoder": ReLUConfig(D, F, d_out=9, **RAW),
    "skip_transcoder": ReLUConfig(D, F, d_out=9, skip=True, **RAW),
    "jumprelu_transcoder": JumpReLUConfig(D, F, d_out=D, **RAW_THRESHOLD, **RAW),
    "jumprelu_skip_transcoder": JumpReLUConfig(D, F, d_out=5, skip=True, **RAW_THRESHOLD, **RAW),
}
# What becomes something else of the same function.
OTHERS: dict[str, SAEConfig] = {
    "jumprelu from logarithms": JumpReLUConfig(D, F, **FREE),
    "jumprelu from batchtopk": BatchTopKConfig(D, F, k=2.5, **FREE),
    "jumprelu from ranked batchtopk": BatchTopKConfig(D, F, k=K, rank_by_decoder_norm=True),
    "jumprelu from nested groups": JumpReLUConfig(D, F, groups=(4, 12), **RAW_THRESHOLD),
    "jumprelu from groups": BatchTopKConfig(D, F, k=K, groups=(4, 12)),
    "jumprelu_transcoder from batchtopk": BatchTopKConfig(D, F, k=K, d_out=7, **RAW),
    "jumprelu_skip_transcoder from batchtopk": BatchTopKConfig(
        D, F, k=K, skip=True, rank_by_decoder_norm=True, **RAW
    ),
    "topk with its relu before": TopKConfig(D, F, k=K, relu="before", groups=(8, 8)),
}
EVERY = CONFIGS | OTHERS
PLACE = {
    "activations": {
        "model": "gpt2",
        "hook_name": "blocks.3.hook_resid_mid",
        "hook_name_out": "blocks.3.hook_mlp_out",
    }
}
CFG = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32"}


def their_formula(cfg: dict[str, Any], tensors: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """SAELens' classes on its own layout, in fp64."""
    w = wide(tensors)
    kind = cfg["architecture"]
    centred = x - w["b_dec"] if cfg["apply_b_dec_to_input"] else x
    norms = w["W_dec"].norm(dim=-1)
    if kind == "gated":
        gate = centred @ w["W_enc"] + w["b_gate"] > 0
        codes = gate * (centred @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
        return codes, codes @ w["W_dec"] + w["b_dec"]
    h = centred @ w["W_enc"] + w["b_enc"]
    if kind in ("topk", "abstopk"):
        h = h * norms if cfg["rescale_acts_by_decoder_norm"] else h
        if kind == "topk":
            codes = keep_largest(h, h, cfg["k"]).relu()
        else:
            codes = keep_largest(h, h.abs(), cfg["k"])
        codes = codes / norms if cfg["rescale_acts_by_decoder_norm"] else codes
    elif kind.startswith("jumprelu"):
        codes = h.relu() * (h > w["threshold"])
    else:
        codes = h.relu()
    y = codes @ w["W_dec"] + w["b_dec"]
    return codes, y + x @ w["W_skip"].T if "skip" in kind else y


def save(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """As SAELens lays it out."""
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")


def plain() -> dict[str, Tensor]:
    """The tensors of a plain ReLU SAE."""
    ours = exact_tensors(ReLUConfig(D, F))
    return ours | {"W_enc": ours["W_enc"].T}
