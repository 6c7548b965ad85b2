"""The input data of a case, written once and read by every contestant's process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file

from sae_kernels.functional import encode_batch_topk, encode_topk

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.bench.cases import Case
    from sae_kernels.data.rows import RowSource


def activations(
    popularity: str, tokens: int, d_in: int, n_latents: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations [B, D] and unit encoder rows [F, D], from seed 0.

    "uniform": normal activations, so that all latents are chosen about equally often. "zipf": each
    token is a sum of k encoder rows and a little noise, the row of rank r with a probability near
    1/r: a few latents are in very many tokens, as in trained SAEs.
    """
    draw = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(n_latents, d_in, generator=draw), dim=1)
    if popularity == "uniform":
        return torch.randn(tokens, d_in, generator=draw), W
    weights = 1 / torch.arange(1, n_latents + 1, dtype=torch.float64)
    chosen = torch.multinomial(weights, tokens * k, replacement=True, generator=draw)
    strength = torch.rand(tokens, k, 1, generator=draw) + 0.5
    noise = torch.randn(tokens, d_in, generator=draw) / d_in**0.5
    # A token at a time the gathered rows would not fit beside everything else.
    sums = [
        (W[some] * by).sum(1)
        for some, by in zip(chosen.view(tokens, k).split(256), strength.split(256), strict=True)
    ]
    return torch.cat(sums) + 0.1 * noise, W


def threshold(x: torch.Tensor, W: torch.Tensor, l0: float) -> float:
    """The threshold above which k pre-activations of a token lie on average."""
    some = x[:: max(1, x.shape[0] // 128)].bfloat16()
    return float(encode_batch_topk(some, W.bfloat16(), None, l0).values.min())


def write(case: Case, path: Path, data: RowSource | None = None) -> dict[str, float]:
    """Writes the tensors of a case as safetensors; returns the options that fit them.

    Args:
        case: what is measured.
        path: the file.
        data: stored activations [N, D] for the popularity "real".

    Raises:
        ValueError: "real" without data, or data that do not fit.
    """
    B, D, F, K = case.shape
    if case.popularity == "real":
        x, W = _stored(case, data), activations("uniform", 1, D, F, K)[1]
    else:
        x, W = activations(case.popularity, B, D, F, K)
    options, b_enc = {}, torch.zeros(F)
    if case.architecture in ("jumprelu", "relu"):
        edge = threshold(x, W, K)
        options = {"coefficient": 1e-3}
        if case.architecture == "relu":  # a bias that leaves k latents of a token on
            b_enc -= edge
        else:
            options |= {"threshold": edge, "bandwidth": 0.1 * edge}
    codes = encode_topk(x, W, b_enc, K)
    tensors = {"x": x, "W_enc": W, "b_enc": b_enc, "W_dec": W.clone(), "b_dec": torch.zeros(D)}
    tensors |= {"values": codes.values, "indices": codes.indices.long()}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return options


def _stored(case: Case, data: RowSource | None) -> torch.Tensor:
    B, D = case.shape[:2]
    if data is None:
        raise ValueError(f"{case.name}: expected --data with stored activations, got none")
    if data.d_in != D or data.n_tokens < B:
        raise ValueError(
            f"{case.name}: expected at least {B:,} tokens of width {D}, got {data.n_tokens:,} of "
            f"width {data.d_in}"
        )
    return data.rows(0, B).activations.float()
