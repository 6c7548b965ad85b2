"""Resampling of dead latents: they start anew as directions of badly reconstructed tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.primitives.row_update import halves
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.training.evaluate import evaluating
from sae_kernels.training.graphed_step import GraphedStep

if TYPE_CHECKING:
    from sae_kernels.step import TrainingStep

_ENCODER_NORM = 0.2  # Bricken et al.
_AT_ONCE = 4096  # tokens reconstructed together


@torch.no_grad()
def resample_dead_(
    step: TrainingStep, x: torch.Tensor, target: torch.Tensor | None = None
) -> torch.Tensor:
    """Gives dead latents the directions of badly reconstructed tokens and returns those latents.

    Bricken et al., "Towards Monosemanticity" (2023): a token is drawn with probability proportional
    to the square of its squared error. The encoder row becomes what the encoder reads of it, at 0.2
    of the mean norm of live rows; the decoder row what it is to write, at their mean norm; b_enc 0.
    Any further number per latent (a threshold, a gate's) becomes the mean of the live ones. Adam's
    moments of all these are 0, and the latents count as just fired.

    No token is drawn twice, as two latents of the same weights would stay the same. So of more
    latents than tokens only those dead longest start anew. The draw depends on the step's seed and
    number alone.

    Args:
        step: a FusedStep, a GraphedStep of one, or an AutogradStep.
        x: raw activations [B, input width], the more the better; B < 2^24.
        target: [B, output width], what a transcoder reconstructs.

    Returns:
        int64 [n], ascending.

    Raises:
        ValueError: another step or architecture, see :func:`check_resampling`; shapes that do not
            fit.

    Example:
        >>> from sae_kernels.nn import TopKObjective, TopKSAE
        >>> step = FusedStep(TopKSAE(8, 64, k=2), TopKObjective(dead_after_tokens=300))
        >>> x = torch.randn(100, 8)
        >>> for _ in range(3):
        ...     _ = step(x, lr=1e-3)
        >>> latents = resample_dead_(step, x)
        >>> bool(step.dead.mask().any()), bool((step.sae.b_enc[latents] == 0).all())
        (False, True)
    """
    own = check_resampling(step)
    sae = own.sae
    x, target = own.checked(x, target)
    with evaluating(sae):
        losses = [
            (y - sae.decode_scaled(sae.encode_scaled(rows), rows)).square().sum(1)
            for rows, y in zip(x.split(_AT_ONCE), target.split(_AT_ONCE), strict=True)
        ]
    weights = torch.cat(losses).cpu().double().square()
    weights = torch.where(weights.isfinite(), weights, 0)
    dead, alive = own.dead.longest(int((weights > 0).sum())), ~own.dead.mask()
    if not len(dead):
        return dead
    generator = torch.Generator().manual_seed(hash((own.seed, own.schedule.step, 1)) & 0x7FFFFFFF)
    drawn = torch.multinomial(weights, len(dead), generator=generator).to(x.device)
    x, target = x[drawn], target[drawn] - sae.b_dec
    if sae.config.skip:
        target -= x @ sae.W_skip.T
    if not alive.any():
        alive = ~alive
    for name, parameter in sae.named_parameters():
        if not (sae.has_row_per_latent(name) and parameter.requires_grad):
            continue
        if name == "W_enc":
            rows = _ENCODER_NORM * _as_long_as(parameter, alive, sae.centred(x), 1)
        elif name == "W_dec":
            rows = _as_long_as(parameter, alive, target, sae.config.row_parts)
        else:
            mean = 0.0 if name == "b_enc" else float(parameter[alive].mean())
            rows = parameter.new_full((len(dead),), mean)
        _set_rows_(own, name, dead, rows)
    own.dead.since_fired[dead] = 0
    return dead


def check_resampling(step: TrainingStep) -> FusedStep | AutogradStep:
    """The step whose dead latents can be resampled, a GraphedStep's own.

    Raises:
        ValueError: a step of another kind, latents over ranks, or an architecture whose latents
            have no row of W_dec each (across layers) or serve the tokens of one expert only.
    """
    own, sae = step.step if isinstance(step, GraphedStep) else step, step.sae
    if not isinstance(own, FusedStep | AutogradStep):
        raise ValueError(
            f"resample_every: expected a FusedStep or an AutogradStep, got a {type(own).__name__}"
        )
    if own.ranks is not None:
        raise ValueError("resample_every: expected None with latents over ranks, got a number")
    by_rows = sae.decodes_by_rows and sae.has_row_per_latent("W_dec")
    if not by_rows or sae.latent_experts() is not None:
        raise ValueError(
            "resample_every: expected an architecture whose latents have one row of W_dec each, "
            f"for every token, got {type(sae).__name__}; leave it None"
        )
    return own


def _as_long_as(
    matrix: torch.Tensor, alive: torch.Tensor, rows: torch.Tensor, parts: int
) -> torch.Tensor:
    """Rows whose parts are as long as those of a matrix's live rows on average; 0 stays 0."""
    norms = torch.linalg.vector_norm(matrix.unflatten(1, (parts, -1)), dim=2, dtype=torch.float32)
    split = rows.unflatten(1, (parts, -1))
    own = split.norm(dim=2, keepdim=True)
    scale = norms[alive].mean(0)[:, None] / torch.where(own > 0, own, 1)
    scaled: torch.Tensor = scale * split
    return scaled.flatten(1)


def _set_rows_(
    step: FusedStep | AutogradStep, name: str, latents: torch.Tensor, rows: torch.Tensor
) -> None:
    """Sets rows of a parameter and of its compute copy, and their moments to 0."""
    if isinstance(step, AutogradStep):
        parameter = step.sae.get_parameter(name)
        parameter[latents] = rows
        adam = step.torch_adam.state[parameter]
        moments = [adam[key] for key in ("exp_avg", "exp_avg_sq") if key in adam]
    else:
        matrix = step.matrices[name]
        moments = [matrix.m, matrix.v]
        rows = rows.view(len(latents), -1)
        copy, master = rows, rows
        if matrix.param.dtype == torch.int16:
            copy, master = halves.split(rows)
        matrix.param[latents] = master
        if matrix.copy is not None:
            matrix.copy[latents] = copy.to(matrix.copy.dtype)
    for moment in moments:
        moment[latents] = 0
