"""InferenceSAE: a frozen SAE with weights in fewer bits, for running inside a model."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from sae_kernels.backends import cpu
from sae_kernels.primitives import checks
from sae_kernels.primitives.narrow import narrowed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.base import SAEOutput, SparseAutoencoder


class InferenceSAE(nn.Module):
    """A frozen copy of an SAE, of any architecture, that reads as few bytes as its dtype allows.

    At a few tokens a call the encoder takes about as long as reading W_enc, half as long in
    bfloat16. With int8, W_enc is kept twice, in 8 bits and in the dtype of ``rows``: on the CPU up
    to 16 tokens read the first, by which the scores of all latents are bounded (docs/numerics.md),
    and of the second only rows of latents that the bounds leave open. Codes are bit for bit those
    of ``for_inference(rows)``; larger batches, and GPUs, read the second alone. On Linux the
    matrices are in huge pages, if the system has them.

    Scales and the subtraction of b_dec are folded into the weights, so pre-activations differ from
    the SAE's own in rounding. Nothing is recorded for gradients. It is always in evaluation mode,
    has no initial values, objective or files: save the SAE that it was made from.

    Args:
        sae: copied; later changes of it do not count.
        dtype: of the matrices: float32, bfloat16, float16, float64, or int8; None is the SAE's
            compute dtype, or the one of its weights. Vectors stay in float32.
        rows: beside int8, the dtype of the matrices whose scores and decoder rows are read; None as
            for ``dtype``.

    Attributes:
        sae: the copy.

    Raises:
        ValueError, TypeError: another dtype, or rows without int8.

    Example:
        >>> from sae_kernels.nn import TopKSAE
        >>> sae = TopKSAE(8, 32, k=4).for_inference(torch.bfloat16)
        >>> sae.W_dec.dtype, sae(torch.randn(1, 8)).codes.values.shape
        (torch.bfloat16, torch.Size([1, 4]))
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        dtype: torch.dtype | None = None,
        *,
        rows: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        is_narrow = dtype == torch.int8
        if rows is not None and not is_narrow:
            raise ValueError(f"rows: expected none but beside dtype=torch.int8, got {rows}")
        own = sae.compute_dtype or sae.W_enc.dtype
        dtype = (rows if is_narrow else dtype) or own
        if dtype not in checks.OPERAND_DTYPES:
            raise TypeError(
                "dtype: expected float32, bfloat16, float16, float64 or int8 (rows none of "
                f"int8), as torch.int8, got {dtype!r}"
            )
        copy = sae.folded().requires_grad_(False)
        rank_scale = copy.rank_scale()
        for parameter in copy.parameters():
            high = torch.promote_types(parameter.dtype, torch.float32)
            parameter.data = parameter.data.to(dtype if parameter.dim() > 1 else high)
        copy.compute_dtype = dtype
        copy.fold_b_dec_()
        narrow = narrowed(copy.W_enc) if is_narrow else None
        for parameter in copy.parameters():
            parameter.data = cpu.in_huge_pages(parameter.data)
        for name, tensor in (("narrow", narrow), ("kept_rank_scale", rank_scale)):
            if tensor is not None:
                delattr(copy, name)  # a plain None until it is a buffer
                copy.register_buffer(name, tensor, persistent=False)
        self.sae = copy
        self.train(False)

    config = property(lambda self: self.sae.config, doc="The configuration, with scales of 1.")
    metadata = property(lambda self: self.sae.metadata, doc="The provenance of the SAE.")
    W_dec = property(lambda self: self.sae.W_dec, doc="The decoder [F, output width].")
    target_scale = property(lambda self: self.sae.target_scale, doc="1.")
    decodes_by_rows = property(lambda self: self.sae.decodes_by_rows, doc="As of the SAE.")
    compute_dtype = property(lambda self: self.sae.compute_dtype, doc="The dtype of the rows.")
    backend = property(lambda self: self.sae.backend, doc="As of the SAE.")

    def train(self, mode: bool = True) -> InferenceSAE:
        """Stays in evaluation mode, whatever the module around it is set to."""
        super().train(False)
        return self

    @torch.no_grad()
    def encode(self, x: torch.Tensor, *, k: float | None = None) -> SparseCodes:
        """As :meth:`SparseAutoencoder.encode`, without gradients."""
        return self.sae.encode(x, k=k)

    @torch.no_grad()
    def encode_latents(
        self, x: torch.Tensor, latents: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """As :meth:`SparseAutoencoder.encode_latents`."""
        return self.sae.encode_latents(x, latents)

    @torch.no_grad()
    def fires(self, x: torch.Tensor, latents: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """As :meth:`SparseAutoencoder.fires`."""
        return self.sae.fires(x, latents)

    @torch.no_grad()
    def decode(self, codes: SparseCodes, x: torch.Tensor | None = None) -> torch.Tensor:
        """As :meth:`SparseAutoencoder.decode`, without gradients."""
        return self.sae.decode(codes, x)

    def decoder_rows(self) -> torch.Tensor:
        """As of the SAE."""
        return self.sae.decoder_rows()

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> SAEOutput:
        """Encodes and decodes activations [..., input width]; codes and reconstruction."""
        output: SAEOutput = self.sae(x)
        return output


if TYPE_CHECKING:
    # What encodes and decodes: an SAE that can be trained, or a frozen copy of one.
    AnySAE: TypeAlias = SparseAutoencoder | InferenceSAE
