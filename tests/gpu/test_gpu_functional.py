"""The differentiable functions and the trainer on a GPU, against the CPU."""

from __future__ import annotations

import pytest
import torch

from sae_kernels import decode, encode_topk
from sae_kernels.nn import TopKConfig
from sae_kernels.testing import assert_bitwise
from sae_kernels.training import evaluate, train

PRIMITIVES = ("code_grad", "decode", "row_grad", "select_topk", "transpose_codes")
B, D, F, K = 300, 96, 1500, 12


def leaves(device: torch.device) -> list[torch.Tensor]:
    """x, W_enc, b_enc, W_dec, b_dec of small integers: every sum is exact, in any order."""
    generator = torch.Generator("cpu").manual_seed(0)
    shapes = ((B, D), (F, D), (F,), (F, D), (D,))
    made = (torch.randint(-2, 3, shape, generator=generator).float() for shape in shapes)
    return [t.to(device).requires_grad_() for t in made]


def pass_through(device: torch.device, groups: bool) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a forward and a backward pass, on the CPU again."""
    x, W_enc, b_enc, W_dec, b_dec = inputs = leaves(device)
    ends = torch.tensor([500, F], dtype=torch.int32, device=device) if groups else None
    codes = encode_topk(x, W_enc, b_enc, K, b_dec=b_dec)
    out = decode(codes, W_dec, b_dec, group_ends=ends)
    grads = torch.autograd.grad(out.sum(), inputs)
    named = {"indices": codes.indices, "values": codes.values, "out": out}
    named |= dict(zip(("x", "W_enc", "b_enc", "W_dec", "b_dec"), grads, strict=True))
    return {name: tensor.detach().cpu() for name, tensor in named.items()}


@pytest.mark.parametrize("groups", [False, True], ids=["plain", "groups"])
def test_forward_and_backward_are_the_cpus_bit_for_bit(groups: bool, device: torch.device) -> None:
    ours, expected = (pass_through(d, groups) for d in (device, torch.device("cpu")))
    for name, tensor in expected.items():
        assert_bitwise(name, ours[name] + 0, tensor + 0)  # a sum may be a zero of either sign


def test_compiled_is_eager(device: torch.device) -> None:
    x, W_enc, b_enc, W_dec, b_dec = leaves(device)

    def reconstruct(x: torch.Tensor) -> torch.Tensor:
        return decode(encode_topk(x, W_enc, b_enc, K, b_dec=b_dec), W_dec, b_dec)

    assert_bitwise("x_hat", torch.compile(reconstruct, fullgraph=True)(x), reconstruct(x))


def test_a_run_learns_as_on_the_cpu(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(1)
    directions = torch.nn.functional.normalize(torch.randn(64, D, generator=generator))
    active = (torch.rand(6000, 64, generator=generator) < 0.08).float()
    data = active @ directions + 0.02 * torch.randn(6000, D, generator=generator)
    fvu = []
    for where in ("cpu", str(device)):
        options = {"steps": 300, "batch_size": 256, "lr": 3e-3, "compute": "float32"}
        result = train(TopKConfig(D, 256, 8), data[:5000], **options, device=where)
        assert result.sae.W_enc.device.type == torch.device(where).type
        fvu.append(evaluate(result.sae, data[5000:]).fvu)
    assert fvu[0] < 0.3
    assert fvu[1] == pytest.approx(fvu[0], rel=0.02)
