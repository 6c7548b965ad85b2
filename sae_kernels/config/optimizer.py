"""Settings of the optimizer: Adam, clipping, and the precision of weights and moments."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sae_kernels.config.base import BELOW_ONE, POSITIVE, Settings, setting


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """Settings of Adam, and the precision of weights and moments.

    FusedStep takes all of them; AutogradStep runs torch's Adam and refuses what that lacks.

    Example:
        >>> OptimizerConfig(clip_norm=1.0, adam="lazy").beta1
        0.9
    """

    table = "optimizer"

    beta1: float = setting(0.9, "decay of Adam's first moment", BELOW_ONE)
    beta2: float = setting(0.999, "decay of Adam's second moment", BELOW_ONE)
    eps: float = setting(
        1e-08, "Adam's eps, added to the square root of the second moment", POSITIVE
    )
    clip_norm: float | None = setting(
        None,
        "largest global gradient norm, after projection (dictionary_learning: 1.0); None clips "
        "nothing (sparsify, OpenAI)",
        POSITIVE,
    )
    compute: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "dtype of the kernels' operands; auto is bfloat16 where the device multiplies it natively "
        "(a GPU, a CPU with AMX), else float32",
    )
    adam: Literal["dense", "lazy"] = setting(
        "dense",
        "Adam's update: dense, as torch.optim.Adam, or lazy, which leaves rows and moments of "
        "latents that did not fire untouched, as torch.optim.SparseAdam",
    )
    master_weights: Literal["float32", "split"] = setting(
        "float32",
        "storage of W_enc and W_dec: float32, or split into the bf16 matrices that kernels read "
        "and their missing 16 bits, the same fp32 numbers in 4 instead of 6 bytes a weight (needs "
        "compute bfloat16)",
    )
    moment_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "dtype of Adam's moments of W_enc and W_dec; bfloat16 rounds stochastically"
    )
    compute_copies: Literal["both", "encoder"] = setting(
        "both",
        "matrices with a copy in a 16-bit compute dtype: both, or encoder, where W_dec is read in "
        "fp32",
    )

    def expect_torch_adam(self) -> None:
        """Raises ValueError for a setting that torch's Adam lacks."""
        for name in ("adam", "master_weights", "moment_dtype", "compute_copies"):
            default = getattr(OptimizerConfig, name)
            self.expect(
                name,
                getattr(self, name) == default,
                f"{default!r} with route 'autograd' (torch's Adam; the fused step has the others)",
            )
