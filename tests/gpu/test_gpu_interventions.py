"""Edits on a GPU: a bank captured in a CUDA graph follows what is written to it later."""

from __future__ import annotations

import torch

from sae_kernels.interventions import EditBank, clamp, scale, set_to, steer
from sae_kernels.nn import TopKSAE


def test_a_captured_bank_follows_later_edits(device: torch.device) -> None:
    sae = TopKSAE(64, 512, k=16, device=device).requires_grad_(False)
    bank = EditBank(sae, n_requests=4, n_slots=3, n_directions=1)
    x = torch.randn(32, 64, device=device)
    requests = torch.arange(32, device=device) % 4
    positions = torch.arange(32, device=device) // 4
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):  # kernels are compiled before the capture
        bank(x, requests, positions)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out = bank(x, requests, positions)
    direction = torch.linspace(-1, 1, 64)
    for edits in ([set_to(3, 4.0)], [scale(5, 2.0), clamp(7, low=1.0), steer(direction)], []):
        bank.write(1, edits)
        x.copy_(torch.randn(32, 64, device=device))
        graph.replay()
        with torch.no_grad():
            assert torch.equal(out, bank(x, requests, positions))
        assert torch.equal(out[requests != 1], x[requests != 1])
