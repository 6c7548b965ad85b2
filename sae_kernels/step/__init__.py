"""One training step: losses, gradients, the optimizer and the dead-latent counters."""

from sae_kernels.step.autograd_step import ComposableStep
from sae_kernels.step.fused_step import FusedStep, StepResult

__all__ = ["ComposableStep", "FusedStep", "StepResult"]
