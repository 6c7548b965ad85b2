"""GraphedStep: a FusedStep replayed as a CUDA graph, so that the host launches one thing a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels import backends
from sae_kernels.step.fused_step import FusedStep

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sae_kernels.step.base import StepResult, TrainingStep
    from sae_kernels.step.state import State

# Steps of one kind that are made before it is captured. By then its kernels are compiled and
# loaded, which a capture does not allow; and while k changes faster, a graph would not pay.
STEADY = 8


class Captured(NamedTuple):
    """A recorded step: ``replay`` makes it again, and ``result`` then holds its figures."""

    replay: Callable[[], None]
    result: StepResult


def eager_reason(step: TrainingStep) -> str | None:
    """Why a step is launched kernel by kernel and not replayed as a CUDA graph; None: it can be.

    A graph repeats what the host did once. So nothing that the host decides may change from step to
    step but the learning rate and k, and it may not wait for what the device finds.

    Example:
        >>> from sae_kernels.nn import TopKSAE
        >>> eager_reason(FusedStep(TopKSAE(8, 32, k=4)))
        'the SAE is on cpu, CUDA graphs are for GPUs'
    """
    sae = step.sae
    if not isinstance(step, FusedStep):
        return f"a {type(step).__name__} may wait for the device, a FusedStep does not"
    if sae.W_enc.device.type != "cuda":
        return f"the SAE is on {sae.W_enc.device}, CUDA graphs are for GPUs"
    return changing_reason(step)


def changing_reason(step: FusedStep) -> str | None:
    """:func:`eager_reason` of a FusedStep, whatever its device."""
    sae, objective = step.sae, step.objective
    if not sae.keeps_fixed_number:
        return (
            f"{type(sae).__name__} keeps another number of entries in each batch, for which the "
            "host waits"
        )
    if objective.sparsity != "none" or objective.target_l0 is not None:
        return "the coefficient of the sparsity penalty changes on the host"
    if getattr(objective, "random_prefixes", 0):
        return "random_prefixes are drawn on the host"
    return None


class GraphedStep:
    """Replays a FusedStep as a CUDA graph, one for each k, batch shape and choice of backend.

    Same results, bit for bit; the figures of a :class:`~sae_kernels.step.StepResult` are valid
    until the next step, which overwrites them. A kind of step that has not come often enough yet is
    made as it is. If a capture fails all further steps are, and ``reason`` says why.

    Args:
        step: one without an :func:`eager_reason`.
        capture: records a call without carrying it out.

    Attributes:
        sae, dead: the step's.
        reason: why the last step was not a replay, or None.
    """

    def __init__(
        self,
        step: FusedStep,
        capture: Callable[[Callable[[], StepResult]], Captured] | None = None,
    ) -> None:
        self.step, self.sae, self.dead = step, step.sae, step.dead
        self.reason: str | None = "no step has been made"
        self._capture = captured if capture is None else capture
        self._kind: tuple[Any, ...] | None = None
        self._seen = 0
        self._graph: Captured | None = None
        self._inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
        self._failed: str | None = None

    def __call__(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        *,
        lr: float,
        k: float | None = None,
        target: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> StepResult:
        """One update; see :meth:`FusedStep.__call__`."""
        if not (isinstance(x, torch.Tensor) and isinstance(target, torch.Tensor | None)):
            self.reason = "the batch comes in micro-batches"
            return self.step(x, lr=lr, k=k, target=target)
        kind = self._kind_of(x, target, k)
        if kind != self._kind:
            self._kind, self._seen, self._graph = kind, 0, None
        self._seen += 1
        if self._failed is None and self._graph is None and self._seen > STEADY:
            self._record(x, lr, k, target)
        elif self._graph is not None:
            # All that the host does in a step: with neither penalty nor prefixes it counts them.
            self.step.schedule.advance(self._graph.result.l0)
        if self._graph is None:
            few = f"step {self._seen} of its kind, {STEADY} come before a capture"
            self.reason = self._failed or few
            return self.step(x, lr=lr, k=k, target=target)
        self.reason = None
        x_read, lr_read, target_read = self._inputs
        x_read.copy_(x)
        lr_read.fill_(lr)
        if target_read is not None and target is not None:
            target_read.copy_(target)
        self._graph.replay()
        return self._graph.result

    def _kind_of(
        self, x: torch.Tensor, target: torch.Tensor | None, k: float | None
    ) -> tuple[Any, ...]:
        """What a graph is recorded for."""
        given = [(t.shape, t.dtype, t.device) for t in (x, target) if t is not None]
        trained = [parameter.requires_grad for parameter in self.sae.parameters()]
        return given, k, trained, self.sae.backend, backends.requested()

    def _record(
        self, x: torch.Tensor, lr: float, k: float | None, target: torch.Tensor | None
    ) -> None:
        rate = torch.full((), lr, dtype=torch.float64, device=x.device)
        read = x.clone(), rate, None if target is None else target.clone()
        schedule = self.step.schedule
        before = schedule.step
        try:
            self._graph = self._capture(lambda: self.step(read[0], lr=read[1], k=k, target=read[2]))
            self._inputs = read
        except RuntimeError as error:  # nothing was carried out
            schedule.step = before
            self._failed = f"a step could not be captured: {error}"

    def state(self) -> State:
        """All that the next step depends on, without the weights; nothing is copied."""
        return self.step.state()

    def load_state(self, state: State) -> None:
        """Restores what :meth:`state` returned; the SAE has its weights already."""
        self.step.load_state(state)

    def weights(self) -> dict[str, torch.Tensor]:
        """The SAE's state dict with its master weights in fp32."""
        return self.step.weights()

    def restore_(self) -> None:
        """Restores the module's fp32 matrices and compute dtype; no step can follow."""
        self._graph = None
        self.step.restore_()


def captured(call: Callable[[], StepResult]) -> Captured:
    """Records a call as a CUDA graph on the current device."""
    graph = torch.cuda.CUDAGraph()
    # Of this thread alone: another one is reading batches and pins memory for them.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = call()
    return Captured(graph.replay, result)
