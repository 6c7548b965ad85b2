"""Calls from several threads at once have the bits of calls one after the other, lock or none."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from sae_kernels.functional import decode, encode_topk


def _both_ways(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    W = W.clone().requires_grad_()
    codes = encode_topk(x, W, b, 16)
    x_hat = decode(codes, W)
    x_hat.square().mean().backward()
    assert W.grad is not None
    return codes.values.detach(), codes.indices, x_hat.detach(), W.grad


def test_threads_have_the_bits_of_calls_one_after_the_other() -> None:
    g = torch.Generator().manual_seed(0)
    W, b = torch.randn(512, 64, generator=g), torch.randn(512, generator=g)
    batches = [torch.randn(50 + 7 * i, 64, generator=g) for i in range(16)]
    alone = [_both_ways(x, W, b) for x in batches]
    with ThreadPoolExecutor(len(batches)) as threads:
        at_once = list(threads.map(lambda x: _both_ways(x, W, b), 10 * batches))
    for came, expected in zip(at_once, 10 * alone, strict=True):
        for a, e in zip(came, expected, strict=True):
            assert torch.equal(a, e)
