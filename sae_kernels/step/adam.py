"""Adam without gradient tensors: updates every parameter through row_update; sums of gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.row_sqnorm import row_sqnorm
from sae_kernels.primitives.row_update import AdamMatrix, halves, row_update
from sae_kernels.primitives.terms import Gradient

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sae_kernels.config.optimizer import OptimizerConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.primitives.terms import Term
    from sae_kernels.step.ranks import Ranks

    Moments = tuple[torch.Tensor, torch.Tensor]


# Of a gradient's rows that are added at a time. A GPU sums all chunks of entries again for each.
_TILE_BYTES, _GPU_TILE_BYTES = 8 << 20, 1 << 30


class FusedAdam:
    """The optimizer of :class:`~sae_kernels.step.FusedStep`.

    Args:
        sae: the module, whose fp32 parameters are updated in place. With
            ``master_weights="split"`` its matrices become bf16 halves until :meth:`restore_`.
        config: the settings.
        dtype: dtype of the compute copies.
        moments: somebody else's moments by parameter name, trained where they lie; the others
            begin as zeros.
        ranks: the processes that have the other latents; None: all are here.

    Attributes:
        matrices: matrix view, Adam moments and compute copy of each parameter, by name.
        n_updates: int64 scalar, updates made (skipped steps do not count).
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        config: OptimizerConfig,
        dtype: torch.dtype,
        moments: Mapping[str, Moments],
        ranks: Ranks | None = None,
    ) -> None:
        self.sae, self.config, self.ranks = sae, config, ranks
        self.matrices = {
            name: _adam_matrix(
                name, parameter, dtype, config, name in sae.non_latent_vectors, moments.get(name)
            )
            for name, parameter in sae.named_parameters()
        }
        device = sae.W_enc.device
        self.n_updates = torch.zeros((), dtype=torch.int64, device=device)
        self._row_parts = sae.config.row_parts
        self._parameters = dict(sae.named_parameters())
        # What row_update reads, see its `hyper`; written anew in place at every update.
        self._read = torch.ones(6, dtype=torch.float64, device=device)
        self._betas = torch.tensor((config.beta1, config.beta2), dtype=torch.float64, device=device)

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
        gradients = {n: g for n, g in gradients.items() if self._parameters[n].requires_grad}
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
            return "unit", self._row_parts
        return "none", 1

    def _clip(
        self, gradients: dict[str, Gradient], loss: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The clipping factor of all gradients or None, and whether loss and norm are finite."""
        if self.config.clip_norm is None:
            return None, _finite(loss)
        squares = []
        for name, gradient in gradients.items():
            row, (norm, slices) = self.matrices[name], self._norm(name)
            high = row.copy if _is_split(row) else None
            backend = self.sae.backend
            rows = row_sqnorm(
                row.param, gradient, high=high, norm=norm, slices=slices, backend=backend
            )
            squares.append(self._sum(name, rows))
        length = torch.stack(squares).sum().sqrt()
        # torch.nn.utils.clip_grad_norm_'s formula, its 1e-6 included.
        clip = (self.config.clip_norm / (length + 1e-6)).clamp(max=1.0)
        return clip, _finite(loss) & _finite(length)

    def _sum(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """The sum of a number per row of a parameter, over the rows of all ranks."""
        if self.ranks is None or not self.sae.has_row_per_latent(name):
            return rows.sum()
        return self.ranks.over_latents(lambda some: rows[some].sum())

    def _hyper(
        self, lr: float | torch.Tensor, clip: torch.Tensor | None, finite: torch.Tensor
    ) -> torch.Tensor:
        rate, scale, _, _, skip, t = self._read.unbind()
        rate.copy_(lr) if isinstance(lr, torch.Tensor) else rate.fill_(lr)
        if clip is not None:
            scale.copy_(clip)
        torch.add(self.n_updates, 1, out=t)
        torch.sub(1, self._betas**t, out=self._read[2:4])
        torch.logical_not(finite, out=skip)
        return self._read


class OutsideGradient(NamedTuple):
    """A loss that was computed elsewhere and its gradient, to be added to a step's own.

    Attributes:
        loss: scalar; a step is skipped where it is not finite.
        gradients: fp32 by parameter name, in the parameter's shape; or with a row for each of
            ``latents`` alone where the parameter has a row per latent.
        latents: int32 [A], each at most once; None: all.
    """

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]
    latents: torch.Tensor | None = None

    def added(self, own: dict[str, Gradient], sae: SparseAutoencoder) -> dict[str, Gradient]:
        """The step's gradients and these; ``own`` may be overwritten.

        Raises:
            ValueError: no parameter of this name, or a gradient of another shape.
        """
        total, parameters = dict(own), dict(sae.named_parameters())
        for name, gradient in self.gradients.items():
            parameter = parameters.get(name)
            if parameter is None:
                raise ValueError(f"gradients: expected names of parameters, got {name!r}")
            by_latent = sae.has_row_per_latent(name)
            shape, latents = list(parameter.shape), self.latents
            if by_latent and latents is not None:
                shape[0] = len(latents)
            if list(gradient.shape) != shape:
                raise ValueError(
                    f"gradients[{name!r}]: expected shape {shape}, got {list(gradient.shape)}"
                )
            if name in sae.non_latent_vectors:
                gradient = gradient[None]
            block = gradient[:, None] if gradient.dim() == 1 else gradient
            if not by_latent or latents is None:
                latents = torch.arange(len(block), dtype=torch.int32, device=block.device)
            total[name] = _merged(total.get(name, Gradient()), block.contiguous(), latents)
        return total


def added(total: Gradient | None, part: Gradient, backend: str | None) -> Gradient:
    """The sum of two gradients of a matrix as a dense one; the first is overwritten.

    With lazy Adam a latent without a term in either has no row: ``dense_latents`` is -1 there.
    """
    row_coef, dense, latents = part.row_coef, part.dense, part.dense_latents
    if part.terms:
        fired = torch.stack([term.offsets.diff() for term in part.terms]).sum(0) > 0
        every = torch.arange(len(fired), dtype=torch.int32, device=fired.device)
        live = torch.where(fired, every, -1)
        latents = live if latents is None else torch.maximum(latents, live)
    if total is None:
        if part.terms:
            rows = _rows(part.terms, slice(0, len(fired)), backend)
            dense = rows if dense is None else rows.add_(dense)
        return Gradient((), row_coef, dense, latents)
    if total.row_coef is not None:
        row_coef = total.row_coef if row_coef is None else total.row_coef + row_coef
    assert total.dense is not None
    assert total.dense_latents is not None
    assert latents is not None
    if dense is not None:
        total.dense.add_(dense)
    if part.terms:
        tile = _GPU_TILE_BYTES if total.dense.is_cuda else _TILE_BYTES
        step = max(1, tile // (4 * total.dense.shape[1]))
        for first in range(0, len(fired), step):
            some = slice(first, min(first + step, len(fired)))
            total.dense[some] += _rows(part.terms, some, backend)
    return Gradient((), row_coef, total.dense, torch.maximum(total.dense_latents, latents))


def _rows(terms: Sequence[Term], latents: slice, backend: str | None) -> torch.Tensor:
    """Some rows of a gradient's terms."""
    source = terms[0].source
    width = 1 if source is None else source.shape[1]
    some = [term._replace(offsets=term.offsets[latents.start : latents.stop + 1]) for term in terms]
    return row_grad(some, latents.stop - latents.start, width, backend=backend)[0]


def _finite(x: torch.Tensor) -> torch.Tensor:
    return x.abs() < torch.inf  # two operators, of which isfinite() is four


def with_rows(gradient: Gradient, block: torch.Tensor, latents: torch.Tensor) -> Gradient:
    """Adds a block of rows to a gradient: row i is of ``latents[i]``, -1 is padding."""
    if gradient.dense is None:
        return gradient._replace(dense=block, dense_latents=latents)
    # The gradient's dense block has a row for every latent, in order.
    assert gradient.dense_latents is not None
    used, at = latents >= 0, latents.clamp(min=0).long()
    gradient.dense.index_add_(0, at, torch.where(used[:, None], block, 0))
    live = gradient.dense_latents.scatter_reduce(0, at, latents, "amax")
    return gradient._replace(dense_latents=live)


def _merged(gradient: Gradient, block: torch.Tensor, latents: torch.Tensor) -> Gradient:
    """Adds a block of rows to a gradient that may have rows of other latents."""
    if gradient.dense is None or gradient.dense_latents is None:
        return gradient._replace(dense=block, dense_latents=latents)
    union, at = torch.cat([gradient.dense_latents, latents]).unique(return_inverse=True)
    dense = block.new_zeros(len(union), block.shape[1])
    dense.index_add_(0, at, torch.cat([gradient.dense, block]))
    return gradient._replace(dense=dense, dense_latents=union)


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
    given: Moments | None,
) -> AdamMatrix:
    matrix, copy, moments = parameter.data, None, torch.float32
    if name in ("W_enc", "W_dec"):  # a skip connection or a router is small: read in fp32
        if config.master_weights == "split":
            copy, matrix = halves.split(matrix)
            parameter.data = copy
        elif dtype != torch.float32 and (name == "W_enc" or config.compute_copies == "both"):
            copy = matrix.to(dtype)
        moments = torch.bfloat16 if config.moment_dtype == "bfloat16" else torch.float32
    if given is None:
        given = torch.zeros_like(matrix, dtype=moments), torch.zeros_like(matrix, dtype=moments)
    else:
        _check_moments(name, given, parameter, moments)
    if matrix.dim() > 1:
        return AdamMatrix(matrix, *given, copy)
    # Per latent: one row each.
    return AdamMatrix(*(t[None] if one_row else t[:, None] for t in (matrix, *given)))


def _check_moments(
    name: str, moments: Moments, parameter: torch.Tensor, dtype: torch.dtype
) -> None:
    """Raises TypeError or ValueError for moments that cannot be updated where they lie."""
    for moment in moments:
        if moment.dtype != dtype:
            raise TypeError(f"moments[{name!r}]: expected {dtype}, got {moment.dtype}")
        if moment.shape != parameter.shape or not moment.is_contiguous():
            raise ValueError(
                f"moments[{name!r}]: expected contiguous tensors of shape "
                f"{list(parameter.shape)} (latents first), got {list(moment.shape)} with strides "
                f"{list(moment.stride())}"
            )
