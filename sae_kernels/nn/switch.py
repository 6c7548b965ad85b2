"""Switch: a router sends every token to one of several small TopK SAEs."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sae_kernels import functional
from sae_kernels.functional import RoutedCodes
from sae_kernels.functional.recording import autocast_dtype
from sae_kernels.nn.initialise import geometric_median
from sae_kernels.nn.sae import SparseAutoencoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.config import SwitchConfig


class SwitchSAE(SparseAutoencoder):
    """``x_hat = b_dec + p W_dec^T topk(W_enc (x - b_dec) + b_enc)`` over one expert's latents.

    ``p = softmax(W_router (x - b_router))`` of the token's expert (arXiv 2410.08201). Latents keep
    their numbers among all F, expert e's being e F/E and those after it; encoding costs 1/E of a
    TopK SAE's. Codes come as :class:`~sae_kernels.functional.RoutedCodes`, which say where a token
    went.

    Attributes:
        W_router: [E, input width], E less the shared expert.
        b_router: [input width].

    Example:
        >>> from sae_kernels.nn import SwitchConfig, SwitchSAE
        >>> sae = SwitchSAE(SwitchConfig(d_in=8, n_latents=32, k=4, n_experts=4))
        >>> codes = sae.encode(torch.randn(5, 8))
        >>> (codes.indices // 8 == codes.routing.experts[:, None]).all()
        tensor(True)
    """

    config: SwitchConfig
    width_vectors = frozenset({"b_dec", "b_router"})

    def __init__(self, config: SwitchConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.b_enc.requires_grad_(config.encoder_bias)
        router = torch.empty(config.n_routed, config.input_width, device=self.W_enc.device)
        # torch.nn.Linear's range, drawn on the CPU like all else.
        generator = torch.Generator().manual_seed(options.get("seed", 0) + 1)
        if not router.is_meta:
            drawn = torch.rand(router.shape, generator=generator) * 2 - 1
            router.copy_(drawn / config.input_width**0.5)
        self.W_router = nn.Parameter(router)
        self.b_router = nn.Parameter(torch.zeros(config.input_width, device=router.device))

    def select(
        self,
        x_centred: torch.Tensor,
        *,
        W_enc: torch.Tensor | None = None,
        k: float | None = None,
    ) -> RoutedCodes:
        """The k largest pre-activations of each token in its expert, not multiplied with gates."""
        W_enc = self.W_enc if W_enc is None else W_enc
        k = int(self.config.k if k is None else k)
        routing = functional.route_top1(
            x_centred,
            self.W_router,
            self.router_shift(),
            compute_dtype=self.compute_dtype or autocast_dtype(x_centred) or W_enc.dtype,
            backend=self.backend,
        )
        options: dict[str, Any] = {
            "k": k,
            "relu": False,
            "compute_dtype": self.compute_dtype,
            "backend": self.backend,
        }
        first = self.config.expert_width if self.config.shared_expert else 0
        routed = functional.encode_topk(
            x_centred, W_enc[first:], self.b_enc[first:], routing=routing, **options
        )
        if not first:
            return routed
        shared = functional.encode_topk(x_centred, W_enc[:first], self.b_enc[:first], **options)
        return self._largest(shared, routed)

    def activate(self, pre: SparseCodes) -> SparseCodes:
        """ReLU, and the gate of the token's expert."""
        codes = super().activate(pre)
        return codes.with_values(codes.values * self._gates(pre))

    def fold_vectors_(self, scale: float, target_scale: float) -> None:
        """The router gives raw activations the logits that it gave scaled ones."""
        super().fold_vectors_(scale, target_scale)
        self.W_router.mul_(scale)
        self.b_router.div_(scale)

    def router_shift(self) -> torch.Tensor:
        """What the router subtracts from centred tokens, to see x - b_router."""
        return self.b_router - self.b_dec if self.config.subtract_b_dec else self.b_router

    @torch.no_grad()
    def initialise_b_dec_(
        self, x: torch.Tensor, centre: Callable[[torch.Tensor], torch.Tensor] = geometric_median
    ) -> None:
        """Sets b_dec, and with it b_router where the input is its own target."""
        super().initialise_b_dec_(x, centre)
        if not self.config.transcodes:
            self.b_router.copy_(self.b_dec)

    def _gates(self, pre: SparseCodes) -> torch.Tensor:
        """What each entry is multiplied with, like the values or [..., 1]."""
        if not isinstance(pre, RoutedCodes):
            raise TypeError(f"pre: expected RoutedCodes of select(), got {type(pre).__name__}")
        gates = pre.routing.gates().reshape(*pre.batch_shape, 1)
        if self.config.gate == "heaviside":  # a router's NaN must show all the same
            gates = torch.where(gates.detach().isnan(), torch.nan, 1.0)
        if not self.config.shared_expert:
            return gates
        return torch.where(pre.indices < self.config.expert_width, 1, gates)

    def _largest(self, shared: SparseCodes, routed: RoutedCodes) -> RoutedCodes:
        """Of both experts' entries those with the largest gated pre-activations."""
        indices = torch.cat([shared.indices, routed.indices + self.config.expert_width], -1)
        values = torch.cat([shared.values, routed.values], -1)
        both = dataclasses.replace(
            routed, values=values, indices=indices, n_latents=self.config.n_latents
        )
        key = (values * self._gates(both)).detach() + 0.0  # -0 becomes +0
        order = key.sort(dim=-1, descending=True, stable=True).indices[..., : routed.k]
        return both.with_values(values.gather(-1, order), indices.gather(-1, order))
