"""FusedStep: a training step with closed-form gradients and no gradient tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from sae_kernels.primitives.auxk import auxk
from sae_kernels.primitives.decode import decode
from sae_kernels.step.adam import FusedAdam
from sae_kernels.step.base import StepBase, StepResult, loss_scale
from sae_kernels.step.dense_pass import dense_pass
from sae_kernels.step.sparse_pass import sparse_pass

if TYPE_CHECKING:
    from typing import Any

    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.nn.objective import Context
    from sae_kernels.primitives.terms import Gradient
    from sae_kernels.step.state import State

# The fraction of firing latents above which dense products are faster: measured between 1/24 and
# 1/12 in bf16 (docs/benchmarks.md).
DENSE_FROM = 1 / 20


class FusedStep(StepBase):
    """Training step of a :class:`~sae_kernels.nn.SparseAutoencoder` by fused kernels, in place.

    Only the encoder product touches B F entries; everything after it touches the kept entries
    alone. Gradients reach the optimizer as sparse terms, never as matrices.

    Args:
        sae: the module; its fp32 parameters are the master weights. The kernels read compute copies
            made here, so changing parameters from outside needs a new FusedStep. With
            ``master_weights="split"`` its matrices become bf16 halves until :meth:`restore_`.
        arguments: objective, optimizer, steps, seed; see :class:`~sae_kernels.step.StepBase`.

    On a GPU a step never waits for the host and can be captured in a CUDA graph; the learning rate
    must then be a tensor, as a number would be frozen into the graph.

    Attributes:
        matrices: matrix view, Adam moments and compute copy of each parameter, by name.
        n_updates: int64 scalar, updates made (skipped steps do not count).

    Raises:
        TypeError: an objective of another architecture, weights that are not fp32.
        ValueError: settings that do not go together; a decoder that is not a sum of rows.

    Example:
        >>> from sae_kernels.nn import TopKSAE
        >>> from sae_kernels.step import FusedStep
        >>> step = FusedStep(TopKSAE(8, 32, k=4))
        >>> x = torch.randn(64, 8)
        >>> losses = [float(step(x, lr=1e-3).loss) for _ in range(20)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(self, sae: SparseAutoencoder, *arguments: Any, **options: Any) -> None:
        super().__init__(sae, *arguments, **options)
        self.adam = FusedAdam(sae, self.optimizer, self.dtype)
        self.matrices, self.n_updates = self.adam.matrices, self.adam.n_updates
        # Lazy Adam skips latents that did not fire; a dense gradient has a row for every latent.
        dense_adam = self.optimizer.adam == "dense"
        self.can_be_dense = dense_adam and sae.sums_over_entries(self.objective)
        # ReLU-like SAEs start dense.
        self.dense_next = self.can_be_dense
        self._scratch: torch.Tensor | None = None

    def _check_settings(self) -> None:
        if not self.sae.decodes_by_rows:
            raise ValueError(
                "sae: expected a decoder that is a sum of rows of W_dec, got "
                f"{type(self.sae).__name__}; train it with AutogradStep (route 'autograd')"
            )
        if self.optimizer.master_weights == "split" and self.dtype != torch.bfloat16:
            raise ValueError(
                f"compute: expected 'bfloat16' with master_weights 'split', got {self.dtype}"
            )
        for name, parameter in self.sae.named_parameters():
            if parameter.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32 master weights, got {parameter.dtype}")

    @torch.no_grad()
    def __call__(
        self,
        x: torch.Tensor,
        *,
        lr: float | torch.Tensor,
        k: float | None = None,
        target: torch.Tensor | None = None,
    ) -> StepResult:
        """One training step on raw activations.

        Args:
            x: [B, input width], any floating dtype.
            lr: learning rate of this step; a tensor inside a CUDA graph.
            k: replaces the configuration's k at this step.
            target: [B, output width], the activations that a transcoder reconstructs.

        Raises:
            ValueError: shapes that do not fit; a missing or needless target.
        """
        sae = self.sae.train()
        x, target = self.checked(x, target)
        scratch = self._scratch_like(target)
        scale, variance = loss_scale(target, self.objective.loss, scratch)
        x_centred = torch.sub(x, sae.b_dec, out=scratch) if sae.config.subtract_b_dec else x
        skips = sae.config.skip
        context = self.context(
            x_centred.to(self.dtype),
            target - x @ sae.W_skip.T if skips else target,
            scale,
            k,
            skip_input=x if skips else None,
            leaves={},
        )

        W_enc, W_dec = self.adam.operand("W_enc"), self.adam.operand("W_dec")
        run = dense_pass if self.dense_next else sparse_pass
        result = run(sae, W_enc, W_dec, context)
        gradients = result.gradients
        # The input's gradient and AuxK read the weights from before the update.
        if sae.config.subtract_b_dec:
            through_input = rows_weighted(W_enc, result.dh_sum, sae.backend)
            gradients["b_dec"] = _minus(gradients["b_dec"], through_input)
        aux_loss = self._add_auxk(gradients, result.residual, context)
        loss = result.loss + aux_loss
        finite = self.adam.update(gradients, loss, lr)

        l0 = self.advance(result.fired, context.n_tokens, finite)
        if self.can_be_dense:
            entries = context.n_tokens * sae.config.n_latents
            self.dense_next = result.n_kept > DENSE_FROM * entries
        return StepResult(loss, result.error / variance, l0, aux_loss, ~finite, result.fired)

    def _add_auxk(
        self, gradients: dict[str, Gradient], residual: torch.Tensor, context: Context
    ) -> torch.Tensor:
        """Adds AuxK's gradients to ``gradients`` and returns its loss."""
        sae, objective = self.sae, self.objective
        no_loss = residual.new_zeros(())
        if not objective.auxk_alpha:
            return no_loss
        latents, count = self.dead.pick(objective.auxk_latents, sae.backend)
        if not latents.numel():  # only on the CPU, where the number is known
            return no_loss
        aux_loss, dW_enc, db_enc, dW_dec = auxk(
            context.x,
            residual,
            self.adam.operand("W_enc"),
            sae.b_enc,
            self.adam.operand("W_dec"),
            latents,
            count,
            self.k_aux,
            objective.auxk_alpha,
            backend=sae.backend,
        )
        for name, block in (("W_enc", dW_enc), ("b_enc", db_enc[:, None]), ("W_dec", dW_dec)):
            gradients[name] = _with_rows(gradients[name], block, latents)
        return aux_loss

    def _scratch_like(self, x: torch.Tensor) -> torch.Tensor:
        # Reused on the CPU, where fresh pages cost more than the sums written there. A GPU's
        # allocator reuses memory itself, and a captured graph needs memory of its own.
        if x.device.type != "cpu":
            return torch.empty_like(x)
        if self._scratch is None or self._scratch.shape != x.shape:
            self._scratch = torch.empty_like(x)
        return self._scratch

    def _live_tensors(self) -> dict[str, torch.Tensor]:
        return super()._live_tensors() | self.adam.live_tensors()

    def state(self) -> State:
        """All that the next step depends on, without the weights; nothing is copied."""
        state = super().state()
        return state._replace(values={**state.values, "dense_next": self.dense_next})

    def load_state(self, state: State) -> None:
        """Restores what :meth:`state` returned; make the step after the SAE got its weights."""
        super().load_state(state)
        self.dense_next = bool(state.values["dense_next"])

    def weights(self) -> dict[str, torch.Tensor]:
        """The SAE's state dict with its master weights in fp32."""
        return super().weights() | self.adam.masters()

    @torch.no_grad()
    def restore_(self) -> None:
        """Restores the module's fp32 matrices and compute dtype; no step can follow."""
        super().restore_()
        self.adam.restore_()


def rows_weighted(W: torch.Tensor, weights: torch.Tensor, backend: str | None) -> torch.Tensor:
    """``W^T weights``, fp32 [D], of W [F, D] and fp32 weights [F], by the decode kernel.

    The latents are split over up to 64 rows of codes, so that threads share the work and the order
    of the sum does not depend on their number.
    """
    n_latents = W.shape[0]
    parts = min(64, n_latents)
    width = -(-n_latents // parts)
    latents = torch.arange(parts * width, dtype=torch.int32, device=W.device)
    latents = latents.clamp_(max=n_latents - 1).view(parts, width)
    values = pad(weights, (0, parts * width - n_latents)).view(parts, width)
    partial: torch.Tensor = decode(values, latents, W, None, None, backend=backend)
    return partial.sum(0)


def _minus(gradient: Gradient, row: torch.Tensor) -> Gradient:
    """A dense one-row gradient minus a row."""
    assert gradient.dense is not None
    return gradient._replace(dense=gradient.dense - row)


def _with_rows(gradient: Gradient, block: torch.Tensor, latents: torch.Tensor) -> Gradient:
    """Adds a block of rows to a gradient: row i is of ``latents[i]``, -1 is padding."""
    if gradient.dense is None:
        return gradient._replace(dense=block, dense_latents=latents)
    # The gradient's dense block has a row for every latent, in order.
    used = latents >= 0
    rows = torch.where(used[:, None], block, 0)
    dense = gradient.dense.index_add(0, latents.clamp(min=0).long(), rows)
    return gradient._replace(dense=dense)
