"""The functions alone, in a training loop of your own: any loss, any torch optimizer.

``sk.encode_topk`` and ``sk.decode`` differentiate in every argument; the [tokens, latents] matrix
never exists. The same loop in plain torch is beside it, on the same batches: the losses agree, the
seconds do not. The picture is ``examples-out/own-trainer.png``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import torch

import sae_kernels as sk

if TYPE_CHECKING:
    from collections.abc import Callable

OUT = Path("examples-out")
B, D, F, K, STEPS = 512, 256, 8192, 16, 15

Parameters = dict[str, torch.nn.Parameter]


def ours(x: torch.Tensor, p: Parameters) -> torch.Tensor:
    """The reconstruction by the kernels."""
    codes = sk.encode_topk(x, p["W_enc"], p["b_enc"], K, b_dec=p["b_dec"])
    return sk.decode(codes, p["W_dec"], p["b_dec"])


def dense(x: torch.Tensor, p: Parameters) -> torch.Tensor:
    """The reconstruction by plain torch."""
    h = torch.nn.functional.linear(x - p["b_dec"], p["W_enc"], p["b_enc"])
    values, indices = h.topk(K, dim=-1)
    codes = torch.zeros_like(h).scatter(-1, indices, values.relu())
    return codes @ p["W_dec"] + p["b_dec"]


def train(
    reconstruct: Callable[[torch.Tensor, Parameters], torch.Tensor], batches: list[torch.Tensor]
) -> tuple[list[float], list[float]]:
    """Losses, and seconds since the start, of every step."""
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(F, D, generator=g))
    start = {"W_enc": W, "b_enc": torch.zeros(F), "W_dec": W.clone(), "b_dec": torch.zeros(D)}
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in start.items()}
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-3)
    losses, seconds, began = [], [], time.perf_counter()
    for x in batches:
        error = reconstruct(x, parameters) - x
        loss = error.square().sum(-1).mean() + 0.1 * error.abs().sum(-1).mean()  # whatever you like
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    return losses, seconds


def main() -> None:
    """Trains by both, compares, draws."""
    g = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(1024, D, generator=g))
    chosen = torch.randint(0, 1024, (STEPS, B, K), generator=g)
    batches = [directions[rows].sum(1) for rows in chosen]
    curves = {"kernels": train(ours, batches), "plain torch": train(dense, batches)}
    for name, (losses, seconds) in curves.items():
        print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f} in {seconds[-1]:.2f} s")
    torch.testing.assert_close(curves["kernels"][0], curves["plain torch"][0], rtol=1e-3, atol=0)

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, (losses, seconds) in curves.items():
        axes.plot(seconds, losses, marker=".", label=name)
    axes.set(xlabel="seconds", ylabel="loss", title=f"The same {STEPS} steps")
    axes.legend(frameon=False)
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "own-trainer.png", dpi=150)


if __name__ == "__main__":
    main()
