"""FusedStep: a training step from closed forms, without gradient tensors.

Order of work: a pass over the batch (:mod:`~sae_kernels.step.sparse_pass`), AuxK, everything that
reads weights from before the update (the input bias's gradient, norms), then per matrix project,
clip, Adam, renormalise and the compute copy in one pass. Only the encoder product touches B F
entries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import pad

from sae_kernels.primitives.auxk import auxk
from sae_kernels.primitives.decode import decode
from sae_kernels.primitives.terms import Gradient
from sae_kernels.step.adam import FusedAdam
from sae_kernels.step.base import Progress
from sae_kernels.step.batch import checked_batch, loss_scale
from sae_kernels.step.compute import compute_dtype
from sae_kernels.step.dense_pass import DENSE_FROM, can_be_dense, dense_pass
from sae_kernels.step.entries import Batch, Operands
from sae_kernels.step.objective import k_of, needs_norms
from sae_kernels.step.sparse_pass import sparse_pass
from sae_kernels.step.state import State

if TYPE_CHECKING:
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step.entries import Pass


class StepResult(NamedTuple):
    """What a step reports; on the device, read when somebody looks. All but the last are scalars.

    Attributes:
        loss: the whole loss.
        fvu: squared error over the batch's variance.
        l0: latents per token that fired.
        aux_loss: AuxK's part of the loss.
        skipped: whether the loss or the gradient norm was not finite and nothing was changed.
        fired: int32 [F], how often each latent fired.
    """

    loss: torch.Tensor
    fvu: torch.Tensor
    l0: torch.Tensor
    aux_loss: torch.Tensor
    skipped: torch.Tensor
    fired: torch.Tensor


class FusedStep(Progress):
    """Trains a :class:`~sae_kernels.nn.SparseAutoencoder` in place.

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
        schedule: the penalty's coefficient.
        n_updates: int64 scalar, updates made (skipped steps do not count).

    Example:
        >>> from sae_kernels.nn import TopKConfig, TopKSAE
        >>> from sae_kernels.config import TrainConfig
        >>> from sae_kernels.step import FusedStep
        >>> step = FusedStep(TopKSAE(TopKConfig(8, 32, 4)), TrainConfig(compute="float32"))
        >>> x = torch.randn(64, 8)
        >>> losses = [float(step(x, lr=1e-3).loss) for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(self, sae: SparseAutoencoder, config: TrainConfig) -> None:
        super().__init__(sae, config)
        device = sae.W_enc.device
        self.dtype = compute_dtype(config.compute, device)
        if config.master == "split" and self.dtype != torch.bfloat16:
            raise ValueError(f"compute: expected 'bfloat16' with master 'split', got {self.dtype}")
        self.adam = FusedAdam(sae, config, self.dtype)
        self.rows, self.n_updates = self.adam.rows, self.adam.n_updates
        # Until the first step has been seen a ReLU-like SAE is taken to be dense, as it starts.
        self.dense_next = can_be_dense(sae, config)
        self._scratch: torch.Tensor | None = None
        self._all_latents = _all_latents(sae.config.n_latents, device)

    @torch.no_grad()
    def __call__(
        self,
        x: torch.Tensor,
        *,
        lr: float | torch.Tensor,
        k: float | None = None,
        target: torch.Tensor | None = None,
    ) -> StepResult:
        """One step on raw activations [B, input width] with this learning rate and k.

        A transcoder also takes the activations that it is to reconstruct, [B, output width].
        """
        self.sae.train()
        x, target = checked_batch(self.sae, x, target)
        batch, variance = self._batch(x, target, k)
        run = dense_pass if self.dense_next else sparse_pass
        operands = Operands(self.adam.operand("W_enc"), self.adam.operand("W_dec"))
        done = run(self.sae, operands, batch, self.schedule)
        gradients, aux_loss = self._gradients(done, batch)
        loss = done.loss + aux_loss
        finite = self.adam.update(gradients, loss, lr)
        l0 = done.fired.sum() / x.shape[0]
        self.advance(done.fired, x.shape[0], l0, finite)
        if can_be_dense(self.sae, self.config):
            entries = x.shape[0] * self.sae.config.n_latents
            self.dense_next = done.n_kept > DENSE_FROM * entries
        return StepResult(loss, done.error / variance, l0, aux_loss, ~finite, done.fired)

    def _living(self) -> dict[str, torch.Tensor]:
        return super()._living() | self.adam.living()

    def state(self) -> State:
        """Everything but the weights that the next step depends on."""
        return super().state() | State({}, {"dense_next": self.dense_next})

    def load_state(self, state: State) -> None:
        """Takes up what :meth:`state` gave; the SAE had its weights before this step was made."""
        super().load_state(state)
        self.dense_next = bool(state.values["dense_next"])

    def weights(self) -> dict[str, torch.Tensor]:
        """The SAE's state dict, its master weights in fp32 wherever they lie."""
        return super().weights() | self.adam.masters()

    @torch.no_grad()
    def restore_(self) -> None:
        """Gives the module its fp32 matrices back; no step can follow."""
        self.adam.restore_()

    def _scratch_like(self, x: torch.Tensor) -> torch.Tensor:
        # Kept between steps: fresh pages for a few MiB cost more than the sums that go there. On a
        # GPU torch keeps them itself, and a captured graph must write to memory of its own.
        if x.device.type != "cpu":
            return torch.empty_like(x)
        if self._scratch is None or self._scratch.shape != x.shape:
            self._scratch = torch.empty_like(x)
        return self._scratch

    def _batch(
        self, x: torch.Tensor, target: torch.Tensor, k: float | None
    ) -> tuple[Batch, torch.Tensor]:
        """The batch as a pass takes it, and its variance."""
        sae, config = self.sae, self.config
        scratch = self._scratch_like(target)
        scale, variance = loss_scale(target, config.loss, scratch)
        x_centred = torch.sub(x, sae.b_dec, out=scratch) if sae.config.subtract_b_dec else x
        x_centred = x_centred.to(self.dtype)
        sums = dead = None
        if config.preact_coefficient:
            dead = self.dead.mask()
            W_enc = self.adam.operand("W_enc") if config.master == "split" else sae.W_enc
            sums = W_enc.float() @ x_centred.float().sum(0) + x.shape[0] * sae.b_enc
        skips = sae.config.skip
        batch = Batch(
            x=x_centred,
            target=target - x @ sae.W_skip.T if skips else target,
            scale=scale,
            k=k_of(sae, k),
            norms=sae.decoder_norms() if needs_norms(config) else None,
            sums=sums,
            dead=dead,
            prefixes=self.prefixes(),
            skip_input=x if skips else None,
        )
        return batch, variance

    def _gradients(self, done: Pass, batch: Batch) -> tuple[dict[str, Gradient], torch.Tensor]:
        """Every parameter's gradient, in parts, and AuxK's loss."""
        gradients = dict(done.gradients)
        gradients["b_dec"] = self._b_dec_gradient(done)
        no_loss = done.loss.new_zeros(())
        if not self.config.auxk_alpha:
            return gradients, no_loss
        latents, count = self.dead.pick(self.config.auxk_latents, self.sae.backend)
        if not latents.numel():  # on the CPU, where it is known that none is dead
            return gradients, no_loss
        aux_loss, dW_enc, db_enc, dW_dec = auxk(
            batch.x,
            done.residual,
            self.adam.operand("W_enc"),
            self.sae.b_enc,
            self.adam.operand("W_dec"),
            latents,
            count,
            self.k_aux,
            self.config.auxk_alpha,
            backend=self.sae.backend,
        )
        for name, block in (("W_enc", dW_enc), ("b_enc", db_enc[:, None]), ("W_dec", dW_dec)):
            gradients[name] = _with_rows(gradients[name], block, latents)
        return gradients, aux_loss

    def _b_dec_gradient(self, done: Pass) -> Gradient:
        """Through the output and, where b_dec is subtracted from the input, through that too."""
        grad = done.db_dec
        if self.sae.config.subtract_b_dec:
            grad = grad - self._rows_weighted(self.adam.operand("W_enc"), done.dx_sum)
        return Gradient.whole(grad[None])

    def _rows_weighted(self, W: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``W^T weights`` [D]: a decode of all latents, split over some pretended tokens."""
        n_latents, (parts, width) = W.shape[0], self._all_latents.shape
        values = pad(weights, (0, parts * width - n_latents)).view(parts, width)
        partial: torch.Tensor = decode(
            values, self._all_latents, W, None, None, backend=self.sae.backend
        )
        return partial.sum(0)


def _all_latents(n_latents: int, device: torch.device) -> torch.Tensor:
    """Every latent once, int32 [parts, width]; the last row is filled up with the last latent."""
    parts = min(64, n_latents)
    width = -(-n_latents // parts)
    indices = torch.arange(parts * width, dtype=torch.int32, device=device)
    return indices.clamp_(max=n_latents - 1).view(parts, width)


def _with_rows(gradient: Gradient, block: torch.Tensor, latents: torch.Tensor) -> Gradient:
    """Adds rows of some latents (-1: none) to a gradient."""
    if gradient.dense is None:
        return gradient._replace(dense=block, dense_latents=latents)
    # The dense block that is there holds every latent, in order.
    used = latents >= 0
    rows = torch.where(used[:, None], block, 0)
    dense = gradient.dense.index_add(0, latents.clamp(min=0).long(), rows)
    return gradient._replace(dense=dense)
