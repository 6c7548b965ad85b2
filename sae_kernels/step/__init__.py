"""One training step: losses, gradients, the optimizer and the dead-latent counters."""

from sae_kernels.step.adam import OutsideGradient
from sae_kernels.step.autograd_step import AutogradStep
from sae_kernels.step.base import StepBase, StepResult, TrainingStep
from sae_kernels.step.fused_step import Differentiated, FusedStep

__all__ = [
    "AutogradStep",
    "Differentiated",
    "FusedStep",
    "OutsideGradient",
    "StepBase",
    "StepResult",
    "TrainingStep",
]
