"""FusedStep on the weights and the Adam of another library's trainer, where they lie.

The optimizer stays what it is: its state holds the moments that the kernels update, in its own
format, so that a checkpoint written in this way is one that the library could have written.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels import functional
from sae_kernels.config.optimizer import OptimizerConfig
from sae_kernels.functional.recording import autocast_dtype
from sae_kernels.integrations.layout import laid_like
from sae_kernels.integrations.patching import unfit
from sae_kernels.step import FusedStep, OutsideGradient

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sae_kernels.config.objective import ObjectiveConfig
    from sae_kernels.integrations.layout import LatentRows
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step import Differentiated, StepResult

_COMPUTE = {None: "float32", torch.float32: "float32", torch.bfloat16: "bfloat16"}
_ADAM_OPTIONS = ("weight_decay", "amsgrad", "maximize", "differentiable", "decoupled_weight_decay")


def why_not_adam(optimizer: Any, module: torch.nn.Module) -> str | None:
    """Why FusedStep cannot stand for a trainer's optimizer at the next step, or None."""
    if type(optimizer) is not torch.optim.Adam:
        return f"an optimizer of type {type(optimizer).__name__}"
    if len(optimizer.param_groups) != 1:
        return "several parameter groups"
    group = optimizer.param_groups[0]
    option = next((name for name in _ADAM_OPTIONS if group.get(name)), None)
    if option is not None:
        return f"Adam with {option}"
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return "hooks on the optimizer's step"
    parameters = group["params"]
    if {id(p) for p in parameters} != {id(p) for p in module.parameters()}:
        return "an optimizer of other parameters than the SAE's"
    for p in parameters:
        if not p.requires_grad:
            return "frozen parameters"
        if p.dtype != torch.float32:
            return f"weights in {p.dtype}"
        if p.grad is not None:
            return "gradients from before the step"
        if p._backward_hooks or p._post_accumulate_grad_hooks:
            return "hooks on gradients"
    if len({float(optimizer.state[p]["step"]) for p in parameters if optimizer.state.get(p)}) > 1:
        return "parameters with different numbers of updates"
    return unfit(*parameters)


def why_not_autocast(like: torch.Tensor) -> str | None:
    """Why the current autocast is none that FusedStep has, or None."""
    dtype = autocast_dtype(like)
    return None if dtype in _COMPUTE else f"autocast to {dtype}"


class AdoptedStep:
    """A :class:`~sae_kernels.step.FusedStep` that trains another library's module.

    Nothing is kept here that the trainer does not own: weights, moments, update count and learning
    rate are read from it at every step, so that it may load, edit or replace them in between.

    Args:
        sae: an SAE on the meta device; its tensors become the trainer's.
        objective: loss and penalties, without AuxK.
        weights: the trainer's parameters by our names.
        turned: names of those that it stores as [D, F].
        optimizer: its Adam, of these parameters.
        rows: lays weights row by row, the turned ones latent by latent.
        clip_norm: largest norm of all gradients.
        who: the trainer's class, for the warning.

    Attributes:
        step: the step over the tensors of the last :meth:`differentiate`.
    """

    step: FusedStep

    def __init__(
        self,
        sae: SparseAutoencoder,
        objective: ObjectiveConfig,
        *,
        weights: Mapping[str, torch.nn.Parameter],
        turned: frozenset[str],
        optimizer: torch.optim.Adam,
        rows: LatentRows,
        clip_norm: float,
        who: str,
    ) -> None:
        self.sae, self.objective, self.weights, self.turned = sae, objective, weights, turned
        self.optimizer, self.rows, self.clip_norm, self.who = optimizer, rows, clip_norm, who
        self._built: Any = None
        self._warned = False
        device = next(iter(weights.values())).device
        for name, buffer in sae.named_buffers():
            unset = torch.nan if name == "last_key" else 0.0
            sae._buffers[name] = torch.full(buffer.shape, unset, dtype=buffer.dtype, device=device)

    def serves(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this is the step of an optimizer and of all its parameters, still the same."""
        mine = {id(p) for p in self.weights.values()}
        theirs = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return optimizer is self.optimizer and mine == theirs

    @torch.no_grad()
    def differentiate(self, x: torch.Tensor, *, k: float | None = None) -> Differentiated:
        """Losses and gradients of a batch [B, D] by the weights as they are now."""
        self._take_up(_COMPUTE[autocast_dtype(x)])
        return self.step.differentiate(x, k=k)

    @torch.no_grad()
    def update(self, done: Differentiated, outside: OutsideGradient | None = None) -> StepResult:
        """Clips, updates weights and moments, and counts the update in the optimizer's state.

        A batch whose loss or gradient is not finite changes nothing; the first such batch gives a
        warning, as the library would go on with weights that are NaN.
        """
        result = self.step.update(done, lr=self.optimizer.param_groups[0]["lr"], outside=outside)
        if result.skipped:
            self._warn()
        else:
            for p in self.weights.values():
                self.optimizer.state[p]["step"] += 1
                torch.autograd.graph.increment_version(p)
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers look at it
        self._built = self._signature(self.step.optimizer.compute)
        return result

    def _take_up(self, compute: str) -> None:
        """Makes the step over the trainer's tensors unless that of the last batch is still it."""
        for name, p in self.weights.items():
            if name in self.turned:
                self.rows.of(p)
            else:
                self.rows.straight(p)
            state = self.optimizer.state[p]
            if not state:
                state.update(self._fresh_state(p))
            for moment in ("exp_avg", "exp_avg_sq"):
                state[moment] = laid_like(state[moment], p)
        self.rows.follow(self.optimizer)
        if self._built != self._signature(compute):
            self._build(compute)
        some = next(iter(self.weights.values()))
        self.step.n_updates.fill_(int(self.optimizer.state[some]["step"]))

    def _build(self, compute: str) -> None:
        group = self.optimizer.param_groups[0]
        weights = {name: self._rows_of(name, p.data) for name, p in self.weights.items()}
        self.sae.load_state_dict({**self.sae.state_dict(), **weights}, assign=True)
        moments = {}
        for name, p in self.weights.items():
            state = self.optimizer.state[p]
            first, second = state["exp_avg"], state["exp_avg_sq"]
            moments[name] = self._rows_of(name, first), self._rows_of(name, second)
        beta1, beta2 = (float(beta) for beta in group["betas"])
        config = OptimizerConfig(
            beta1=beta1,
            beta2=beta2,
            eps=group["eps"],
            clip_norm=self.clip_norm,
            compute=compute,  # type: ignore[arg-type]
        )
        self.step = FusedStep(self.sae, self.objective, config, moments=moments)
        self._built = self._signature(compute)

    def _signature(self, compute: str) -> tuple[Any, ...]:
        """What a step was made from; whatever changes it asks for another one."""
        group = self.optimizer.param_groups[0]
        parts: list[Any] = [compute, *group["betas"], group["eps"]]
        for p in self.weights.values():
            state = self.optimizer.state[p]
            tensors = (p, state["exp_avg"], state["exp_avg_sq"])
            parts += [(t.data_ptr(), t.stride()) for t in tensors]
            # Kernels read copies of the weights; in fp32 they read the weights themselves.
            parts.append(p._version if compute != "float32" else None)
        return tuple(parts)

    def _rows_of(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.T if name in self.turned else tensor

    def _fresh_state(self, p: torch.Tensor) -> dict[str, torch.Tensor]:
        """An Adam state before the first step, as torch's Adam makes it."""
        group = self.optimizer.param_groups[0]
        on_device = group.get("capturable") or group.get("fused")
        return {
            "step": torch.zeros((), device=p.device if on_device else None),
            "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
        }

    def _warn(self) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{self.who}: expected finite activations, got a batch whose loss or gradient is NaN "
            "or infinite; its update was skipped (the library's own step would leave NaN in all "
            "weights), and so will later ones be; look at the data",
            RuntimeWarning,
            stacklevel=2,
        )


def of_dead_latents(
    step: FusedStep,
    done: Differentiated,
    latents: torch.Tensor,
    k: int,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    *,
    relu: bool,
) -> OutsideGradient:
    """A loss of what dead latents reconstruct by themselves, with its gradient.

    Args:
        step: whose weights these are.
        done: the batch.
        latents: int64 [A], the dead ones.
        k: how many of them a token keeps; the largest, by whatever ranks the step's latents.
        loss_of: the loss of their reconstruction [B, D], which has no b_dec; differentiable.
        relu: zero kept values that are not positive.
    """
    sae, dtype = step.sae, step.dtype
    W_enc = step.adam.operand("W_enc")[latents].float()
    W_dec = step.adam.operand("W_dec")[latents].float()
    leaves = [t.requires_grad_() for t in (W_enc, sae.b_enc.detach()[latents], W_dec)]
    norms = sae.rank_scale()
    assert done.x is not None
    with torch.enable_grad(), torch.autocast(W_enc.device.type, enabled=False):
        codes = functional.encode_topk(
            done.x,
            leaves[0],
            leaves[1],
            k,
            relu=relu,
            rank_scale=None if norms is None else norms[latents],
            compute_dtype=dtype,
        )
        loss = loss_of(functional.decode(codes, leaves[2], compute_dtype=dtype))
        grads = torch.autograd.grad(loss, leaves)
    gradients = dict(zip(("W_enc", "b_enc", "W_dec"), grads, strict=True))
    if sae.config.subtract_b_dec:
        gradients["b_dec"] = -(grads[1] @ W_enc.detach())
    return OutsideGradient(loss.detach(), gradients, latents.to(torch.int32))
