"""Initial weights, and the geometric median that b_dec starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels import functional
from sae_kernels.primitives.select_topk import select_topk

if TYPE_CHECKING:
    from sae_kernels.config.sae import SAEConfig
    from sae_kernels.nn.base import SparseAutoencoder
    from sae_kernels.step.ranks import Ranks

_DRAWN_AT_ONCE = 1 << 24
_SMALL = 0.08  # norm of a row where a latent has several
_FITTED = 4096  # tokens on which a start is fitted


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
    n: int,
    d_in: int,
    generator: torch.Generator,
    device: torch.device | str | None = None,
    kept: range | None = None,
) -> torch.Tensor:
    """Random directions, uniform on the sphere: [n, d_in] with rows of norm 1.

    They are drawn on the CPU, a few at a time: the same on every device, with no second matrix.
    All are drawn where only the ``kept`` ones are returned, so that these are the same.
    """
    kept = range(n) if kept is None else kept
    rows = torch.empty(len(kept), d_in, device=device)
    if rows.is_meta:  # the weights will come from a file
        return rows
    # torch draws normal numbers by sixteens; whole ones give the same numbers as one draw.
    width = max(16, _DRAWN_AT_ONCE // d_in // 16 * 16)
    for first in range(0, n, width):
        drawn = torch.randn(min(width, n - first), d_in, generator=generator, device="cpu")
        some = slice(max(kept.start, first), max(kept.start, min(kept.stop, first + width)))
        part = drawn[some.start - first : some.stop - first]
        torch.nn.functional.normalize(part, dim=1, out=part)
        rows[some.start - kept.start : some.stop - kept.start] = part
    return rows


def initial_weights(
    config: SAEConfig, seed: int, device: torch.device | str | None, latents: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """W_enc and W_dec at the start of training.

    The decoder has random unit rows (a unit row for each layer where those are kept at unit norm),
    and the encoder is a copy of it. A transcoder's decoder cannot be its encoder: it starts at zero
    (sparsify), or, where rows are kept at unit norm, at random ones of its own. Nor can one with
    several rows a latent: it starts at small random rows, as norms that are all 0 would rank no
    latent before another (0.08, as the crosscoders of ckkissane).

    Args:
        config, seed, device: of the SAE.
        latents: those whose rows are returned.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    shapes = config.shapes()
    n_rows, out = shapes["W_dec"]
    width = shapes.get("W_enc", shapes["W_dec"])[1]  # without a W_enc W_dec is the encoder too

    def rows(width: int, parts: int = 1) -> torch.Tensor:
        """A row of ``width`` numbers for each latent, made of ``parts`` unit vectors."""
        kept = range(latents.start * parts, latents.stop * parts)
        n = config.n_latents * parts
        return unit_rows(n, width // parts, generator, device, kept).view(len(latents), width)

    parts = config.row_parts if config.unit_norm_decoder else 1
    if n_rows != config.n_latents:
        W_enc, W_dec = rows(width), unit_rows(n_rows, out, generator, device)
        return W_enc, W_dec if config.unit_norm_decoder else W_dec.mul_(_SMALL)
    if not config.transcodes:
        W_dec = rows(out, parts)
        return W_dec.clone(), W_dec
    W_enc = rows(width)
    if config.unit_norm_decoder:
        return W_enc, rows(out, parts)
    return W_enc, torch.zeros(len(latents), out, device=device)


@torch.no_grad()
def bounds_at(sae: SparseAutoencoder, x: torch.Tensor, l0: float) -> torch.Tensor:
    """The bound of each latent's pre-activations above which ``l0 / n_latents`` of a sample lie.

    A token then has l0 latents above their bounds on average, and every latent has its share.

    Args:
        sae: a fresh SAE with its b_dec.
        x: [n, input width], activations in the scale of training.
        l0: latents per token.

    Returns:
        fp32 [F]; the least of a latent's pre-activations where it is to lie above its bound always.

    Example:
        >>> from sae_kernels.nn import ReLUSAE
        >>> sae, x = ReLUSAE(8, 32), torch.randn(1000, 8)
        >>> sae.b_enc.data -= bounds_at(sae, x, l0=4.0)
        >>> abs(len(sae.encode(x).values) / 1000 - 4) < 0.05
        True
    """
    x = sae.centred(_some(x))
    above = round(l0 / sae.config.n_latents * len(x))
    # Tokens and latents change places: of every latent the largest of its tokens.
    W_enc = sae.W_enc.to(x.dtype)
    largest = select_topk(W_enc, x, None, min(above + 1, len(x)), backend=sae.backend)[0]
    return largest[:, -1] + sae.b_enc


@torch.no_grad()
def scale_encoder_(
    sae: SparseAutoencoder, x: torch.Tensor, bounds: torch.Tensor, ranks: Ranks | None = None
) -> float:
    """Scales a fresh encoder by the one factor that makes its codes reconstruct a sample best.

    Random decoder rows overlap, so a tied encoder's codes add up to too much. The factor is
    ``sum (x - b_dec) . y / sum |y|^2`` with y the codes' part of the reconstruction, codes being
    the pre-activations above their bounds. It is 1 where input and target differ, or where the
    codes reconstruct nothing.

    Args:
        sae: a fresh SAE with its b_dec.
        x: [n, input width], activations in the scale of training.
        bounds: [F], from :func:`bounds_at`.
        ranks: the processes that have the SAE's other latents; None: all are here.

    Returns:
        The factor, which pre-activations are multiplied with.
    """
    if sae.config.transcodes:
        return 1.0
    x = _some(x)
    centred, W_enc = sae.centred(x), sae.W_enc.to(x.dtype)

    def part(some: slice) -> torch.Tensor:
        own = (W_enc[some], sae.b_enc[some].to(x.dtype), bounds[some])
        codes = functional.encode_threshold(centred, *own, backend=sae.backend)
        return functional.decode(codes, sae.W_dec[some].to(x.dtype), backend=sae.backend)

    y = part(slice(0, len(W_enc))) if ranks is None else ranks.over_latents(part)
    # Token by token first: the same for any number of threads.
    along, energy = (((x - sae.b_dec) * y).sum(1).sum(), y.square().sum(1).sum())
    factor = float(along / energy)
    if not 0 < factor < float("inf"):
        return 1.0
    sae.W_enc.mul_(factor)
    sae.b_enc.mul_(factor)
    return factor


def _some(x: torch.Tensor) -> torch.Tensor:
    """Every few rows of a sample: as many as a start is fitted on, up to twice."""
    return x[:: max(1, len(x) // _FITTED)]
