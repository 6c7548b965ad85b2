"""Every objective under torch.compile(fullgraph=True): loss, gradients and buffers as in eager."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.nn.objective import Context, objective_of
from sae_kernels.step import AutogradStep
from sae_kernels.step.base import loss_scale
from sae_kernels.testing import assert_bitwise
from tests.step.architectures import ARCHITECTURES, batch, build
from tests.torch_versions import one_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from sae_kernels.nn.objective import Prefixes


pytestmark = one_graph

# BatchTopK of all layers together asks the host for the batch's cut (docs/architectures.md).
ASKS_THE_HOST = ("clt-batchtopk", "causal-crosscoder-none")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def loss_of(step: AutogradStep, prefixes: Prefixes | None, x: Tensor, target: Tensor) -> Tensor:
    """All reconstructions' errors and the penalties; then what follows a step in the module."""
    sae, schedule = step.sae, step.schedule
    context = Context(
        sae=sae,
        objective=step.objective,
        x=sae.centred(x),
        target=target,
        scale=loss_scale(target, step.objective.loss)[0],
        k=getattr(sae.config, "k", 0),
        coefficient=schedule.coefficient(),
        p=schedule.p,
        observe=lambda codes: None,  # the schedule's is a list that grows: the step's, on the host
        dead_mask=step.dead.mask,
        prefixes=prefixes,
    )
    preacts = sae.select(context.x, k=sae.kept_per_token(context.k, step.objective))
    parts, penalty = objective_of(preacts, context)
    loss = torch.zeros(()) if penalty is None else penalty
    for part in parts:
        codes, frozen = preacts.with_values(part.values), not part.trains_decoder
        x_hat = sae.decode_scaled(codes, x, prefixes=prefixes, frozen=frozen)
        squares = (x_hat - target).square().sum((-1, -2))
        if prefixes is not None:
            squares = (prefixes.weights * squares).sum()
        loss = loss + part.weight * context.scale * squares
    sae.after_step_(loss.detach().isfinite())
    return loss


def outcome(loss: Callable[..., Tensor], step: AutogradStep, *given: object) -> dict[str, Tensor]:
    """The loss, all gradients and all buffers, by name."""
    step.sae.zero_grad()
    result = loss(step, *given)
    result.backward()
    named = step.sae.named_parameters()
    grads = {f"{n}.grad": torch.zeros_like(p) if p.grad is None else p.grad for n, p in named}
    return {"loss": result.detach()[None], **grads} | {
        name: buffer.clone().reshape(-1) for name, buffer in step.sae.named_buffers()
    }


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in ASKS_THE_HOST])
def test_an_objective_is_one_graph_with_the_bits_of_eager(name: str) -> None:
    case = ARCHITECTURES[name]
    ours, eager = (build(case, AutogradStep, "cpu") for _ in range(2))
    for step in (ours, eager):
        step.sae.train()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager", dynamic=True)
    # Random prefixes are drawn on the host, before a graph.
    prefixes = ours.sae.prefixes(ours.objective, 0, 0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, n_tokens in enumerate((13, 8)):
            x, y = batch(case, n_tokens, seed)
            given = (prefixes, x, x if y is None else y)
            got, want = outcome(compiled, ours, *given), outcome(loss_of, eager, *given)
            for what, expected in want.items():
                assert_bitwise(f"{what} of {n_tokens} tokens", got[what], expected)
