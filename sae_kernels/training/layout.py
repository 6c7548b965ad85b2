"""How the processes of a run are laid out, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.gpu import training_device
from sae_kernels.step.base import compute_dtype

if TYPE_CHECKING:
    from sae_kernels.config.parallel import ParallelConfig
    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.config.train import TrainConfig


def laid_out(
    parallel: ParallelConfig, processes: int, sae: SAEConfig, config: TrainConfig
) -> tuple[ParallelConfig, str]:
    """The layout of a run on so many processes, and its reason in words.

    Raises:
        ValueError: none that the settings allow.

    Example:
        >>> from sae_kernels.config import OptimizerConfig, TrainConfig
        >>> from sae_kernels.config.parallel import ParallelConfig
        >>> from sae_kernels.nn import TopKConfig
        >>> exact = OptimizerConfig(compute="float32")
        >>> train = TrainConfig(batch_size=8192, optimizer=exact, device="cpu")
        >>> laid_out(ParallelConfig(), 2, TopKConfig(768, 6144, k=32), train)[1]
        'tokens over 2: of reconstructions a process sends 9.44 MB a step; latents over 2: 12.6 MB'
    """
    dtype = compute_dtype(config.optimizer.compute, training_device(config.device))
    if (config.optimizer.master_weights, config.optimizer.compute_copies) == ("float32", "encoder"):
        dtype = torch.float32
    sums = config.batch_size * _prefixes(sae, config)
    sizes = sums, sae.n_latents, dtype.itemsize
    chosen = parallel.fitted(processes, *sizes)

    def megabytes(layout: tuple[int, int]) -> str:
        return f"{parallel.traffic(*layout, *sizes) * sae.output_width / 1e6:.3g} MB"

    mine = chosen.latents_over, chosen.tokens_over
    ends = [each for each in ((processes, 1), (1, processes)) if each != mine]
    others = [f"{_named(*each)}: {megabytes(each)}" for each in ends]
    reason = f"{_named(*mine)}: of reconstructions a process sends {megabytes(mine)} a step"
    return chosen, "; ".join([reason, *others])


def _prefixes(sae: SAEConfig, config: TrainConfig) -> int:
    """Prefixes of the latents that reconstruct alone, whose sums are sent one by one."""
    drawn = getattr(config.objective, "random_prefixes", 0)
    return drawn + 1 if drawn else len(getattr(sae, "groups", None) or (sae.n_latents,))


def _named(latents_over: int, tokens_over: int) -> str:
    parts = (("latents", latents_over), ("tokens", tokens_over))
    return ", ".join(f"{what} over {n}" for what, n in parts if n > 1) or "one process"
