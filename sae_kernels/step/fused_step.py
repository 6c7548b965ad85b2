"""FusedStep: a training step from closed forms, without gradient tensors."""

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

# From this part of the latents on a token's codes are faster as a dense row: measured between 1/24
# and 1/12 in bf16 (docs/benchmarks.md).
DENSE_FROM = 1 / 20


class FusedStep(StepBase):
    """Trains a :class:`~sae_kernels.nn.SparseAutoencoder` in place, in the fewest passes.

    Only the encoder product touches B F entries; everything after it the kept entries. Gradients
    reach the optimizer as terms, never as matrices.

    Args:
        sae: the module; its parameters are fp32 and stay the master weights. Whoever changes them
            from outside makes a new FusedStep: the kernels read compute copies, made here. With
            ``master_weights="split"`` its matrices become the bf16 halves until :meth:`restore_`.
        arguments: as of :class:`~sae_kernels.step.StepBase`: objective, optimizer, steps, seed.

    On a GPU a step never waits for the host and can be captured in a CUDA graph; the learning rate
    then comes as a tensor, for a number would be frozen into the graph.

    Attributes:
        matrices: per parameter its matrix view, Adam moments and compute copy.
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
        if not sae.decodes_by_rows:
            raise ValueError(
                f"sae: expected a decoder that is a sum of rows of W_dec, got {type(sae).__name__};"
                " train it with AutogradStep (route 'autograd')"
            )
        super().__init__(sae, *arguments, **options)
        split = self.optimizer.master_weights == "split"
        if split and self.dtype != torch.bfloat16:
            raise ValueError(
                f"compute: expected 'bfloat16' with master_weights 'split', got {self.dtype}"
            )
        self.adam = FusedAdam(sae, self.optimizer, self.dtype)
        self.matrices, self.n_updates = self.adam.matrices, self.adam.n_updates
        # Lazy Adam leaves latents alone that did not fire, where a dense gradient has all rows.
        dense_adam = self.optimizer.adam == "dense"
        self.can_be_dense = dense_adam and sae.sums_over_entries(self.objective)
        # Until the first step has been seen a ReLU-like SAE is taken to be dense, as it starts.
        self.dense_next = self.can_be_dense
        self._scratch: torch.Tensor | None = None

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
        gradients = dict(result.gradients)
        # All that reads weights from before the update comes before it.
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
        """Adds AuxK's gradients to those of the batch, and gives its loss."""
        sae, objective = self.sae, self.objective
        no_loss = residual.new_zeros(())
        if not objective.auxk_alpha:
            return no_loss
        latents, count = self.dead.pick(objective.auxk_latents, sae.backend)
        if not latents.numel():  # on the CPU, where it is known that none is dead
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
        # Kept between steps: fresh pages for a few MiB cost more than the sums that go there. On a
        # GPU torch keeps them itself, and a captured graph must write to memory of its own.
        if x.device.type != "cpu":
            return torch.empty_like(x)
        if self._scratch is None or self._scratch.shape != x.shape:
            self._scratch = torch.empty_like(x)
        return self._scratch

    def _living(self) -> dict[str, torch.Tensor]:
        return super()._living() | self.adam.living()

    def state(self) -> State:
        """Everything but the weights that the next step depends on."""
        state = super().state()
        return state._replace(values={**state.values, "dense_next": self.dense_next})

    def load_state(self, state: State) -> None:
        """Takes up what :meth:`state` gave; the SAE had its weights before this step was made."""
        super().load_state(state)
        self.dense_next = bool(state.values["dense_next"])

    def weights(self) -> dict[str, torch.Tensor]:
        """The SAE's state dict, its master weights in fp32 wherever they lie."""
        return super().weights() | self.adam.masters()

    @torch.no_grad()
    def restore_(self) -> None:
        """Gives the module its fp32 matrices and its compute dtype back; no step can follow."""
        super().restore_()
        self.adam.restore_()


def rows_weighted(W: torch.Tensor, weights: torch.Tensor, backend: str | None) -> torch.Tensor:
    """``W^T weights`` [D] of W [F, D] and fp32 weights [F], by the decode kernel.

    The latents are split over up to 64 rows of codes, so that threads share them and the order of
    the sum does not depend on how many there are.
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
    """A gradient of one whole row, less another row."""
    assert gradient.dense is not None
    return gradient._replace(dense=gradient.dense - row)


def _with_rows(gradient: Gradient, block: torch.Tensor, latents: torch.Tensor) -> Gradient:
    """Adds rows of some latents (-1: none) to a gradient."""
    if gradient.dense is None:
        return gradient._replace(dense=block, dense_latents=latents)
    # The dense block that is there holds every latent, in order.
    used = latents >= 0
    rows = torch.where(used[:, None], block, 0)
    dense = gradient.dense.index_add(0, latents.clamp(min=0).long(), rows)
    return gradient._replace(dense=dense)
