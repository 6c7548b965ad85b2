"""The CPU bars of cross-layer transcoders: ``python -m benchmarks.cross_layer_bars [--out FILE]``.

A TopK step in fp32 against the same step written densely in eager torch: its time, and its peak
memory above weights and moments, each in a process of its own. And decoding against streaming as
many bytes as it reads of decoder rows. The bars: a ratio of 8 and of 4, and of at most 1.3.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.study import Records, Runs, bars, peak_of, peaks, ratios
from sae_kernels.bench.inputs import activations
from sae_kernels.config import OptimizerConfig
from sae_kernels.nn import CrossLayerTopK
from sae_kernels.step import FusedStep

if TYPE_CHECKING:
    from collections.abc import Callable

LR = 1e-4


class Shape(NamedTuple):
    """Layers, their width, latents that read one, tokens and latents kept per token and layer."""

    layers: int
    width: int
    latents: int
    tokens: int
    k: int


ASKED = Shape(6, 384, 3072, 1024, 32)
SMALL = Shape(3, 16, 64, 32, 4)


class DenseCrossLayerStep:
    """The step of a TopK cross-layer transcoder written densely: autograd, and torch's fused Adam.

    Args:
        clt: whose weights it copies.
    """

    def __init__(self, clt: CrossLayerTopK) -> None:
        n, self.k = clt.config.n_layers, clt.config.k
        parts = (*clt.W_enc.chunk(n), *clt.W_dec.split(clt.config.writers))
        self.matrices = [part.detach().clone().requires_grad_() for part in parts]
        self.b_enc = [b.detach().clone().requires_grad_() for b in clt.b_enc.chunk(n)]
        self.b_dec = [b.detach().clone().requires_grad_() for b in clt.b_dec.chunk(n)]
        every = [*self.matrices, *self.b_enc, *self.b_dec]
        self.optimizer = torch.optim.Adam(every, lr=LR, fused=True)

    def __call__(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """One step on layers side by side, [B, layers * width]; returns its FVU."""
        n = len(self.b_enc)
        codes = []
        for rows, W, b in zip(x.chunk(n, 1), self.matrices[:n], self.b_enc, strict=True):
            h = torch.nn.functional.linear(rows, W, b).relu()
            values, indices = h.topk(self.k, dim=1, sorted=False)
            codes.append(torch.zeros_like(h).scatter(1, indices, values))
        f = torch.cat(codes, 1)
        decoders = zip(self.matrices[n:], self.b_dec, strict=True)
        x_hat = torch.cat([f[:, : len(W)] @ W + b for W, b in decoders], 1)
        loss = (x_hat - target).square().sum() / (target - target.mean(0)).square().sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def problem(kind: str, shape: Shape) -> tuple[CrossLayerTopK, torch.Tensor, torch.Tensor]:
    """A transcoder whose encoder rows its inputs are made of, the inputs and the targets."""
    L, D, F, B, k = shape
    x, W = activations(kind, B, D, F, k)
    clt = CrossLayerTopK(D, L * F, n_layers=L, d_out=D, k=k)
    clt.W_enc.data.copy_(torch.cat([W.roll(layer, 1) for layer in range(L)]))
    layers = torch.cat([x.roll(layer, 1) for layer in range(L)], 1)
    return clt, layers, layers.flip(1).contiguous()


def steps_of(kind: str, shape: Shape) -> Runs:
    """One step of each, by name, on the same weights and batch."""
    clt, x, target = problem(kind, shape)
    dense = DenseCrossLayerStep(clt)
    step = FusedStep(clt, optimizer=OptimizerConfig(compute="float32"))
    for t in step.state().tensors.values():
        t.mul_(1)  # fresh zeros have no memory before they are written
    return {
        "dense fp32": partial(dense, x, target),
        "FusedStep fp32": partial(step, x, target=target, lr=LR),
    }


def step(kind: str, rounds: int, shape: Shape = ASKED) -> Records:
    """Time of a step: the dense one's ratio is to be 8 or more."""
    runs = steps_of(kind, shape)
    yield from ratios(f"CLT step {kind}", runs, "FusedStep fp32", rounds)


def memory(kind: str, rounds: int, shape: Shape = ASKED) -> Records:
    """Peak of a step above weights and moments: the dense one's ratio is to be 4 or more."""
    names, threads = ("FusedStep fp32", "dense fp32"), torch.get_num_threads()
    runs = {name: partial(peak, name, kind, shape, threads) for name in names}
    yield from peaks(f"CLT memory {kind}", runs, "FusedStep fp32")


def peak(name: str, kind: str, shape: Shape, threads: int) -> int:
    """Bytes that a step takes at its highest beyond what is kept between steps.

    Raises:
        OSError: another system than Linux.
    """
    torch.set_num_threads(threads)
    for run in steps_of(kind, SMALL).values():
        run()  # libraries and thread pools
    run = steps_of(kind, shape)[name]
    if isinstance(dense := run.func, DenseCrossLayerStep):  # type: ignore[attr-defined]
        run()  # Adam's states are made in the first
        dense.optimizer.zero_grad(set_to_none=True)
    return peak_of(run)


def decode(kind: str, rounds: int, shape: Shape = ASKED) -> Records:
    """Time to decode, to be at most 1.3 of streaming the bytes of all rows that it reads."""
    clt, x, _ = problem(kind, shape)
    with torch.no_grad():
        codes = clt.encode(x)
        n_rows = clt.decoder_codes(codes).values.numel()
        runs: Runs = {
            "rows streamed": streaming(clt.W_dec, n_rows),
            "decode": torch.no_grad()(partial(clt.decode_scaled, codes)),
        }
        yield from ratios(f"CLT decode {kind}", runs, "rows streamed", rounds)


def streaming(W: torch.Tensor, n_rows: int) -> Callable[[], None]:
    """Reads so many rows of a matrix one after the other, again from the first after the last."""

    def run() -> None:
        for first in range(0, n_rows, len(W)):
            W[: n_rows - first].sum()

    return run


GROUPS = {"step": step, "memory": memory, "decode": decode}


if __name__ == "__main__":
    bars(GROUPS, __doc__, "cross_layer_bars")
