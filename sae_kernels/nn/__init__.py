"""Modules on top of :mod:`sae_kernels.functional`."""

from sae_kernels.nn.config import TopKConfig
from sae_kernels.nn.initialise import geometric_median
from sae_kernels.nn.topk import SAEOutput, TopKSAE

__all__ = ["SAEOutput", "TopKConfig", "TopKSAE", "geometric_median"]
