"""What a Switch SAE's router learns from: the gates of the codes, and how busy its experts are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.functional import RoutedCodes, load_balance
from sae_kernels.functional.route import softmax_backward
from sae_kernels.primitives.terms import Gradient

if TYPE_CHECKING:
    import torch

    from sae_kernels.codes import SparseCodes
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.functional import Routing
    from sae_kernels.nn import SwitchSAE

_WIDENED = 256  # tokens


def balance(pre: SparseCodes, width: int, config: TrainConfig) -> torch.Tensor | None:
    """The load-balance loss in units of the squared error's, or None where there is none.

    ``balance_coefficient E sum_i F_i P_i``, times the width where squared errors of as many outputs
    are added up (loss "mse"; amudide/switch_sae's lb_alpha).
    """
    if not config.balance_coefficient or not isinstance(pre, RoutedCodes):
        return None
    unit = width if config.loss == "mse" else 1
    return config.balance_coefficient * unit * load_balance(pre.routing)


def largest_load(sae: SwitchSAE, fired: torch.Tensor) -> torch.Tensor:
    """The part of the codes that the busiest expert has, of the experts that tokens go to.

    Example:
        >>> import torch
        >>> from sae_kernels.nn import SwitchConfig, SwitchSAE
        >>> sae = SwitchSAE(SwitchConfig(d_in=2, n_latents=4, k=2, n_experts=2))
        >>> float(largest_load(sae, torch.tensor([3, 0, 1, 0])))
        0.75
    """
    by_expert = fired.view(sae.config.n_experts, -1).sum(1)[-sae.config.n_routed :]
    return by_expert.max() / by_expert.sum().clamp(min=1)


def router_gradients(
    sae: SwitchSAE, routing: Routing, slope: torch.Tensor, x_centred: torch.Tensor
) -> dict[str, Gradient]:
    """Those of W_router and b_router.

    Args:
        sae: whose router.
        routing: of the batch.
        slope: fp32 [B, E], the loss's derivative by the probabilities.
        x_centred: [B, input width], as the encoder saw it.
    """
    by_logit = softmax_backward(routing.probabilities.detach(), slope)
    total = by_logit.sum(0)
    W = sae.W_router.detach().to(x_centred.dtype).float()  # as it was multiplied
    dW = -total[:, None] * sae.router_shift().detach()
    # The tokens are widened some at a time: on a CPU fresh pages for all of them cost more.
    at_once = len(x_centred) if x_centred.is_cuda else _WIDENED
    for some, tokens in zip(by_logit.split(at_once), x_centred.split(at_once), strict=True):
        dW.addmm_(some.T, tokens.float())
    return {"W_router": Gradient.whole(dW), "b_router": Gradient.whole(-(total @ W)[None])}
