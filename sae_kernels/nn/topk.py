"""The TopK sparse autoencoder as a module."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from sae_kernels import functional
from sae_kernels.nn.initialise import geometric_median, unit_rows

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.config import TopKConfig


class SAEOutput(NamedTuple):
    """What a forward pass gives.

    Attributes:
        x_hat: [..., D], the reconstruction, in the dtype of the input.
        codes: the kept latents of every token.
    """

    x_hat: torch.Tensor
    codes: SparseCodes


class TopKSAE(nn.Module):
    """``x_hat = b_dec + W_dec^T topk(W_enc (x - b_dec) + b_enc)`` (arXiv 2406.04093).

    Weights are latents-first: W_enc and W_dec [F, D], b_enc [F], b_dec [D]. The encoder starts as
    a copy of the decoder, whose rows are random unit vectors.

    Args:
        config: shape and variant.
        seed: of the initial weights.
        compute_dtype: of the operands of the kernels (bf16 is fastest where the CPU has AMX);
            default: the autocast dtype inside autocast, else the dtype of the weights.
        backend: see :mod:`sae_kernels.backends`.
        device: where the weights are made.

    Example:
        >>> from sae_kernels.nn import TopKConfig, TopKSAE
        >>> sae = TopKSAE(TopKConfig(d_in=8, n_latents=32, k=4))
        >>> x = torch.randn(5, 8)
        >>> output = sae(x)
        >>> output.x_hat.shape, output.codes.indices.shape
        (torch.Size([5, 8]), torch.Size([5, 4]))
    """

    def __init__(
        self,
        config: TopKConfig,
        *,
        seed: int = 0,
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.backend = backend
        generator = torch.Generator("cpu").manual_seed(seed)
        W_dec = unit_rows(config.n_latents, config.d_in, generator, device)
        self.W_enc = nn.Parameter(W_dec.clone())
        self.b_enc = nn.Parameter(torch.zeros(config.n_latents, device=device))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(config.d_in, device=device))

    def extra_repr(self) -> str:
        """The configuration, as ``print(sae)`` shows it."""
        return ", ".join(f"{key}={value}" for key, value in self.config.to_dict().items())

    def encode(self, x: torch.Tensor, *, k: int | None = None) -> SparseCodes:
        """The k (default: of the configuration) largest latents of each token of [..., D]."""
        scale = self.config.activation_scale
        if scale != 1:  # in fp32 at least: a scaled bf16 or fp16 number is rounded, or infinite
            x = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
        return self.encode_scaled(x, k=k)

    def encode_scaled(self, x: torch.Tensor, *, k: int | None = None) -> SparseCodes:
        """:meth:`encode` for activations that already carry the activation scale."""
        return functional.encode_topk(
            x,
            self.W_enc,
            self.b_enc,
            self.config.k if k is None else k,
            b_dec=self.b_dec if self.config.subtract_b_dec else None,
            relu=self.config.relu != "none",
            rank_scale=self.rank_scale(),
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )

    def decode(self, codes: SparseCodes) -> torch.Tensor:
        """The reconstruction of activations from codes, [..., D] in fp32."""
        return self.decode_scaled(codes) / self.config.activation_scale

    def decode_scaled(self, codes: SparseCodes) -> torch.Tensor:
        """:meth:`decode` in the scale in which the SAE is trained."""
        return functional.decode(
            codes,
            self.W_dec,
            self.b_dec,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )

    def forward(self, x: torch.Tensor) -> SAEOutput:
        """Encodes and decodes [..., D]."""
        codes = self.encode(x)
        return SAEOutput(self.decode(codes).to(x.dtype), codes)

    def rank_scale(self) -> torch.Tensor | None:
        """What ranks the latents besides their value: the decoder norms, or nothing."""
        if not self.config.rank_by_decoder_norm:
            return None
        W_dec = self.W_dec.detach()
        dtype = torch.promote_types(W_dec.dtype, torch.float32)
        norms: torch.Tensor = torch.linalg.vector_norm(W_dec, dim=1, dtype=dtype)
        return norms

    @torch.no_grad()
    def initialise_b_dec_(self, x: torch.Tensor) -> None:
        """Sets b_dec to the geometric median of a sample of raw activations [N, D]."""
        self.b_dec.copy_(geometric_median(x) * self.config.activation_scale)

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scales decoder rows to unit norm; zero rows stay."""
        norms = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.div_(torch.where(norms > 0, norms, 1))

    @torch.no_grad()
    def remove_parallel_gradient_(self) -> None:
        """Takes from the decoder's gradient the part along its (unit) rows.

        That part only changes their length, which :meth:`normalize_decoder_` undoes. Call it
        after backward and before clipping and the optimizer.
        """
        grad = self.W_dec.grad
        if grad is None:
            raise RuntimeError("W_dec.grad: expected a gradient, got None; call backward() first")
        grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)

    @torch.no_grad()
    def folded(self) -> TopKSAE:
        """The same function of raw activations with ``activation_scale`` 1.

        TopK and ReLU commute with a positive scale: dividing both biases by it does the whole job.
        Decoder rows keep their norm, and codes come out in units of the raw activations.
        """
        scale = self.config.activation_scale
        config = dataclasses.replace(self.config, activation_scale=1.0)
        copy = TopKSAE(config, compute_dtype=self.compute_dtype, backend=self.backend)
        copy.to(device=self.W_enc.device, dtype=self.W_enc.dtype)
        copy.load_state_dict(self.state_dict())
        copy.b_enc.div_(scale)
        copy.b_dec.div_(scale)
        return copy

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes ``config.json`` and ``sae.safetensors``, the scale folded into the weights."""
        from sae_kernels.formats import native

        native.save(self.folded(), folder)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> TopKSAE:
        """Reads what :meth:`save_pretrained` wrote, from a folder or a Hugging Face repository."""
        from sae_kernels.formats import native

        return native.load(name_or_path, revision=revision, local_files_only=local_files_only)
