"""How weights are held and updated: Adam, its moments, copies of weights and clipping."""

from __future__ import annotations

import dataclasses
from typing import Literal

from sae_kernels.config.base import BELOW_ONE, POSITIVE, Settings, setting


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Settings):
    """Adam and the precision of what it updates.

    FusedStep takes all of it; the autograd step runs torch's Adam and refuses what that lacks.
    """

    table = "optimizer"

    beta1: float = setting(0.9, "of Adam (torch's and the peers' default)", BELOW_ONE)
    beta2: float = setting(0.999, "of Adam, likewise", BELOW_ONE)
    eps: float = setting(1e-08, "of Adam, likewise", POSITIVE)
    clip_norm: float | None = setting(
        None,
        "global gradient norm, after projection (dictionary_learning: 1.0); None is off "
        "(sparsify, OpenAI)",
        POSITIVE,
    )
    compute: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "dtype of the kernels' operands. auto is bfloat16 where the device multiplies it "
        "natively (a GPU, a CPU with AMX), else float32",
    )
    adam: Literal["dense", "lazy"] = setting(
        "dense",
        "dense, as torch.optim.Adam, or lazy: latents that did not fire keep their row and its "
        "moments untouched, as torch.optim.SparseAdam",
    )
    master_weights: Literal["float32", "split"] = setting(
        "float32",
        "W_enc and W_dec in float32, or split: the bf16 matrices that the kernels read and the "
        "16 bits that they lack, which together are the same fp32 numbers in 4 bytes a weight "
        "instead of 6. Needs compute bfloat16",
    )
    moment_dtype: Literal["float32", "bfloat16"] = setting(
        "float32",
        "Adam's moments of W_enc and W_dec, with stochastic rounding in bfloat16",
    )
    compute_copies: Literal["both", "encoder"] = setting(
        "both",
        "with fp32 masters and compute in 16 bits, of which matrices there is a copy in the "
        "compute dtype: both, or encoder alone, W_dec being read in fp32",
    )

    def expect_torch_adam(self) -> None:
        """Raises ValueError for a setting that torch's Adam does not have."""
        for name in ("adam", "master_weights", "moment_dtype", "compute_copies"):
            default = getattr(OptimizerConfig, name)
            self.expect(
                name,
                getattr(self, name) == default,
                f"{default!r} with route 'autograd' (torch's Adam; the fused step has the others)",
            )
