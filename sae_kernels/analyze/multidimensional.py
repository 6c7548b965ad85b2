"""Multi-dimensional features: clusters of latents, and whether their points are one feature."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels.analyze.cosines import unit_rows
from sae_kernels.analyze.groups import UnionFind
from sae_kernels.codes import SparseCodes
from sae_kernels.data.sources import open_rows
from sae_kernels.primitives import checks
from sae_kernels.primitives.select_topk import select_topk

if TYPE_CHECKING:
    from torch import Tensor

    from sae_kernels.data.sources import Stored
    from sae_kernels.nn import SparseAutoencoder

_QUERIES, _LOOKUPS = 4096, 1 << 22  # rows, or pairs of latents in a token, that are done at once
_COMPONENTS, _BINS, _ANGLES, _CENTRES = 5, 10, 100, 256


class Neighbours(NamedTuple):
    """The k nearest rows of each of F rows.

    Attributes:
        cosines: fp32 [F, k], the largest first.
        latents: int64 [F, k], without the row itself.
    """

    cosines: Tensor
    latents: Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Cluster:
    """Latents that may be one multi-dimensional feature (Engels et al., arXiv 2405.14860).

    Attributes:
        latents: int64 [m], ascending.
        n_tokens: tokens in which any of them fires.
        points: fp32 [n, 2], the tokens' reconstruction by these latents alone, less its mean, in
            its first two principal components.
        explained: the part of its variance in each of the first components.
        separability: least mutual information of two coordinates over all rotations, in bits, mean
            over the planes of neighbouring components; 0 for independent features.
        mixture: largest part of the tokens within a tenth of a standard deviation of a line, mean
            over the planes; large for features that exclude each other.
    """

    latents: Tensor
    n_tokens: int
    points: Tensor
    explained: list[float]
    separability: float
    mixture: float

    @property
    def score(self) -> float:
        """``(1 - mixture) * separability``; large for one feature of two dimensions or more."""
        return (1 - self.mixture) * self.separability

    def values(self) -> dict[str, Any]:
        """All but the points, as JSON values."""
        names = ("n_tokens", "explained", "separability", "mixture", "score")
        return {"latents": self.latents.tolist(), **{name: getattr(self, name) for name in names}}


def neighbours(rows: Tensor, k: int = 32) -> Neighbours:
    """The k nearest rows of each row by cosine; no [F, F] matrix is made.

    Args:
        rows: [F, D], such as a decoder; rows of zeros have the cosine 0 with all.
        k: at most F - 1.

    Raises:
        ValueError: rows that are no matrix or not finite, or a k out of range.

    Example:
        >>> found = neighbours(torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 0.1]]), k=1)
        >>> found.latents.tolist()
        [[2], [2], [0]]
    """
    if rows.dim() != 2 or not 1 <= k < max(2, rows.shape[0]):
        raise ValueError(
            f"k: expected from 1 to one less than the rows, got {k} for rows {list(rows.shape)}"
        )
    units = torch.cat([unit_rows(block)[0] for block in rows.split(_QUERIES)])
    found: list[Neighbours] = []
    for first in range(0, len(units), _QUERIES):
        queries = units[first : first + _QUERIES]
        cosines, latents = select_topk(queries, units, None, k + 1)
        own = latents == torch.arange(first, first + len(queries), device=rows.device)[:, None]
        # Itself goes to the end, which is cut off; of k + 1 equal rows it may not be among them.
        order = own.to(torch.int8).argsort(dim=1, stable=True)[:, :k]
        found.append(Neighbours(cosines.gather(1, order), latents.long().gather(1, order)))
    return Neighbours(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def co_firing(codes: SparseCodes, latents: Tensor) -> Tensor:
    """Co-firing of each latent with some others, a cosine similarity: ``n_ij / sqrt(n_i n_j)``.

    n_i counts the tokens in which latent i fires, n_ij those in which both do: the cosine of the
    two columns of zeros and ones. 0 for latents that never fire.

    Args:
        codes: of any form.
        latents: int64 [F, k], the others of each latent, as :class:`Neighbours` has them.

    Returns:
        fp64 [F, k].
    """
    flat, F = codes.flat(), codes.n_latents
    fired = flat.values != 0
    tokens, own = flat.tokens.long()[fired], flat.indices.long()[fired]
    keys = (tokens * F + own).sort().values
    counts = own.bincount(minlength=F)
    joint = torch.zeros(latents.shape, dtype=torch.int64, device=latents.device)
    for part in range(0, len(keys), step := max(1, _LOOKUPS // latents.shape[1])):
        key = keys[part : part + step]
        wanted = (key // F)[:, None] * F + latents[key % F]
        at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        joint.index_add_(0, key % F, (keys[at] == wanted).long())
    norms = (counts[:, None] * counts[latents]).double().sqrt()
    return joint / norms.clamp(min=1)


def join_neighbours(near: Neighbours, keep: Tensor, largest: int = 64) -> list[Tensor]:
    """The groups of latents that chains of kept pairs join, the largest first.

    Args:
        near: as :func:`neighbours` gives them.
        keep: bool [F, k], such as ``(near.cosines >= 0.5) & (co_firing(codes, near.latents) > 0)``.
        largest: groups of more latents are left out: they are chains of unlike latents.

    Returns:
        int64 latents of each group of at least two, ascending.
    """
    groups = UnionFind(len(keep), keep.device)
    i, j = keep.nonzero(as_tuple=True)
    groups.join(i, near.latents[i, j])
    labels, order = groups.labels.sort(stable=True)
    sizes = labels.unique_consecutive(return_counts=True)[1].tolist()
    found = [part for part in order.split(sizes) if 1 < len(part) <= largest]
    return sorted(found, key=len, reverse=True)


def cluster_points(codes: SparseCodes, W_dec: Tensor, latents: Tensor) -> Tensor:
    """What a cluster alone reconstructs of each token in which it fires: [n, D], without bias."""
    flat = codes.flat()
    column = torch.full((codes.n_latents,), -1, device=flat.indices.device)
    column[latents] = torch.arange(len(latents), device=flat.indices.device)
    columns = column[flat.indices.long()]
    inside = (columns >= 0) & (flat.values != 0)
    rows, at = flat.tokens[inside].unique(return_inverse=True)
    values = flat.values.detach().new_zeros(len(rows), len(latents))
    values[at, columns[inside]] = flat.values.detach()[inside]
    return values @ W_dec.detach()[latents].to(values.dtype)


def separability(points: Tensor, n_bins: int = _BINS, n_angles: int = _ANGLES) -> float:
    """The least mutual information of the two coordinates over rotations, in bits.

    Engels et al. (arXiv 2405.14860), with histograms of n_bins by n_bins over the points' range.
    Few points make it larger: by about ``(n_bins - 1)^2 / (2 n ln 2)`` bits for n of them.

    Args:
        points: [n, 2].
        n_bins: of each coordinate.
        n_angles: rotations, evenly from 0 to a quarter turn; a quarter turn exchanges coordinates.
    """
    z = _rotated(points, n_angles, math.pi / 2)  # [2, angles, n]
    low, high = z.amin(-1, keepdim=True), z.amax(-1, keepdim=True)
    width = torch.where(high > low, high - low, 1)
    bins = ((z - low) / width * n_bins).long().clamp(max=n_bins - 1)
    angles = torch.arange(n_angles, device=z.device)[:, None]
    cells = (angles * n_bins + bins[0]) * n_bins + bins[1]
    joint = cells.flatten().bincount(minlength=n_angles * n_bins**2).double()
    p = joint.view(n_angles, n_bins, n_bins) / z.shape[-1]
    entropies = [torch.special.entr(q).flatten(1).sum(1) for q in (p.sum(1), p.sum(2), p)]
    return float((entropies[0] + entropies[1] - entropies[2]).min().clamp(min=0)) / math.log(2)


def mixture(points: Tensor, epsilon: float = 0.1, n_angles: int = _ANGLES) -> float:
    """The mixture index: the largest fraction of the points that lie close to one line.

    ``max_{v, c} P(|v z + c| < epsilon sqrt(E (v z + c)^2))`` (Engels et al., arXiv 2405.14860),
    over a grid of directions v and of quantiles for -c.

    Args:
        points: [n, 2].
        epsilon: how close, in root mean squares.
        n_angles: directions, evenly over half a turn.
    """
    z = _rotated(points, n_angles, math.pi)[0].sort(-1).values.contiguous()  # [angles, n]
    n = z.shape[-1]
    at = torch.linspace(0, n - 1, min(n, _CENTRES), device=z.device).round().long()
    centres = z[:, at].contiguous()
    spread = (z.var(1, correction=0)[:, None] + (z.mean(1)[:, None] - centres).square()).sqrt()
    above = torch.searchsorted(z, centres + epsilon * spread)
    below = torch.searchsorted(z, centres - epsilon * spread, right=True)
    return float((above - below).max()) / n


def _rotated(points: Tensor, n_angles: int, turn: float) -> Tensor:
    """Both coordinates of points [n, 2] at each angle below ``turn``, fp64 [2, n_angles, n]."""
    if points.dim() != 2 or points.shape[1] != 2 or not len(points):
        raise ValueError(f"points: expected [n, 2], at least one, got {list(points.shape)}")
    angles = torch.arange(n_angles, device=points.device).double() * (turn / n_angles)
    x, y = points.double().T
    cosine, sine = angles.cos()[:, None], angles.sin()[:, None]
    return torch.stack([cosine * x + sine * y, cosine * y - sine * x])


def measure_cluster(codes: SparseCodes, W_dec: Tensor, latents: Tensor) -> Cluster:
    """Measures a cluster: principal components of what it alone reconstructs, and their indices."""
    x = cluster_points(codes, W_dec, latents).double()
    x = x - x.mean(0) if len(x) else x
    U, S, _ = torch.linalg.svd(x, full_matrices=False)
    n = min(_COMPONENTS, len(latents), len(S))
    components = U[:, :n] * S[:n]
    if n < 2 or len(x) < 2:
        return Cluster(latents, len(x), x.new_zeros(0, 2).float(), [], math.nan, math.nan)
    planes = [components[:, i : i + 2] for i in range(n - 1)]
    planes = [plane for plane, s in zip(planes, S[1:], strict=False) if s > 1e-6 * S[0]]
    share = (S.square() / S.square().sum().clamp(min=1e-300))[:n].tolist()
    nan = [math.nan]
    return Cluster(
        latents,
        len(x),
        planes[0].float() if planes else components[:, :2].float(),
        share,
        sum(values := [separability(plane) for plane in planes] or nan) / len(values),
        sum(values := [mixture(plane) for plane in planes] or nan) / len(values),
    )


@torch.no_grad()
def codes_of(sae: SparseAutoencoder, source: Stored, n_tokens: int = 1 << 16) -> SparseCodes:
    """The codes of the first tokens of a source, encoded in batches; the SAE is in eval mode."""
    parts: list[SparseCodes] = []
    source = open_rows(source)
    n = min(n_tokens, source.n_tokens)
    for start in range(0, n, _QUERIES):
        rows = source.rows(start, min(start + _QUERIES, n)).activations
        parts.append(sae.encode(rows.to(sae.W_enc.device)))
    return SparseCodes.cat(parts)


def find_clusters(
    codes: SparseCodes,
    W_dec: Tensor,
    *,
    k: int = 32,
    threshold: float = 0.5,
    together: float = 0.0,
    largest: int = 64,
) -> list[Cluster]:
    """Clusters of latents by decoder cosine and co-firing, measured, by score.

    Args:
        codes: of as many tokens as there are; their points are kept.
        W_dec: [F, D].
        k: neighbours of each latent that are looked at.
        threshold: least cosine of two decoder rows that belong together.
        together: least :func:`co_firing` of them; 0 looks at decoders alone.
        largest: see :func:`join_neighbours`.

    Raises:
        ValueError: codes of another number of latents than W_dec has rows.

    Example:
        >>> from sae_kernels.nn import TopKSAE
        >>> sae = TopKSAE(8, 64, k=4)
        >>> codes = sae.encode(torch.randn(500, 8))
        >>> clusters = find_clusters(codes, sae.W_dec, threshold=0.7)
        >>> all(one.score >= other.score for one, other in zip(clusters, clusters[1:]))
        True
    """
    checks.shape("W_dec", W_dec, [codes.n_latents, "D"], "one row per latent of the codes")
    near = neighbours(W_dec, min(k, len(W_dec) - 1))
    keep = near.cosines >= threshold
    if together > 0:
        keep &= co_firing(codes, near.latents) >= together
    measured = [measure_cluster(codes, W_dec, c) for c in join_neighbours(near, keep, largest)]
    return sorted((each for each in measured if not math.isnan(each.score)), key=lambda c: -c.score)
