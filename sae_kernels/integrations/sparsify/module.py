"""sparsify's encoder and decoder on the kernels.

It differs from ours in two ways, which are kept. Winners of value 0 (of a token with fewer than k
positive pre-activations) get gradients and count as fired; which of the many zeros win is up to
torch's top-k, so such tokens are encoded by the library itself. And nothing that is computed from
all pre-activations, AuxK and Multi-TopK, gives the encoder a gradient.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from sae_kernels import functional
from sae_kernels.codes import SparseCodes
from sae_kernels.functional.recording import autocast_dtype
from sae_kernels.integrations.late import Later, LateTensor
from sae_kernels.integrations.patching import unfit

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.integrations.adapters import Installation
    from sae_kernels.integrations.patching import Ledger


_TopK: Any = torch.return_types.topk
_SHORT = "tokens with fewer than k positive pre-activations, alone"


def fused_encoder(installation: Installation) -> Callable[..., Any]:
    """Makes ``sparse_coder.fused_encoder(input, weight, bias, k, activation)``."""
    output = importlib.import_module("sparsify.fused_encoder").EncoderOutput
    ledger = installation.ledger

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def encode(
            input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, activation: str
        ) -> Any:
            if not _serves(installation, "encoder.weight", weight):
                return original(input, weight, bias, k, activation)
            why = _why_not(input, weight, bias, k, activation)
            if not ledger.takes("encode", why):
                return original(input, weight, bias, k, activation)
            codes = functional.encode_topk(input, weight, bias, k)
            values, indices = codes.values, codes.indices.long()
            values = values.to(autocast_dtype(input) or weight.dtype)
            short = ~(values.detach()[..., -1] > 0)
            if bool(short.any()):
                ledger.left("encode", _SHORT)
                theirs = original(input[short], weight, bias, k, activation)
                values = values.index_put((short,), theirs.top_acts.to(values.dtype))
                indices = indices.index_put((short,), theirs.top_indices)
            late = PreActivations.over(input, weight, bias, values.dtype, ledger)
            return output(values, indices, late)

        return encode

    return make


def decoder_impl(installation: Installation) -> Callable[..., Any]:
    """Makes ``sparse_coder.decoder_impl(top_indices, top_acts, W_dec)``; its W_dec is [D, F]."""
    ledger = installation.ledger

    def make(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def decode(
            top_indices: torch.Tensor, top_acts: torch.Tensor, W_dec: torch.Tensor
        ) -> torch.Tensor:
            rows = W_dec.mT
            if not _serves(installation, "W_dec", rows):
                return original(top_indices, top_acts, W_dec)
            why = unfit(top_acts, rows) or (None if top_indices.dim() == 2 else "not [N, k]")
            if not ledger.takes("decode", why):
                return original(top_indices, top_acts, W_dec)
            codes = SparseCodes(top_acts, top_indices.to(torch.int32), rows.shape[0])
            return functional.decode(codes, rows).to(autocast_dtype(rows) or rows.dtype)

        return decode

    return make


def _serves(installation: Installation, name: str, weight: torch.Tensor) -> bool:
    """Whether a weight, or a view of it, is that of a served module: functions know no module."""
    for served in installation.holders.values():
        if served is None or any(_same(module, name, weight) for module in served):
            return True
    return False


def _same(module: torch.nn.Module, name: str, weight: torch.Tensor) -> bool:
    return module.get_parameter(name).data_ptr() == weight.data_ptr()


def _why_not(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, k: int, activation: str
) -> str | None:
    if activation != "topk":
        return f"activation {activation}"
    if not 1 <= k <= weight.shape[0]:
        return "k outside 1 to the number of latents"
    return unfit(x, weight, bias)


class PreActivations(LateTensor):
    """All pre-activations after their ReLU, without gradient, for AuxK and Multi-TopK.

    The largest of all latents, or of those that a mask leaves, are found by the kernels and by a
    product with these latents alone. Only another use computes all.
    """

    _parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # the encoder's input, weight and bias
    _dead: torch.Tensor | None  # the latents that a mask leaves; None of all

    @classmethod
    def over(
        cls,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        dtype: torch.dtype,
        ledger: Ledger,
        mask: torch.Tensor | None = None,
    ) -> PreActivations:
        """Those of an encoder's inputs [..., D]; with a mask of latents, -inf at the others."""

        def compute(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            all_ = F.linear(x, weight, bias).relu()
            return all_ if mask is None else torch.where(mask, all_, -torch.inf)

        shape = (*x.shape[:-1], weight.shape[0])
        parts = (x.detach(), weight.detach(), bias.detach())
        late: PreActivations = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=x.device, requires_grad=False
        )
        late._late = Later(shape, compute, parts, dtype, ledger, "pre-activations")
        late.columns = late.entries = None
        late._parts = parts
        late._dead = None if mask is None else mask.flatten().nonzero()[:, 0]
        return late

    @property
    def n_latents(self) -> int:
        """Those that a mask leaves, or all."""
        return self.shape[-1] if self._dead is None else self._dead.shape[0]

    def masked(self, mask: torch.Tensor) -> PreActivations:
        """``torch.where(mask, self, -inf)`` of a mask of latents."""
        assert self._late.ledger is not None
        return type(self).over(*self._parts, self.dtype, self._late.ledger, mask)

    def largest(self, k: int) -> Any:
        """The k largest of every token and their latents in any order, as ``topk`` returns them."""
        (x, weight, bias), ledger = self._parts, self._late.ledger
        assert ledger is not None
        with torch.no_grad():
            if self._dead is not None:
                ledger.took("AuxK")
                some = F.linear(x, weight[self._dead], bias[self._dead]).relu_()
                top = some.topk(k, sorted=False)
                return _TopK((top.values, self._dead[top.indices]))
            codes = functional.encode_topk(x, weight, bias, k)
            if not bool((codes.values[..., -1] > 0).all()):  # which zeros, is up to torch
                return self.value("topk, zeros among the largest").topk(k, sorted=False)
            ledger.took("Multi-TopK")
            return _TopK((codes.values.to(self.dtype), codes.indices.long()))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        late = next((arg for arg in args if isinstance(arg, PreActivations)), None)
        if late is not None and late._late.fresh:
            if func is torch.where and not kwargs and _leaves_latents(late, *args):
                return late.masked(args[0])
            if func in (torch.topk, torch.Tensor.topk) and _largest_of(late, *args, **kwargs or {}):
                return late.largest(args[1])
        return super().__torch_function__(func, types, args, kwargs)


def _leaves_latents(late: PreActivations, mask: Any = None, this: Any = None, *rest: Any) -> bool:
    """Whether ``torch.where(mask, this, *rest)`` is of a mask of latents and -inf elsewhere."""
    return (
        this is late
        and late._dead is None
        and type(mask) is torch.Tensor
        and mask.dtype == torch.bool
        and mask.shape in ((late.shape[-1],), (1, late.shape[-1]))
        and rest == (-torch.inf,)
    )


def _largest_of(
    late: PreActivations, this: Any, k: Any = None, dim: int = -1, **options: Any
) -> bool:
    """Whether ``this.topk(k, dim, **options)`` asks for the largest latents in any order."""
    last = dim in (-1, late.dim() - 1) and options == {"sorted": False}
    return last and isinstance(k, int) and 1 <= k <= late.n_latents
