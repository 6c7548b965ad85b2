"""Adam without gradient tensors: updates every parameter through row_update."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.primitives.row_sqnorm import row_sqnorm
from sae_kernels.primitives.row_update import AdamMatrix, halves, row_update

if TYPE_CHECKING:
    from sae_kernels.config.optimizer import OptimizerConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.primitives.terms import Gradient


class FusedAdam:
    """The optimizer of :class:`~sae_kernels.step.FusedStep`.

    Args:
        sae: the module, whose fp32 parameters are updated in place. With
            ``master_weights="split"`` its matrices become bf16 halves until :meth:`restore_`.
        config: the settings.
        dtype: dtype of the compute copies.

    Attributes:
        matrices: matrix view, Adam moments and compute copy of each parameter, by name.
        n_updates: int64 scalar, updates made (skipped steps do not count).
    """

    def __init__(self, sae: SparseAutoencoder, config: OptimizerConfig, dtype: torch.dtype) -> None:
        self.sae, self.config = sae, config
        self.matrices = {
            name: _adam_matrix(name, parameter, dtype, config, name in sae.non_latent_vectors)
            for name, parameter in sae.named_parameters()
        }
        self.n_updates = torch.zeros((), dtype=torch.int64, device=sae.W_enc.device)

    def operand(self, name: str) -> torch.Tensor:
        """The matrix that kernels read: the compute copy, or the parameter itself."""
        row = self.matrices[name]
        return row.param if row.copy is None else row.copy

    def update(
        self, gradients: dict[str, Gradient], loss: torch.Tensor, lr: float | torch.Tensor
    ) -> torch.Tensor:
        """Updates all parameters if loss and gradient norm are finite; returns whether they are.

        Parameters without ``requires_grad`` stay as they are.
        """
        config = self.config
        gradients = {n: g for n, g in gradients.items() if self.sae.get_parameter(n).requires_grad}
        clip, finite = self._clip(gradients, loss)
        hyper = self._hyper(lr, clip, finite)
        for name, gradient in gradients.items():
            norm, slices = self._norm(name)
            row_update(
                self.matrices[name],
                gradient,
                hyper,
                betas=(config.beta1, config.beta2),
                eps=config.eps,
                norm=norm,
                slices=slices,
                lazy=config.adam == "lazy",
                backend=self.sae.backend,
            )
        self.n_updates += finite
        return finite

    def live_tensors(self) -> dict[str, torch.Tensor]:
        """Moments and update count by name; every update changes them in place."""
        moments = {
            f"adam.{n}.{m}": getattr(row, m) for n, row in self.matrices.items() for m in "mv"
        }
        return {"n_updates": self.n_updates, **moments}

    def masters(self) -> dict[str, torch.Tensor]:
        """The fp32 values of matrices that the module holds as bf16 halves, by name."""
        return {n: _joined(row) for n, row in self.matrices.items() if _is_split(row)}

    def restore_(self) -> None:
        """Turns bf16 halves back into fp32 parameters; no update can follow."""
        for name in [name for name, row in self.matrices.items() if _is_split(row)]:
            self.sae.get_parameter(name).data = _joined(self.matrices.pop(name))

    def _norm(self, name: str) -> tuple[str, int]:
        """The norm policy of a matrix, and the number of parts of a row that it applies to."""
        if name == "W_dec" and self.sae.config.unit_norm_decoder:
            return "unit", self.sae.config.n_layers
        return "none", 1

    def _clip(
        self, gradients: dict[str, Gradient], loss: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clipping factor of all gradients, and whether loss and norm are finite."""
        if self.config.clip_norm is None:
            return torch.ones_like(loss), loss.isfinite()
        squares = []
        for name, gradient in gradients.items():
            row, (norm, slices) = self.matrices[name], self._norm(name)
            high = row.copy if _is_split(row) else None
            backend = self.sae.backend
            rows = row_sqnorm(
                row.param, gradient, high=high, norm=norm, slices=slices, backend=backend
            )
            squares.append(rows.sum())
        length = torch.stack(squares).sum().sqrt()
        # torch.nn.utils.clip_grad_norm_'s formula, its 1e-6 included.
        clip = (self.config.clip_norm / (length + 1e-6)).clamp(max=1.0)
        return clip, loss.isfinite() & length.isfinite()

    def _hyper(
        self, lr: float | torch.Tensor, clip: torch.Tensor, finite: torch.Tensor
    ) -> torch.Tensor:
        t = (self.n_updates + 1).double()
        correction1, correction2 = 1 - self.config.beta1**t, 1 - self.config.beta2**t
        rate = lr.to(t) if isinstance(lr, torch.Tensor) else torch.full_like(t, lr)
        return torch.stack([rate, clip.double(), correction1, correction2, (~finite).double(), t])


def _is_split(row: AdamMatrix) -> bool:
    return row.param.dtype == torch.int16


def _joined(row: AdamMatrix) -> torch.Tensor:
    assert row.copy is not None
    return halves.joined(row.copy, row.param)


def _adam_matrix(
    name: str,
    parameter: torch.nn.Parameter,
    dtype: torch.dtype,
    config: OptimizerConfig,
    one_row: bool,
) -> AdamMatrix:
    matrix = parameter.data
    if matrix.dim() == 1:  # per latent: one row each
        matrix = matrix[None] if one_row else matrix[:, None]
        return AdamMatrix(matrix, torch.zeros_like(matrix), torch.zeros_like(matrix))
    copy = None
    if name not in ("W_enc", "W_dec"):  # a skip connection or a router: small, read in fp32
        return AdamMatrix(matrix, torch.zeros_like(matrix), torch.zeros_like(matrix))
    if config.master_weights == "split":
        copy, matrix = halves.split(matrix)
        parameter.data = copy
    elif dtype != torch.float32 and (name == "W_enc" or config.compute_copies == "both"):
        copy = matrix.to(dtype)
    moments = torch.bfloat16 if config.moment_dtype == "bfloat16" else torch.float32
    m, v = (torch.zeros_like(matrix, dtype=moments) for _ in range(2))
    return AdamMatrix(matrix, m, v, copy)
