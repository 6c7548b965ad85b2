"""Methods of every SAE about single latents: their norms, thresholds, and some of them alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels import functional
from sae_kernels.codes import SparseCodes
from sae_kernels.nn.upkeep import Upkeep
from sae_kernels.primitives import checks

if TYPE_CHECKING:
    from collections.abc import Sequence


class SingleLatents(Upkeep):
    """What an SAE says of a latent, and what it computes for some latents without the others."""

    def bounds(self) -> torch.Tensor | float | None:
        """What a pre-activation must exceed for its latent to be kept, [F] or one for all.

        None where that depends on the other latents (TopK).
        """
        return None

    def preactivations(
        self: Any, x: torch.Tensor, latents: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """Pre-activations [..., n] of some latents, in the scale of training.

        See :func:`sae_kernels.functional.preactivations`.

        Args:
            x: [..., input width], raw activations.
            latents: n of them.

        Raises:
            ValueError, TypeError: x of another width, unknown latents.
        """
        return functional.preactivations(
            self.centred(self.scaled(x)),
            self.W_enc,
            self.b_enc,
            latents,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )

    def encode_latents(
        self: Any, x: torch.Tensor, latents: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """The codes of some latents: ``encode(x).to_dense()[..., latents]`` without [..., F].

        Where latents are kept by thresholds only their rows of W_enc are read. Where tokens keep
        the k largest, a token is encoded unless none of these latents is positive in it.

        Args:
            x: [..., input width], raw activations.
            latents: n of them.

        Returns:
            [..., n], fp32 (fp64 for fp64).

        Raises:
            ValueError, TypeError: x of another width, unknown latents.

        Example:
            >>> from sae_kernels.nn import TopKSAE
            >>> sae, x = TopKSAE(8, 32, k=4), torch.randn(5, 8)
            >>> bool((sae.encode_latents(x, [3, 9]) == sae.encode(x).columns([3, 9])).all())
            True
        """
        bounds = self.bounds()
        # In training what is kept may depend on the whole batch.
        by_token = self.keeps_fixed_number or not self.training
        if bounds is None and not (by_token and self.drops_zeros):
            whole: SparseCodes = self.encode(x)
            return whole.columns(latents)
        chosen = checks.latents(latents, self.config.n_latents).to(self.W_enc.device)
        h: torch.Tensor = self.preactivations(x, chosen)
        if bounds is not None:
            indices = chosen.to(torch.int32).expand(h.shape)
            codes = self.activate(SparseCodes(h, indices, self.config.n_latents))
            least = bounds[chosen] if isinstance(bounds, torch.Tensor) and bounds.dim() else bounds
            return torch.where(h <= least, 0, codes.values)
        asked = ~(h <= 0).all(-1)
        out = torch.zeros_like(h)
        if asked.any():
            out[asked] = self.encode(x[asked]).columns(chosen)
        return out

    def fires(self: Any, x: torch.Tensor, latents: Sequence[int] | torch.Tensor) -> torch.Tensor:
        """Whether some latents are among the kept ones of each token, bool [..., n].

        Exact, also where that depends on the k-th largest of all latents. An entry that a ReLU
        turned to 0 does not count. Arguments, cost and errors: :meth:`encode_latents`.

        Example:
            >>> from sae_kernels.nn import JumpReLUSAE
            >>> JumpReLUSAE(8, 32).fires(torch.randn(5, 8), [3, 9]).shape
            torch.Size([5, 2])
        """
        if self.drops_zeros:
            own: torch.Tensor = self.encode_latents(x, latents)
            return own != 0
        codes: SparseCodes = self.encode(x)
        return codes.with_values(torch.ones_like(codes.values)).columns(latents) != 0

    def latent_experts(self) -> torch.Tensor | None:
        """The expert of each latent, int64 [F]; None where the architecture has no experts."""
        return None

    def decoder_norms(self) -> torch.Tensor:
        """The norm of each layer's part of the decoder rows, fp32 [F, n_layers], differentiable."""
        dtype = torch.promote_types(self.W_dec.dtype, torch.float32)
        parts = self.W_dec.unflatten(1, (self.config.n_layers, -1))
        norms: torch.Tensor = torch.linalg.vector_norm(parts, dim=2, dtype=dtype)
        return norms

    def latent_norms(self, norms: torch.Tensor) -> torch.Tensor:
        """One norm per latent, [F], from those of its layers; see ``config.decoder_norm``."""
        if self.config.n_layers == 1:
            return norms[:, 0]
        joint, total = norms.norm(dim=1), norms.sum(1)
        kinds = {"joint": joint, "sum": total, "mixed": joint + total / 10}
        norm: torch.Tensor = kinds[self.config.decoder_norm]
        return norm

    def decoder_rows(self) -> torch.Tensor:
        """What each latent adds to a token, [F, output width], 0 at layers it does not write to."""
        return self.W_dec

    def row_coefficients(self, by_layer: torch.Tensor) -> torch.Tensor:
        """A gradient by :meth:`decoder_norms`, [F, n_layers], as ``Gradient.row_coef`` of W_dec."""
        return by_layer

    def products(self: Any, x: torch.Tensor) -> torch.Tensor:
        """``W_enc x`` in fp32, [F], of one fp32 row [input width]."""
        result: torch.Tensor = self.W_enc.float() @ x
        return result

    def has_row_per_latent(self: Any, name: str) -> bool:
        """Whether a parameter has a row, or a number, for each latent."""
        rows: bool = len(self.get_parameter(name)) == len(self.latents)
        return rows and name not in (*self.non_latent_vectors, "W_skip")
