"""Our modules in torch's own parallel wrappers: gradients are those of the whole batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from sae_kernels.distributed.thresholds import average_last_key_
from sae_kernels.functional import decode, encode_topk
from sae_kernels.nn import architecture
from tests.distributed.problems import batches
from tests.distributed.world import on_ranks

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from sae_kernels.nn import SparseAutoencoder

KINDS = ["topk", "jumprelu", "gated"]
TOKENS, WIDTH, LATENTS = 48, 16, 96


def made(kind: str) -> SparseAutoencoder:
    more = {"k": 6} if "topk" in kind else {}
    make = architecture(kind)
    return make(make.config_class(d_in=WIDTH, n_latents=LATENTS, **more), seed=3)


def loss_of(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Means over the tokens, so that those of equal shares have the whole batch's as their mean."""
    output = module(x)
    penalty = output.codes.values.abs().sum() / len(x)
    loss: torch.Tensor = (output.x_hat - x).square().mean() + 0.01 * penalty
    return loss


def gradients(group: ProcessGroup | None, wrap: str) -> dict[str, dict[str, torch.Tensor]]:
    (x,) = batches(1, TOKENS, WIDTH)
    if group is not None:
        x = x.chunk(group.size())[group.rank()]
    found = {}
    for kind in KINDS:
        sae = made(kind).train()
        module: torch.nn.Module = sae
        if wrap == "ddp":
            module = DistributedDataParallel(sae, process_group=group, find_unused_parameters=True)
        elif wrap == "fsdp":
            assert group is not None
            module = fully_shard(sae, mesh=DeviceMesh.from_group(group, "cpu"))
        loss_of(module, x).backward()
        found[kind] = {
            n: p.grad.full_tensor() if wrap == "fsdp" else p.grad
            for n, p in sae.named_parameters()
            if p.grad is not None and p.grad.any()
        }
    return found


@pytest.mark.parametrize("wrap", ["ddp", pytest.param("fsdp", marks=pytest.mark.full)])
def test_gradients_are_those_of_the_whole_batch(wrap: str) -> None:
    expected = gradients(None, "")
    for found in on_ranks(2, gradients, wrap):
        for kind in KINDS:
            assert found[kind].keys() == expected[kind].keys() >= {"W_enc", "W_dec", "b_dec"}
            for name, gradient in found[kind].items():
                one = expected[kind][name]
                # Sums of fp32 in another order: a few units in the last place of the largest.
                away = (gradient - one).abs().max() / one.abs().max()
                assert away < 64 * torch.finfo(torch.float32).eps, f"{kind}, {name}: {away}"


def thresholds(group: ProcessGroup, steps: int, together: bool) -> list[list[float]]:
    sae = made("batchtopk").train()
    module = DistributedDataParallel(sae, process_group=group, broadcast_buffers=False)
    optimizer = torch.optim.SGD(sae.parameters(), lr=1e-3)
    lines = []
    for rows in batches(steps, TOKENS, WIDTH):
        x = rows.chunk(group.size())[group.rank()]
        optimizer.zero_grad()
        loss_of(module, x).backward()
        optimizer.step()
        own = float(sae.last_key)
        if together:
            average_last_key_(sae, group)
        lines.append([own, float(sae.last_key)])
        sae.after_step_(torch.tensor(True))
    return [*lines, [float(sae.threshold)]]


def test_ranks_agree_on_the_threshold() -> None:
    one, other = on_ranks(2, thresholds, 3, True)
    for (own, mean), (others, same) in zip(one[:-1], other[:-1], strict=True):
        assert own != others
        assert mean == same == (own + others) / 2
    assert one[-1] == other[-1]


@pytest.mark.full
def test_without_it_they_do_not() -> None:
    one, other = on_ranks(2, thresholds, 3, False)
    assert one[-1] != other[-1]


def messages(group: ProcessGroup) -> list[str]:
    mesh = DeviceMesh.from_group(group, "cpu")
    x, W = torch.randn(8, WIDTH), torch.randn(LATENTS, WIDTH)
    rows = distribute_tensor(W, mesh, [Shard(0)])
    codes, found = encode_topk(x, W, None, 4), []
    calls: list[Any] = [
        lambda: encode_topk(x, rows, None, 4),
        lambda: encode_topk(distribute_tensor(x, mesh, [Replicate()]), rows, None, 4),
        lambda: decode(codes, rows),
    ]
    for call in calls:
        try:
            call()
            found.append("computed")
        except (RuntimeError, TypeError) as error:
            found.append(str(error))
    return found


def test_distributed_tensors_are_refused() -> None:
    """By torch, in place of a gather of all rows that nobody asked for."""
    for mixed, sharded, decoded in on_ranks(2, messages):
        assert "sae_kernels.select_topk.default got mixed torch.Tensor and DTensor" in mixed
        assert "sae_kernels.select_topk.default does not have a sharding strategy" in sharded
        assert "sae_kernels.decode.default got mixed torch.Tensor and DTensor" in decoded
