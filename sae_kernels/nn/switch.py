"""Switch SAEs: a router sends every token to one of several TopK experts."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn
from torch.nn.functional import pad

from sae_kernels import functional
from sae_kernels.config.base import NOT_NEGATIVE, POSITIVE_INTEGER, setting
from sae_kernels.config.objective import ObjectiveConfig
from sae_kernels.config.sae import SAEConfig, Size
from sae_kernels.functional import RoutedCodes, Routing
from sae_kernels.functional.recording import autocast_dtype
from sae_kernels.functional.route import softmax_backward
from sae_kernels.nn.base import SparseAutoencoder
from sae_kernels.nn.initialise import geometric_median
from sae_kernels.nn.registry import Preset, register
from sae_kernels.primitives.terms import Gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.objective import Context, Reconstruction, SurveyContext

_WIDENED = 256  # tokens widened to fp32 at once


@dataclasses.dataclass(frozen=True)
class SwitchConfig(SAEConfig):
    """Settings of a Switch SAE (Mudide et al., arXiv 2410.08201).

    Example:
        >>> SwitchConfig(768, 24576, n_experts=8).expert_width
        3072
    """

    architecture: ClassVar[str] = "switch"

    k: int = setting(32, "latents kept per token, K", POSITIVE_INTEGER)
    n_experts: int = setting(
        8,
        "number of experts E; each has n_latents / n_experts consecutive latents",
        POSITIVE_INTEGER,
    )
    gate: Literal["softmax", "heaviside"] = setting(
        "softmax",
        "factor of the codes: softmax, the router's probability of the token's expert, through "
        "which the reconstruction loss trains the router; heaviside, 1, and only the load-balance "
        "loss trains it",
    )
    shared_expert: bool = setting(
        False,
        "the first expert encodes every token without a gate and the router chooses among the "
        "others; the k largest of both experts' gated codes are kept",
    )
    encoder_bias: bool = setting(
        True,
        "train b_enc; false keeps it at 0 (the paper; files of amudide/switch_sae cannot hold it)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_latents % self.n_experts:
            raise ValueError(
                f"n_experts: expected a divisor of n_latents = {self.n_latents}, got "
                f"{self.n_experts}"
            )
        if self.k > self.expert_width:
            raise ValueError(
                f"k: expected at most {self.expert_width}, the latents of one of {self.n_experts} "
                f"experts, got {self.k}"
            )
        if self.shared_expert and self.n_experts < 2:
            raise ValueError(
                "shared_expert: expected false with n_experts = 1, there is none to choose from"
            )

    @property
    def expert_width(self) -> int:
        """Latents per expert, F / E."""
        return self.n_latents // self.n_experts

    @property
    def largest_k(self) -> int:
        """The largest k: a token sees one expert's latents only."""
        return self.expert_width

    @property
    def n_encoded(self) -> int:
        """Latents that each token is multiplied with: its expert's and the shared expert's."""
        return self.expert_width * (1 + self.shared_expert)

    @property
    def n_routed(self) -> int:
        """Experts that the router chooses among: all but a shared one."""
        return self.n_experts - self.shared_expert

    def shapes(self) -> dict[str, Size]:
        """Shapes of the weights and of the router."""
        width = self.input_width
        return {**super().shapes(), "W_router": (self.n_routed, width), "b_router": (width,)}


@dataclasses.dataclass(frozen=True)
class SwitchObjective(ObjectiveConfig):
    """Training objective of a Switch SAE: the load-balance loss besides the shared settings.

    Example:
        >>> SwitchObjective().balance_coefficient
        0.3
    """

    auxk_alpha: float = 0.0
    balance_coefficient: float = setting(
        0.3,
        "weight of the load-balance loss E sum_i F_i P_i (lb_alpha of amudide/switch_sae; with "
        "loss mse it is multiplied by d_in)",
        NOT_NEGATIVE,
    )


@register
class SwitchSAE(SparseAutoencoder):
    """Switch SAE: each token is encoded by the TopK expert that a router chooses for it.

    ``x_hat = b_dec + p W_dec^T topk(W_enc (x - b_dec) + b_enc)`` over that expert's latents, with
    p its entry of ``softmax(W_router (x - b_router))`` (arXiv 2410.08201). Expert e has the F/E
    latents from ``e F/E`` on, so encoding costs 1/E of a TopK SAE's. Codes are
    :class:`~sae_kernels.functional.RoutedCodes`, which hold each token's expert too.

    Attributes:
        W_router: [E, input width], without a row for a shared expert.
        b_router: [input width].

    Example:
        >>> from sae_kernels.nn import SwitchSAE
        >>> sae = SwitchSAE(8, 32, k=4, n_experts=4)
        >>> codes = sae.encode(torch.randn(5, 8))
        >>> (codes.indices // 8 == codes.routing.experts[:, None]).all()
        tensor(True)
    """

    config: SwitchConfig
    config_class = SwitchConfig
    objective_class = SwitchObjective
    presets: ClassVar[dict[str, Preset]] = {
        "switch": Preset("a router sends each token to one of several TopK experts")
    }
    non_latent_vectors = frozenset({"b_dec", "b_router"})
    keeps_fixed_number: ClassVar[bool] = True
    spreads: ClassVar[bool] = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        config = self.config
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
        self, x_centred: torch.Tensor, *, W_enc: torch.Tensor | None = None, k: float | None = None
    ) -> RoutedCodes:
        """The k largest pre-activations of each token within its expert, before the gate."""
        W_enc = self.W_enc if W_enc is None else W_enc
        k = int(self.config.k if k is None else k)
        routing = self._route(x_centred, W_enc)
        first = self.config.expert_width if self.config.shared_expert else 0
        routed: RoutedCodes = self._encode(x_centred, W_enc, k, slice(first, None), routing=routing)
        if not first:
            return routed
        return self._largest(self._encode(x_centred, W_enc, k, slice(first)), routed)

    def _encode(
        self, x_centred: torch.Tensor, W_enc: torch.Tensor, k: int, some: slice, **routing: Any
    ) -> Any:
        """The k largest pre-activations of some latents."""
        return functional.encode_topk(
            x_centred,
            W_enc[some],
            self.b_enc[some],
            k,
            relu=False,
            narrow=None if self.narrow is None else self.narrow[some],
            compute_dtype=self.compute_dtype,
            backend=self.backend,
            **routing,
        )

    def check_objective(self, objective: ObjectiveConfig) -> None:
        """Checks the objective's class, and that latents over ranks are of whole experts."""
        super().check_objective(objective)
        latents, width = self.latents, self.config.expert_width
        if len(latents) == self.config.n_latents:
            return
        if latents.start % width or len(latents) % width:
            raise ValueError(
                f"n_experts: expected whole experts on each rank, got {self.config.n_experts}, of "
                f"{width} latents each, and {len(latents)} latents here"
            )
        if self.config.shared_expert:
            raise ValueError("shared_expert: expected false with latents over ranks, got true")

    def select_in(self, context: Context, W_enc: torch.Tensor | None = None) -> SparseCodes:
        """:meth:`select`; of experts over ranks the entries of the tokens whose expert is here."""
        if context.ranks is None:
            return super().select_in(context, W_enc)
        W_enc, k = self.W_enc if W_enc is None else W_enc, int(context.k)
        routing = self._route(context.x, W_enc)
        here = self._is_here(routing)
        (tokens,) = here.nonzero(as_tuple=True)
        first, n = (n // self.config.expert_width for n in (self.latents.start, len(W_enc)))
        experts, starts = routing.experts[tokens] - first, routing.starts[first : first + n + 1]
        own = Routing(
            experts,
            routing.probabilities[tokens],
            experts.argsort(stable=True).to(torch.int32),
            starts - starts[0],
        )
        codes = self._encode(context.x[tokens], W_enc, k, slice(None), routing=own)
        offsets = pad((k * here).cumsum(0), (1, 0)).to(torch.int32)
        flat = codes.values.flatten(), codes.indices.flatten(), len(W_enc), offsets
        return RoutedCodes(*flat, routing=routing)

    def _is_here(self, routing: Routing) -> torch.Tensor:
        """Which tokens go to an expert of this process, bool [B]."""
        first, last = (
            n // self.config.expert_width for n in (self.latents.start, self.latents.stop)
        )
        return (routing.experts >= first) & (routing.experts < last)

    def activate(self, preacts: SparseCodes) -> SparseCodes:
        """ReLU times the gate of the token's expert."""
        codes = super().activate(preacts)
        return codes.with_values(codes.values * self._gates(preacts))

    def fold_vectors_(self, scale: float, target_scale: float) -> None:
        """Rescales the router too, so that its logits stay the same."""
        super().fold_vectors_(scale, target_scale)
        self.W_router.mul_(scale)
        self.b_router.div_(scale)

    def penalties(
        self, preacts: SparseCodes, parts: list[Reconstruction], context: Context
    ) -> list[torch.Tensor]:
        """The sparsity penalty and the load-balance loss."""
        terms = super().penalties(preacts, parts, context)
        objective = context.objective
        if not objective.balance_coefficient:
            return terms
        # In units of the squared error: over as many outputs as "mse" adds up.
        unit = self.config.output_width if objective.loss == "mse" else 1
        routing = self._routed(preacts).routing
        if context.ranks is not None:  # all have its value, each the gradient of its tokens
            P, here = routing.probabilities, self._is_here(routing)[:, None]
            routing = routing._replace(probabilities=torch.where(here, P, P.detach()))
        if context.survey is None:
            balance = functional.load_balance(routing)
        else:  # the micro-batch's part of the whole batch's sum
            P = routing.probabilities
            balance = P.shape[1] * (context.survey * P.sum(0)).sum() / context.batch_tokens
        return [*terms, objective.balance_coefficient * unit * balance]

    def survey(self, micro_batches: Iterable[torch.Tensor], context: SurveyContext) -> Any:
        """The fraction of the batch's tokens that each expert has, for the load-balance loss."""
        if not context.objective.balance_coefficient:
            return None
        W_enc = self.W_enc if context.W_enc is None else context.W_enc
        counts = [self._route(x, W_enc).starts.diff() for x in micro_batches]
        return torch.stack(counts).sum(0).to(self.W_router.dtype) / context.n_tokens

    def _route(self, x_centred: torch.Tensor, W_enc: torch.Tensor) -> Routing:
        return functional.route_top1(
            x_centred,
            self.W_router,
            self.router_shift(),
            compute_dtype=self.compute_dtype or autocast_dtype(x_centred) or W_enc.dtype,
            backend=self.backend,
        )

    def entry_leaves(self, preacts: SparseCodes) -> dict[str, torch.Tensor]:
        """The router's probabilities, fp32 [B, E]."""
        return {"probabilities": self._routed(preacts).routing.probabilities}

    def with_leaves(self, preacts: SparseCodes, leaves: dict[str, torch.Tensor]) -> SparseCodes:
        """The entries with the router's probabilities replaced by ``leaves``."""
        routed = self._routed(preacts)
        routing = routed.routing._replace(probabilities=leaves["probabilities"])
        return dataclasses.replace(routed, routing=routing)

    def leaf_gradients(
        self, preacts: SparseCodes, grads: dict[str, torch.Tensor], context: Context
    ) -> dict[str, Gradient]:
        """Gradients of W_router and b_router."""
        if "probabilities" not in grads:
            return {}
        grad, routing = grads["probabilities"], self._routed(preacts).routing
        if context.ranks is not None:  # a token's row is of the rank that has its expert
            grad = context.ranks.total(grad)
        return router_gradients(self.W_router, self.router_shift(), routing, grad, context.x)

    def step_figures(self, fired: torch.Tensor) -> dict[str, float]:
        """``largest_load``: the busiest routed expert's share of all fired codes.

        Nothing where some experts are on other ranks.
        """
        if len(fired) < self.config.n_latents:
            return {}
        by_expert = fired.view(self.config.n_experts, -1).sum(1)[-self.config.n_routed :]
        return {"largest_load": float(by_expert.max() / by_expert.sum().clamp(min=1))}

    def latent_experts(self) -> torch.Tensor:
        """The expert of each latent, int64 [F]."""
        latents = torch.arange(self.config.n_latents, device=self.W_dec.device)
        return latents // self.config.expert_width

    def router_shift(self) -> torch.Tensor:
        """The shift the router subtracts from centred tokens, so that it reads x - b_router."""
        return self.b_router - self.b_dec if self.config.subtract_b_dec else self.b_router

    @torch.no_grad()
    def initialise_b_dec_(
        self, x: torch.Tensor, centre: Callable[[torch.Tensor], torch.Tensor] = geometric_median
    ) -> None:
        """Sets b_dec, and with it b_router where the input is its own target."""
        super().initialise_b_dec_(x, centre)
        if not self.config.transcodes:
            self.b_router.copy_(self.b_dec)

    @staticmethod
    def _routed(preacts: SparseCodes) -> RoutedCodes:
        if not isinstance(preacts, RoutedCodes):
            raise TypeError(
                f"preacts: expected RoutedCodes of select(), got {type(preacts).__name__}"
            )
        return preacts

    def _gates(self, preacts: SparseCodes) -> torch.Tensor:
        """The gate of each entry, shaped like the values or [..., 1]."""
        gates = self._routed(preacts).routing.gates()
        if preacts.offsets is None:
            gates = gates.reshape(*preacts.batch_shape, 1)
        else:
            gates = gates[preacts.tokens.long()]
        if self.config.gate == "heaviside":  # a router's NaN must reach the codes
            gates = torch.where(gates.detach().isnan(), torch.nan, 1.0)
        if not self.config.shared_expert:
            return gates
        return torch.where(preacts.indices < self.config.expert_width, 1, gates)

    def _largest(self, shared: SparseCodes, routed: RoutedCodes) -> RoutedCodes:
        """The k largest gated pre-activations among the entries of both experts."""
        indices = torch.cat([shared.indices, routed.indices + self.config.expert_width], -1)
        values = torch.cat([shared.values, routed.values], -1)
        both = dataclasses.replace(
            routed, values=values, indices=indices, n_latents=self.config.n_latents
        )
        key = (values * self._gates(both)).detach() + 0.0  # -0 becomes +0
        order = key.sort(dim=-1, descending=True, stable=True).indices[..., : routed.k]
        return both.with_values(values.gather(-1, order), indices.gather(-1, order))


def router_gradients(
    W_router: torch.Tensor,
    shift: torch.Tensor,
    routing: Routing,
    grad: torch.Tensor,
    x_centred: torch.Tensor,
) -> dict[str, Gradient]:
    """Gradients of W_router and b_router, given dL/dprobabilities.

    Args:
        W_router: [E, input width].
        shift: [input width], subtracted from centred tokens by the router.
        routing: the batch's routing.
        grad: fp32 [B, E], dL/dprobabilities.
        x_centred: [B, input width], the encoder's input.
    """
    by_logit = softmax_backward(routing.probabilities.detach(), grad)
    total = by_logit.sum(0)
    W = W_router.detach().to(x_centred.dtype).float()  # rounded as in the forward product
    dW = -total[:, None] * shift.detach()
    # The tokens are widened some at a time: on a CPU fresh pages for all of them cost more.
    at_once = len(x_centred) if x_centred.is_cuda else _WIDENED
    for some, tokens in zip(by_logit.split(at_once), x_centred.split(at_once), strict=True):
        dW.addmm_(some.T, tokens.float())
    return {"W_router": Gradient.whole(dW), "b_router": Gradient.whole(-(total @ W)[None])}
