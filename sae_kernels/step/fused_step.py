"""FusedStep: a training step with closed-form gradients and no gradient tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.primitives.auxk import auxk
from sae_kernels.step.adam import FusedAdam, added, with_rows
from sae_kernels.step.base import MicroBatches, StepBase, StepResult, Variance, loss_scale
from sae_kernels.step.dense_pass import dense_pass
from sae_kernels.step.sparse_pass import PassResult, rows_weighted, sparse_pass
from sae_kernels.step.state import DeadRows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.nn.objective import Context
    from sae_kernels.primitives.terms import Gradient
    from sae_kernels.step.adam import Moments, OutsideGradient
    from sae_kernels.step.state import State

# The fraction of firing latents above which dense products are faster: measured between 1/24 and
# 1/12 in bf16 (docs/benchmarks.md).
DENSE_FROM = 1 / 20


class Differentiated(NamedTuple):
    """A batch's losses and gradients, and the tensors that they were made of.

    Tensors are valid until the step's next call.

    Attributes:
        loss: scalar, the whole loss, with AuxK.
        aux_loss: scalar, AuxK's part of it.
        errors: scalar, the squared error; with prefixes [G], that of each one's reconstruction, the
            whole one last.
        variance: scalar, the batch's summed squared distance from its mean.
        residual: fp32 [B, output width], the reconstruction less the target, in the scale of
            training; empty for a batch in micro-batches.
        x: [B, input width], what the encoder read: scaled, centred, in the compute dtype; None for
            micro-batches.
        preacts: the kept entries with their pre-activations; None for micro-batches, and where
            most latents fired and dense products ran.
        fired: int32 [F], how often each latent fired.
        n_tokens: B.
        n_kept: number of entries that the encoder kept.
        gradients: of all parameters by name, in parts.
    """

    loss: torch.Tensor
    aux_loss: torch.Tensor
    errors: torch.Tensor
    variance: torch.Tensor
    residual: torch.Tensor
    x: torch.Tensor | None
    preacts: SparseCodes | None
    fired: torch.Tensor
    n_tokens: int
    n_kept: int
    gradients: dict[str, Gradient]


class FusedStep(StepBase):
    """Training step of a :class:`~sae_kernels.nn.SparseAutoencoder` by fused kernels, in place.

    Only the encoder product touches B F entries; everything after it touches the kept entries
    alone. Gradients reach the optimizer as sparse terms, not as matrices; micro-batches are the
    exception.

    Args:
        sae: the module; its fp32 parameters are the master weights. The kernels read compute copies
            made here, so changing parameters from outside needs a new FusedStep. With
            ``master_weights="split"`` its matrices become bf16 halves until :meth:`restore_`.
        arguments: objective, optimizer, steps, seed; see :class:`~sae_kernels.step.StepBase`.
        moments: Adam's first and second moments by parameter name that somebody else owns, fp32
            like the parameters: they are trained where they lie, as the parameters are. Set
            ``n_updates`` to the updates that they have seen. None: zeros of its own.

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

    def __init__(
        self,
        sae: SparseAutoencoder,
        *arguments: Any,
        moments: Mapping[str, Moments] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(sae, *arguments, **options)
        self.adam = FusedAdam(sae, self.optimizer, self.dtype, moments or {}, self.ranks)
        self.matrices, self.n_updates = self.adam.matrices, self.adam.n_updates
        # Lazy Adam skips latents that did not fire; a dense gradient has a row for every latent.
        dense_adam = self.optimizer.adam == "dense"
        sums = self.ranks is None and sae.sums_over_entries(self.objective)
        self.can_be_dense = dense_adam and sums
        # ReLU-like SAEs start dense.
        self.dense_next = self.can_be_dense
        self._scratch: torch.Tensor | None = None

    def _check_settings(self) -> None:
        if not (self.sae.decodes_by_rows and self.sae.encodes_once):
            raise ValueError(
                "sae: expected one product with W_enc and a sum of rows of W_dec, got "
                f"{type(self.sae).__name__}; train it with AutogradStep (route 'autograd')"
            )
        if self.optimizer.master_weights == "split" and self.dtype != torch.bfloat16:
            raise ValueError(
                f"compute: expected 'bfloat16' with master_weights 'split', got {self.dtype}"
            )
        for name, parameter in self.sae.named_parameters():
            if parameter.dtype != torch.float32:
                raise TypeError(f"{name}: expected float32 master weights, got {parameter.dtype}")

    def __call__(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        *,
        lr: float | torch.Tensor,
        k: float | None = None,
        target: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> StepResult:
        """One update from raw activations: :meth:`differentiate`, then :meth:`update`.

        Args:
            x: [B, input width], any floating dtype; or micro-batches [b, input width] that are the
                batch together. Their gradients are added up in two matrices of the weights' size.
            lr: learning rate of this step; a tensor inside a CUDA graph.
            k: replaces the configuration's k at this step.
            target: [B, output width], the activations that a transcoder reconstructs; like x.

        Raises:
            ValueError: shapes that do not fit; a missing or needless target.
        """
        return self.update(self.differentiate(x, k=k, target=target), lr=lr)

    @torch.no_grad()
    def differentiate(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        *,
        k: float | None = None,
        target: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> Differentiated:
        """The losses and gradients of a batch, for one :meth:`update`; changes no weight.

        Arguments and errors are those of a call.

        Example:
            >>> from sae_kernels.nn import TopKSAE
            >>> from sae_kernels.step import FusedStep, OutsideGradient
            >>> step = FusedStep(TopKSAE(8, 32, k=4))
            >>> done = step.differentiate(torch.randn(64, 8))
            >>> done.preacts.indices.shape, done.residual.shape
            (torch.Size([64, 4]), torch.Size([64, 8]))
            >>> decay = OutsideGradient(torch.tensor(0.0), {"b_enc": 0.1 * step.sae.b_enc.detach()})
            >>> bool(step.update(done, lr=1e-3, outside=decay).skipped)
            False
        """
        sae = self.sae if self.sae.training else self.sae.train()
        batch = MicroBatches(x, target, self.checked)
        scale, variance = batch.loss_scale(self.objective.loss, self._scratch_like)
        W_enc, W_dec = self.adam.operand("W_enc"), self.adam.operand("W_dec")
        if self.ranks is not None:
            W_dec = self.ranks.decoder(W_dec)
        survey = self.survey(batch.inputs(self._encoder_input), k, W_enc)
        run = dense_pass if self.dense_next else sparse_pass
        aux = AuxK(self, whole=len(batch) == 1)

        def differentiated(rows: torch.Tensor, y: torch.Tensor) -> PassResult:
            context = self.context(
                self._encoder_input(rows),
                y - rows @ sae.W_skip.T if sae.config.skip else y,
                scale,
                k,
                total_tokens=batch.n_tokens,
                survey=survey,
                skip_input=rows if sae.config.skip else None,
                leaves={},
            )
            result = run(sae, W_enc, W_dec, context)
            aux.add(result.residual, context)
            return result

        total = None
        for rows, y in batch:
            if len(batch) == 1:
                total = differentiated(rows, y)
            else:
                total = _sum(total, differentiated(rows, y), sae.backend)
        assert total is not None
        gradients = total.gradients
        # The input's gradient and AuxK read the weights from before the update.
        if sae.config.subtract_b_dec:
            dh_sum, ranks = total.dh_sum, self.ranks
            if ranks is None:
                through_input = rows_weighted(W_enc, dh_sum, sae.backend)
            else:
                through_input = ranks.over_latents(
                    lambda some: rows_weighted(W_enc[some], dh_sum[some], sae.backend)
                )
            gradients["b_dec"] = _minus(gradients["b_dec"], through_input)
        aux_loss = aux.finish(gradients)
        return Differentiated(
            loss=total.loss + aux_loss,
            aux_loss=aux_loss,
            errors=total.errors,
            variance=variance,
            residual=total.residual,
            x=total.x,
            preacts=total.preacts,
            fired=total.fired,
            n_tokens=batch.n_tokens,
            n_kept=total.n_kept,
            gradients=gradients,
        )

    @torch.no_grad()
    def update(
        self,
        done: Differentiated,
        *,
        lr: float | torch.Tensor,
        outside: OutsideGradient | None = None,
    ) -> StepResult:
        """The update by the gradients of a batch, which are used up.

        Args:
            done: of :meth:`differentiate`.
            lr: learning rate of this step.
            outside: a further loss with its gradient, from the weights as they are; it is clipped
                together with the step's own and counts as its ``aux_loss``.
        """
        gradients, loss, aux_loss = done.gradients, done.loss, done.aux_loss
        if outside is not None:
            gradients = outside.added(gradients, self.sae)
            loss, aux_loss = loss + outside.loss, aux_loss + outside.loss
        finite = self.adam.update(gradients, loss, lr)
        l0 = self.advance(done.fired, done.n_tokens, finite)
        if self.can_be_dense:
            entries = done.n_tokens * len(self.sae.latents)
            self.dense_next = done.n_kept > DENSE_FROM * entries
        error = done.errors if done.errors.dim() == 0 else done.errors[-1]
        return StepResult(loss, error / done.variance, l0, aux_loss, ~finite, done.fired)

    def _encoder_input(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens in the compute dtype, centred where that is the variant; valid until the next."""
        if self.sae.config.subtract_b_dec:
            x = torch.sub(x, self.sae.b_dec, out=self._scratch_like(x))
        return x.to(self.dtype)

    def _scratch_like(self, x: torch.Tensor) -> torch.Tensor:
        # Reused on the CPU, where fresh pages cost more than the sums written there. A GPU's
        # allocator reuses memory itself, and a captured graph needs memory of its own.
        if x.device.type != "cpu":
            return torch.empty_like(x)
        if self._scratch is None or self._scratch.numel() < x.numel():
            self._scratch = torch.empty_like(x)
        if self._scratch.shape == x.shape:
            return self._scratch
        return self._scratch.flatten()[: x.numel()].view(x.shape)

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


def _minus(gradient: Gradient, row: torch.Tensor) -> Gradient:
    """A dense one-row gradient minus a row."""
    assert gradient.dense is not None
    return gradient._replace(dense=gradient.dense - row)


def _sum(total: PassResult | None, part: PassResult, backend: str | None) -> PassResult:
    """Adds a micro-batch's loss and gradients to those before it."""
    before = {} if total is None else total.gradients
    gradients = before | {
        name: added(before.get(name), gradient, backend)
        for name, gradient in part.gradients.items()
    }
    nothing = part.residual.new_empty((0, part.residual.shape[1]))  # nobody asks for it again
    if total is None:
        return part._replace(gradients=gradients, residual=nothing, x=None, preacts=None)
    return PassResult(
        loss=total.loss + part.loss,
        errors=total.errors + part.errors,
        residual=nothing,
        x=None,
        preacts=None,
        gradients=gradients,
        dh_sum=total.dh_sum + part.dh_sum,
        fired=total.fired + part.fired,
        n_kept=total.n_kept + part.n_kept,
    )


class AuxK:
    """The AuxK loss of a step and its gradients, of the latents that were dead before it.

    Args:
        step: the step, whose dead latents are picked now.
        whole: whether the batch comes in one piece. If not, the residual's variance, which the loss
            is divided by, is known after the last one only.
    """

    def __init__(self, step: FusedStep, whole: bool) -> None:
        self.step, self.variance = step, None if whole else Variance()
        self._sums: tuple[torch.Tensor, ...] | None = None
        if step.objective.auxk_alpha:
            sae, most = step.sae, step.objective.auxk_latents
            latents, count = step.dead.pick(most, sae.backend)
            W_enc, W_dec = step.adam.operand("W_enc"), step.adam.operand("W_dec")
            self.rows = DeadRows(W_enc, sae.b_enc, W_dec, latents, count, own=latents)
            if step.ranks is not None:
                ages = step.dead.since_fired
                self.rows = step.ranks.longest_dead(self.rows, ages, most)

    @property
    def _is_on(self) -> bool:
        # On the CPU alone the number of dead latents is known.
        return bool(self.step.objective.auxk_alpha) and self.rows.latents.numel() > 0

    def add(self, residual: torch.Tensor, context: Context) -> None:
        """Takes in the rows of a batch or micro-batch, given the main residual."""
        if not self._is_on:
            return
        step, rows, variance = self.step, self.rows, None
        if self.variance is not None:
            self.variance.add(residual)
            variance = residual.new_ones(())
        elif step.ranks is not None:  # of which each has some tokens
            variance = loss_scale(residual, "fvu")[1]
        dead = (rows.W_enc, rows.b_enc, rows.W_dec, rows.latents, rows.number)
        settings = (step.k_aux, step.objective.auxk_alpha, variance)

        def of(x: torch.Tensor, e: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return auxk(x, e, *dead, *settings, backend=step.sae.backend)

        given = context.x, residual
        parts = of(*given) if step.ranks is None else step.ranks.over_tokens(of, *given)
        before = self._sums
        pairs = [] if before is None else zip(before, parts, strict=True)
        self._sums = parts if before is None else tuple(a + b for a, b in pairs)

    def finish(self, gradients: dict[str, Gradient]) -> torch.Tensor:
        """Adds AuxK's gradients to ``gradients`` and returns its loss."""
        if self._sums is None:
            return self.step.dead.since_fired.new_zeros((), dtype=torch.float32)
        sums = self._sums
        if self.variance is not None:  # with no dead latent all is 0, whatever the variance
            weight = torch.where(self.rows.number > 0, 1 / self.variance.total, 0)
            sums = tuple(weight * each for each in sums)
        loss, dW_enc, db_enc, dW_dec = sums
        for name, block in (("W_enc", dW_enc), ("b_enc", db_enc[:, None]), ("W_dec", dW_dec)):
            gradients[name] = with_rows(gradients[name], block, self.rows.own)
        return loss
