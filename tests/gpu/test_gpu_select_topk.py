"""select_topk on each GPU backend at a middle shape: the fp64 oracle, memory, repeatability."""

from __future__ import annotations

import pytest
import torch

from sae_kernels import backends
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.testing import (
    assert_bitwise,
    assert_same_selection,
    assert_within,
    oracles,
    rounding,
)

PRIMITIVES = ("select_topk",)
B, D, F, K = 512, 768, 16384, 32


# Not named "backend": that fixture's backends are those of a plain run, which has none for GPUs.
@pytest.fixture(params=["cuda", "triton", "gluon"])
def gpu_backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    name: str = request.param
    found = dict(backends.candidates("select_topk", device, torch.bfloat16))
    if found[name] is not None:
        pytest.skip(f"{name}: {found[name]}")
    return name


def operands(
    n_tokens: int, n_latents: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(n_tokens, D, generator=generator)
    W = torch.randn(n_latents, D, generator=generator) / D**0.5
    b = torch.randn(n_latents, generator=generator) / 8
    return x.to(device, dtype), W.to(device, dtype), b.to(device)


@pytest.mark.parametrize("k", [1, K, 200])
def test_agrees_with_the_oracle(k: int, gpu_backend: str, device: torch.device) -> None:
    x, W, b = operands(B, F, device)
    values, indices = select_topk(x, W, b, k, None, backend=gpu_backend)
    exact = oracles.scores(x.cpu(), W.cpu(), b.cpu())
    budget = rounding(D + 1, exact.magnitude, torch.bfloat16)
    kept = indices.long().cpu()
    assert_same_selection(gpu_backend, kept, exact.key, k, budget)
    assert_within(gpu_backend, values.cpu(), exact.h.gather(1, kept), budget.gather(1, kept))


def test_a_screen_changes_no_bit(gpu_backend: str, device: torch.device) -> None:
    if gpu_backend != "triton":
        pytest.skip("scores are screened in Triton alone")
    from sae_kernels.primitives.select_topk import triton

    x, W, b = operands(B, F, device, torch.float32)
    plain, screened = (triton.run(x, W, b, K, None, screened=s) for s in (False, True))
    for name, came, expected in zip(("values", "indices"), screened, plain, strict=True):
        assert_bitwise(name, came, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n_tokens", [1, 4, 16])
def test_few_tokens_have_the_bits_of_a_block(
    n_tokens: int, dtype: torch.dtype, gpu_backend: str, device: torch.device
) -> None:
    if gpu_backend != "triton":
        pytest.skip("few tokens have kernels of their own in Triton alone")
    from sae_kernels.primitives.select_topk import triton

    x, W, b = operands(B, F, device, dtype)
    block = triton.run(x, W, b, K, None, screened=False)
    few = triton.run(x[:n_tokens], W, b, K, None)
    for name, came, expected in zip(("values", "indices"), few, block, strict=True):
        assert_bitwise(name, came, expected[:n_tokens])


def test_a_sorted_dictionary_is_no_worse(gpu_backend: str, device: torch.device) -> None:
    # Latents in ascending order of their bias: every tile beats all tiles before it.
    x, W, b = operands(B, F, device)
    b = b.sort().values * 40
    _, indices = select_topk(x, W, b, K, None, backend=gpu_backend)
    exact = oracles.scores(x.cpu(), W.cpu(), b.cpu())
    budget = rounding(D + 1, exact.magnitude, torch.bfloat16)
    assert_same_selection(gpu_backend, indices.long().cpu(), exact.key, K, budget)


def test_twenty_repeats_are_bitwise_equal(gpu_backend: str, device: torch.device) -> None:
    x, W, b = operands(B, F, device)
    first = select_topk(x, W, b, K, None, backend=gpu_backend)
    for _ in range(20):
        for name, a, e in zip(
            ("values", "indices"),
            select_topk(x, W, b, K, None, backend=gpu_backend),
            first,
            strict=True,
        ):
            assert_bitwise(name, a.cpu(), e.cpu())


def test_the_scores_are_never_in_memory(gpu_backend: str, device: torch.device) -> None:
    # 128 times the latents: in bf16 their scores would take 2 GiB more.
    taken = []
    for n_latents in (1 << 10, 1 << 17):
        x, W, b = operands(8192, n_latents, device)
        select_topk(x, W, b, K, None, backend=gpu_backend)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        select_topk(x, W, b, K, None, backend=gpu_backend)
        taken.append(torch.cuda.max_memory_allocated(device) - before)
    assert taken[1] - taken[0] < 32 << 20, f"{taken[0]} bytes, then {taken[1]}"
