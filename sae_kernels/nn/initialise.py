"""Initial weights, and the geometric median that b_dec starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from sae_kernels.config.sae import SAEConfig

_DRAWN_AT_ONCE = 1 << 24


def geometric_median(
    x: torch.Tensor, *, iterations: int = 100, tolerance: float = 1e-6
) -> torch.Tensor:
    """The point with the least sum of distances to the rows of x.

    Weiszfeld's algorithm with the step of Vardi and Zhang (PNAS 2000), which does not get stuck
    where it meets a row.

    Args:
        x: [N, D], any floating dtype.
        iterations: at most this many.
        tolerance: stop once the point moves by less than this, relative to its norm.

    Returns:
        [D] in fp32.

    Raises:
        ValueError: x is no matrix with at least one row.

    Example:
        >>> geometric_median(torch.tensor([[0.0], [0.0], [9.0]])).round(decimals=3).tolist()
        [0.0]
    """
    if x.dim() != 2 or x.shape[0] == 0:
        raise ValueError(f"x: expected shape [N, D] with N > 0, got {list(x.shape)}")
    x = x.float()
    median = x.mean(0)
    for _ in range(iterations):
        away = x - median
        distances = away.norm(dim=1)
        apart = distances > 1e-12
        weights = torch.where(apart, 1 / distances, 0)
        # Not weights @ away, whose order of work depends on the number of threads.
        pull = away.mul_(weights[:, None]).sum(0)
        # Rows at the point itself hold it with a force of at most one each.
        free = (1 - (~apart).sum() / pull.norm().clamp_min(1e-12)).clamp_min(0)
        step = free * pull / weights.sum().clamp_min(1e-12)
        median = median + step
        if step.norm() <= tolerance * median.norm().clamp_min(1e-12):
            break
    return median


def unit_rows(
    n_latents: int, d_in: int, generator: torch.Generator, device: torch.device | str | None = None
) -> torch.Tensor:
    """Random directions, uniform on the sphere: [n_latents, d_in] with rows of norm 1.

    They are drawn on the CPU, a few at a time: the same on every device, with no second matrix.
    """
    rows = torch.empty(n_latents, d_in, device=device)
    if rows.is_meta:  # the weights will come from a file
        return rows
    # torch draws normal numbers by sixteens; whole ones give the same numbers as one draw.
    for part in rows.split(max(16, _DRAWN_AT_ONCE // d_in // 16 * 16)):
        drawn = torch.randn(part.shape, generator=generator, device="cpu")
        part.copy_(torch.nn.functional.normalize(drawn, dim=1, out=drawn))
    return rows


def initial_weights(
    config: SAEConfig, seed: int, device: torch.device | str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_enc and W_dec at the start of training.

    The decoder has random unit rows (a unit row for each layer where those are kept at unit norm),
    and the encoder is a copy of it. A transcoder's decoder cannot be its encoder: it starts at zero
    (sparsify), or, where rows are kept at unit norm, at random ones of its own.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    F, width, layers = config.n_latents, config.input_width, config.n_layers
    if config.transcodes:
        W_enc = unit_rows(F, width, generator, device)
        W_dec = torch.zeros(F, config.output_width, device=device)
        if not config.unit_norm_decoder:
            return W_enc, W_dec
        return W_enc, unit_rows(F * layers, config.output_width // layers, generator, device).view(
            F, -1
        )
    if config.unit_norm_decoder:
        W_dec = unit_rows(F * layers, width // layers, generator, device).view(F, -1)
    else:
        W_dec = unit_rows(F, width, generator, device)
    return W_dec.clone(), W_dec
