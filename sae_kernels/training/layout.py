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


def fitted(
    parallel: ParallelConfig, processes: int, sae: SAEConfig, config: TrainConfig
) -> ParallelConfig:
    """The settings with the layout of a run on so many processes that train.

    Raises:
        ValueError: none that the settings allow.
    """
    return parallel.fitted(processes, *_sizes(sae, config))


def reason(parallel: ParallelConfig, sae: SAEConfig, config: TrainConfig) -> str:
    """In words what a process sends in the layout of :func:`fitted` settings, and in others.

    Example:
        >>> from sae_kernels.config import OptimizerConfig, TrainConfig
        >>> from sae_kernels.config.parallel import ParallelConfig
        >>> from sae_kernels.nn import TopKConfig
        >>> exact = OptimizerConfig(compute="float32")
        >>> train = TrainConfig(batch_size=8192, optimizer=exact, device="cpu")
        >>> run = TopKConfig(768, 6144, k=32), train
        >>> reason(fitted(ParallelConfig(), 2, *run), *run)
        'tokens over 2: of reconstructions a process sends 9.44 MB a step; latents over 2: 12.6 MB'
    """
    sizes = _sizes(sae, config)

    def megabytes(layout: tuple[int, int]) -> str:
        return f"{parallel.traffic(*layout, *sizes) * sae.output_width / 1e6:.3g} MB"

    mine = parallel.latents_over, parallel.tokens_over
    processes = mine[0] * mine[1]
    ends = [each for each in ((processes, 1), (1, processes)) if each != mine]
    others = [f"{_named(*each)}: {megabytes(each)}" for each in ends]
    said = f"{_named(*mine)}: of reconstructions a process sends {megabytes(mine)} a step"
    return "; ".join([said, *others])


def _sizes(sae: SAEConfig, config: TrainConfig) -> tuple[int, int, int]:
    """Reconstructions of tokens in a batch, latents, and bytes of a number in rows of W_dec."""
    dtype = compute_dtype(config.optimizer.compute, training_device(config.device))
    if (config.optimizer.master_weights, config.optimizer.compute_copies) == ("float32", "encoder"):
        dtype = torch.float32
    return config.batch_size * _prefixes(sae, config), sae.n_latents, dtype.itemsize


def _prefixes(sae: SAEConfig, config: TrainConfig) -> int:
    """Prefixes of the latents that reconstruct alone, whose sums are sent one by one."""
    drawn = getattr(config.objective, "random_prefixes", 0)
    return drawn + 1 if drawn else len(getattr(sae, "groups", None) or (sae.n_latents,))


def _named(latents_over: int, tokens_over: int) -> str:
    parts = (("latents", latents_over), ("tokens", tokens_over))
    return ", ".join(f"{what} over {n}" for what, n in parts if n > 1) or "one process"
