"""The gradient of a Switch SAE's router."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.functional.route import softmax_backward
from sae_kernels.primitives.terms import Gradient

if TYPE_CHECKING:
    import torch

    from sae_kernels.functional import Routing

_WIDENED = 256  # tokens


def router_gradients(
    W_router: torch.Tensor,
    shift: torch.Tensor,
    routing: Routing,
    grad: torch.Tensor,
    x_centred: torch.Tensor,
) -> dict[str, Gradient]:
    """Gradients of W_router and b_router from those of the probabilities.

    Args:
        W_router: [E, input width].
        shift: [input width], what the router subtracts from centred tokens.
        routing: of the batch.
        grad: fp32 [B, E], the loss's derivative by the probabilities.
        x_centred: [B, input width], as the encoder saw it.
    """
    by_logit = softmax_backward(routing.probabilities.detach(), grad)
    total = by_logit.sum(0)
    W = W_router.detach().to(x_centred.dtype).float()  # as it was multiplied
    dW = -total[:, None] * shift.detach()
    # The tokens are widened some at a time: on a CPU fresh pages for all of them cost more.
    at_once = len(x_centred) if x_centred.is_cuda else _WIDENED
    for some, tokens in zip(by_logit.split(at_once), x_centred.split(at_once), strict=True):
        dW.addmm_(some.T, tokens.float())
    return {"W_router": Gradient.whole(dW), "b_router": Gradient.whole(-(total @ W)[None])}
