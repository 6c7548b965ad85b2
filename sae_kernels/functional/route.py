"""The router of a Switch SAE: top-1 expert per token, and the load-balancing loss."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils import _pytree

from sae_kernels.codes import SparseCodes, flatten_codes, unflatten_codes
from sae_kernels.functional.recording import autocast_dtype, refuse_double_backward
from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import recorded
from sae_kernels.primitives.route_top1 import route_top1 as route_rows
from sae_kernels.primitives.transpose_codes import transpose_codes

if TYPE_CHECKING:
    from collections.abc import Iterable


class Routing(NamedTuple):
    """The expert of each token and the tokens of each expert; leading shapes are flattened.

    Attributes:
        experts: int32 [B], each token's expert.
        probabilities: [B, E], the router's softmax, fp32 (fp64 for fp64); differentiable.
        tokens: int32 [B], the tokens sorted by expert, ascending within each.
        starts: int32 [E + 1], where each expert's tokens start.
    """

    experts: torch.Tensor
    probabilities: torch.Tensor
    tokens: torch.Tensor
    starts: torch.Tensor

    def gates(self) -> torch.Tensor:
        """The probability of each token's expert, [B], by which its codes are multiplied."""
        return self.probabilities.gather(1, self.experts.long()[:, None])[:, 0]

    def load(self) -> torch.Tensor:
        """The fraction of the tokens that each expert has, [E]."""
        return self.starts.diff().to(self.probabilities.dtype) / max(1, self.experts.shape[0])


@dataclasses.dataclass(frozen=True, eq=False)
class RoutedCodes(SparseCodes):
    """Sparse codes of a Switch SAE, with the routing of their tokens.

    Attributes:
        routing: the expert of each token.
    """

    routing: Routing = dataclasses.field(kw_only=True)


def route_top1(
    x: torch.Tensor,
    W_router: torch.Tensor,
    b_router: torch.Tensor | None = None,
    *,
    compute_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Routing:
    """Routes each token to its most probable expert (Switch SAE, arXiv 2410.08201).

    ``p = softmax((x - b_router) W_router^T)``; ties go to the lower expert, and NaN counts as the
    largest. Does not wait for the device.

    Args:
        x: [..., D].
        W_router: [E, D].
        b_router: [D], subtracted from x; or None.
        compute_dtype: of the operands of the product; sums and probabilities are fp32 (fp64 for
            fp64). Default as in :func:`~sae_kernels.encode_topk`.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        Routing with probabilities that are differentiable in x, W_router and b_router.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, named in the message.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0]])
        >>> routing = route_top1(x, torch.eye(2))
        >>> routing.experts.tolist(), routing.tokens.tolist(), routing.starts.tolist()
        ([0, 1, 0], [0, 2, 1], [0, 2, 3])
    """
    for name, tensor in (("x", x), ("W_router", W_router), ("b_router", b_router)):
        checks.dtype(name, tensor, checks.OPERAND_DTYPES)
    checks.same_device(x=x, W_router=W_router, b_router=b_router)
    checks.shape("W_router", W_router, ["E", "D"], "a row per expert")
    checks.as_wide_as(x, W_router, "W_router")
    checks.shape("b_router", b_router, [W_router.shape[1]], "one bias per input")
    dtype = compute_dtype or autocast_dtype(x) or W_router.dtype
    bias = None
    if b_router is not None:  # the product of rounded operands, as that of x is
        high = checks.accumulator(dtype)
        bias = -torch.mv(W_router.to(dtype).to(high), b_router.to(high))
    rows = x.reshape(-1, x.shape[-1])
    experts, probabilities = recorded(_Route, rows, W_router, bias, dtype, backend)
    order = transpose_codes(experts[:, None], None, None, W_router.shape[0], backend=backend)
    return Routing(experts, probabilities, order[2], order[0])


def load_balance(routing: Routing) -> torch.Tensor:
    """Load-balancing loss ``E sum_i F_i P_i``: 1 for equally busy experts, E if one has all tokens.

    A scalar. F_i is the fraction of the tokens that expert i has, without gradient, and P_i its
    mean probability (Switch Transformer, arXiv 2101.03961).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(float(load_balance(route_top1(x, torch.eye(2)))), 4)
        1.0
    """
    P = routing.probabilities
    return P.shape[1] * (routing.load() * P.mean(0)).sum()


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(
        x: torch.Tensor,
        W: torch.Tensor,
        b: torch.Tensor | None,
        dtype: torch.dtype,
        backend: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        experts, probabilities = route_rows(x.to(dtype), W.to(dtype), b, backend=backend)
        return experts, probabilities

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        x, W, b, ctx.dtype, _ = inputs
        experts, probabilities = output
        ctx.has_bias = b is not None
        ctx.mark_non_differentiable(experts)
        ctx.save_for_backward(x, W, probabilities)

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor, grad: torch.Tensor) -> tuple[Any, ...]:
        refuse_double_backward()
        x, W, probabilities = ctx.saved_tensors
        high = checks.accumulator(ctx.dtype)
        slope = softmax_backward(probabilities, grad)
        dx = (slope @ W.to(ctx.dtype).to(high)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dW = (slope.T @ x.to(ctx.dtype).to(high)).to(W.dtype) if ctx.needs_input_grad[1] else None
        return dx, dW, slope.sum(0) if ctx.has_bias else None, None, None


def softmax_backward(probabilities: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """dL/dlogits [B, E] from softmax probabilities and dL/dprobabilities."""
    weighted = probabilities * grad
    return weighted - probabilities * weighted.sum(1, keepdim=True)


def _flatten(codes: RoutedCodes) -> tuple[list[Any], list[Any]]:
    leaves, structure = flatten_codes(codes)
    return [*leaves, *codes.routing], structure


def _unflatten(leaves: Iterable[Any], structure: list[Any]) -> RoutedCodes:
    *own, experts, probabilities, tokens, starts = leaves
    codes = unflatten_codes(own, structure)
    routing = Routing(experts, probabilities, tokens, starts)
    return RoutedCodes(
        codes.values, codes.indices, codes.n_latents, codes.offsets, codes.leading, routing=routing
    )


_pytree.register_pytree_node(
    RoutedCodes, _flatten, _unflatten, serialized_type_name="sae_kernels.RoutedCodes"
)
