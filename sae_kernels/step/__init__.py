"""One training step: losses, gradients, the optimizer and the dead-latent counters."""

from sae_kernels.step.autograd_step import AutogradStep
from sae_kernels.step.base import StepBase, StepResult, TrainingStep
from sae_kernels.step.fused_step import FusedStep

__all__ = ["AutogradStep", "FusedStep", "StepBase", "StepResult", "TrainingStep"]
