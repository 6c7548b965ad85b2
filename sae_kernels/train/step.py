"""FusedStep: a training step from closed forms, without an autograd graph or gradient tensors.

Order of work: encode, decode with residual and code gradients, latent order, AuxK, everything
that reads weights from before the update (the input bias's gradient, norms), then per matrix
project, clip, Adam, renormalise and the compute copy in one pass. Only the encoder product
touches B·F entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from sae_kernels.codes import LatentOrder
from sae_kernels.primitives.auxk import auxk
from sae_kernels.primitives.decode import decode
from sae_kernels.primitives.decode_residual import decode_residual
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.row_sqnorm import row_sqnorm
from sae_kernels.primitives.row_update import AdamRow, halves, row_update
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.terms import Gradient
from sae_kernels.primitives.transpose_codes import transpose_codes
from sae_kernels.train.compute import compute_dtype
from sae_kernels.train.dead import DeadLatents
from sae_kernels.train.losses import checked_batch, loss_scale, reconstruction_parts

if TYPE_CHECKING:
    from sae_kernels.nn import TopKSAE
    from sae_kernels.train.config import TrainConfig


class StepResult(NamedTuple):
    """What a step reports; scalars on the device, read when somebody looks.

    Attributes:
        loss: the whole loss.
        fvu: squared error over the batch's variance.
        l0: latents per token that fired.
        aux_loss: AuxK's part of the loss.
        skipped: whether the loss or the gradient norm was not finite and nothing was changed.
    """

    loss: torch.Tensor
    fvu: torch.Tensor
    l0: torch.Tensor
    aux_loss: torch.Tensor
    skipped: torch.Tensor


class _Reconstruction(NamedTuple):
    """One reconstruction's share of the backward pass; plain TopK has one, multi-TopK two."""

    residual: torch.Tensor  # fp32 [B, D], x_hat - x
    factor: torch.Tensor  # scalar: dL/dx_hat = factor * residual
    coef: torch.Tensor  # [B, K], factor times the values it decoded


class _Forward(NamedTuple):
    """What the forward half leaves for the backward half."""

    x_centred: torch.Tensor  # [B, D], compute dtype
    order: LatentOrder
    reconstructions: list[_Reconstruction]
    dh: torch.Tensor  # [B, K], gradient of the kept pre-activations
    fired: torch.Tensor  # int32 [F]
    loss: torch.Tensor
    fvu: torch.Tensor


class FusedStep:
    """Trains a :class:`~sae_kernels.nn.TopKSAE` in place.

    Args:
        sae: the module; its parameters are fp32 and stay the master weights. Whoever changes them
            from outside makes a new FusedStep: the kernels read compute copies, made here. With
            ``master="split"`` its matrices become the bf16 halves until :meth:`restore_`.
        config: the settings; learning rate and k come with each call.

    On a GPU a step never waits for the host and can be captured in a CUDA graph; the learning rate
    then comes as a tensor, for a number would be frozen into the graph.

    Attributes:
        rows: per parameter its matrix view, Adam moments and compute copy.
        dead: the dead-latent counters.
        n_updates: int64 scalar, updates made (skipped steps do not count).

    Example:
        >>> from sae_kernels.nn import TopKConfig, TopKSAE
        >>> from sae_kernels.train import FusedStep, TrainConfig
        >>> step = FusedStep(TopKSAE(TopKConfig(8, 32, 4)), TrainConfig(compute="float32"))
        >>> x = torch.randn(64, 8)
        >>> losses = [float(step(x, lr=1e-3).loss) for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(self, sae: TopKSAE, config: TrainConfig) -> None:
        self.sae, self.config = sae, config
        device = sae.W_enc.device
        self.dtype = compute_dtype(config.compute, device)
        if config.master == "split" and self.dtype != torch.bfloat16:
            raise ValueError(f"compute: expected 'bfloat16' with master 'split', got {self.dtype}")
        self.rows = {
            name: _adam_row(name, parameter, self.dtype, config)
            for name, parameter in sae.named_parameters()
        }
        self.dead = DeadLatents(sae.config.n_latents, config.dead_after_tokens, device)
        self.n_updates = torch.zeros((), dtype=torch.int64, device=device)
        self.k_aux = config.k_aux or max(1, sae.config.d_in // 2)
        self._scratch: torch.Tensor | None = None
        self._all_latents = _all_latents(sae.config.n_latents, device)

    @torch.no_grad()
    def __call__(
        self, x: torch.Tensor, *, lr: float | torch.Tensor, k: int | None = None
    ) -> StepResult:
        """One step on raw activations [B, D] with this learning rate and k."""
        x = checked_batch(x, self.sae.config)
        forward = self._forward(x, self.sae.config.k if k is None else k)
        gradients, aux_loss = self._gradients(forward)
        loss = forward.loss + aux_loss
        clip, finite = self._clip(gradients, loss)
        hyper = self._hyper(lr, clip, finite)
        for name, gradient in gradients.items():
            row_update(
                self.rows[name],
                gradient,
                hyper,
                betas=(self.config.beta1, self.config.beta2),
                eps=self.config.eps,
                norm=self._norm(name),
                lazy=self.config.adam == "lazy",
                backend=self.sae.backend,
            )
        self.n_updates += finite
        self.dead.update(forward.fired, x.shape[0], ~finite)
        l0 = forward.fired.sum() / x.shape[0]
        return StepResult(loss, forward.fvu, l0, aux_loss, ~finite)

    @torch.no_grad()
    def restore_(self) -> None:
        """Gives the module its fp32 matrices back; no step can follow."""
        for name, row in self.rows.items():
            if _is_split(row):
                assert row.copy is not None
                self.sae.get_parameter(name).data = halves.joined(row.copy, row.param)

    def _scratch_like(self, x: torch.Tensor) -> torch.Tensor:
        # Kept between steps: fresh pages for a few MiB cost more than the sums that go there. On a
        # GPU torch keeps them itself, and a captured graph must write to memory of its own.
        if x.device.type != "cpu":
            return torch.empty_like(x)
        if self._scratch is None or self._scratch.shape != x.shape:
            self._scratch = torch.empty_like(x)
        return self._scratch

    def _operand(self, name: str) -> torch.Tensor:
        row = self.rows[name]
        return row.param if row.copy is None else row.copy

    def _norm(self, name: str) -> str:
        return "unit" if name == "W_dec" and self.sae.config.unit_norm_decoder else "none"

    def _forward(self, x: torch.Tensor, k: int) -> _Forward:
        sae, backend = self.sae, self.sae.backend
        relu = sae.config.relu != "none"
        parts = reconstruction_parts(k, sae.config.n_latents, self.config.multi_topk)
        kept = max(count for count, _ in parts)
        scratch = self._scratch_like(x)
        scale, variance = loss_scale(x, self.config.loss, scratch)
        x_centred = torch.sub(x, sae.b_dec, out=scratch) if sae.config.subtract_b_dec else x
        x_centred = x_centred.to(self.dtype)
        values, indices = select_topk(
            x_centred, self._operand("W_enc"), sae.b_enc, kept, sae.rank_scale(), backend=backend
        )
        if relu:
            values.relu_()
        loss, dh, reconstructions, fvu = x.new_zeros(()), None, [], None
        for count, weight in parts:
            residual, sse, grad = decode_residual(
                values[:, :count],
                indices[:, :count],
                self._operand("W_dec"),
                sae.b_dec,
                x,
                relu,
                backend=backend,
            )
            factor, error = 2 * weight * scale, sse.sum()
            coef = pad(factor * values[:, :count], (0, kept - count))
            reconstructions.append(_Reconstruction(residual, factor, coef))
            share = pad(factor * grad, (0, kept - count))
            dh = share if dh is None else dh + share
            loss = loss + weight * scale * error
            fvu = error / variance if fvu is None else fvu
        order = self._order(values, indices, relu)
        main = order if kept == k else self._order(values[:, :k], indices[:, :k], relu)
        assert dh is not None
        assert fvu is not None
        return _Forward(x_centred, order, reconstructions, dh, main.counts(), loss, fvu)

    def _order(self, values: torch.Tensor, indices: torch.Tensor, relu: bool) -> LatentOrder:
        kept = values if relu else None
        n_latents, backend = self.sae.config.n_latents, self.sae.backend
        return LatentOrder(*transpose_codes(indices, kept, None, n_latents, backend=backend))

    def _gradients(self, forward: _Forward) -> tuple[dict[str, Gradient], torch.Tensor]:
        """Every parameter's gradient, in parts, and AuxK's loss."""
        order, reconstructions = forward.order, forward.reconstructions
        gradients = {
            "W_enc": Gradient([order.term(forward.dh, forward.x_centred)]),
            "b_enc": Gradient([order.term(forward.dh, None)]),
            "W_dec": Gradient([order.term(r.coef, r.residual) for r in reconstructions]),
            "b_dec": self._b_dec_gradient(forward),
        }
        no_loss = forward.loss.new_zeros(())
        if not self.config.auxk_alpha:
            return gradients, no_loss
        latents, count = self.dead.pick(self.config.auxk_latents, self.sae.backend)
        if not latents.numel():  # on the CPU, where it is known that none is dead
            return gradients, no_loss
        aux_loss, dW_enc, db_enc, dW_dec = auxk(
            forward.x_centred,
            reconstructions[0].residual,
            self._operand("W_enc"),
            self.sae.b_enc,
            self._operand("W_dec"),
            latents,
            count,
            self.k_aux,
            self.config.auxk_alpha,
            backend=self.sae.backend,
        )
        for name, block in (("W_enc", dW_enc), ("b_enc", db_enc[:, None]), ("W_dec", dW_dec)):
            gradients[name] = gradients[name]._replace(dense=block, dense_latents=latents)
        return gradients, aux_loss

    def _b_dec_gradient(self, forward: _Forward) -> Gradient:
        """Through the output and, where b_dec is subtracted from the input, through that too."""
        grad = torch.stack([r.factor * r.residual.sum(0) for r in forward.reconstructions]).sum(0)
        if self.sae.config.subtract_b_dec:
            term = forward.order.term(forward.dh, None)
            db_enc = row_grad([term], self.sae.config.n_latents, 1, backend=self.sae.backend)
            grad = grad - self._rows_weighted(self._operand("W_enc"), db_enc.flatten())
        first = torch.zeros(1, dtype=torch.int32, device=grad.device)
        return Gradient(dense=grad[None], dense_latents=first)

    def _rows_weighted(self, W: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``W^T weights`` [D]: a decode of all latents, split over some pretended tokens."""
        n_latents, (parts, width) = W.shape[0], self._all_latents.shape
        values = pad(weights, (0, parts * width - n_latents)).view(parts, width)
        partial: torch.Tensor = decode(
            values, self._all_latents, W, None, None, backend=self.sae.backend
        )
        return partial.sum(0)

    def _clip(
        self, gradients: dict[str, Gradient], loss: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor of the gradients and whether everything is finite."""
        if self.config.clip_norm is None:
            return torch.ones_like(loss), loss.isfinite()
        squares = [
            row_sqnorm(
                row.param,
                gradients[name],
                high=row.copy if _is_split(row) else None,
                norm=self._norm(name),
                backend=self.sae.backend,
            ).sum()
            for name, row in self.rows.items()
        ]
        norm = torch.stack(squares).sum().sqrt()
        # torch.nn.utils.clip_grad_norm_'s formula, its 1e-6 included.
        clip = (self.config.clip_norm / (norm + 1e-6)).clamp(max=1.0)
        return clip, loss.isfinite() & norm.isfinite()

    def _hyper(
        self, lr: float | torch.Tensor, clip: torch.Tensor, finite: torch.Tensor
    ) -> torch.Tensor:
        t = (self.n_updates + 1).double()
        correction1, correction2 = 1 - self.config.beta1**t, 1 - self.config.beta2**t
        rate = lr.to(t) if isinstance(lr, torch.Tensor) else torch.full_like(t, lr)
        return torch.stack([rate, clip.double(), correction1, correction2, (~finite).double(), t])


def _all_latents(n_latents: int, device: torch.device) -> torch.Tensor:
    """Every latent once, int32 [parts, width]; the last row is filled up with the last latent."""
    parts = min(64, n_latents)
    width = -(-n_latents // parts)
    indices = torch.arange(parts * width, dtype=torch.int32, device=device)
    return indices.clamp_(max=n_latents - 1).view(parts, width)


def _is_split(row: AdamRow) -> bool:
    return row.param.dtype == torch.int16


def _adam_row(
    name: str, parameter: torch.nn.Parameter, dtype: torch.dtype, config: TrainConfig
) -> AdamRow:
    if parameter.dtype != torch.float32:
        raise TypeError(f"{name}: expected float32 master weights, got {parameter.dtype}")
    matrix = parameter.data
    if matrix.dim() == 1:  # per latent: one row each; b_dec is one row in all
        matrix = matrix[None] if name == "b_dec" else matrix[:, None]
        return AdamRow(matrix, torch.zeros_like(matrix), torch.zeros_like(matrix))
    copy = None
    if config.master == "split":
        copy, matrix = halves.split(matrix)
        parameter.data = copy
    elif dtype != torch.float32 and (name == "W_enc" or config.copies == "both"):
        copy = matrix.to(dtype)
    states = torch.bfloat16 if config.states == "bfloat16" else torch.float32
    m, v = (torch.zeros_like(matrix, dtype=states) for _ in range(2))
    return AdamRow(matrix, m, v, copy)
