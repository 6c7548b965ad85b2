"""Clusters of latents against dense twins, and their indices on known distributions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sae_kernels.analyze import analyze, multidimensional, tables, write_analyses
from sae_kernels.analyze.multidimensional import (
    Neighbours,
    cluster_points,
    co_firing,
    codes_of,
    find_clusters,
    join_neighbours,
    measure_cluster,
    mixture,
    neighbours,
    separability,
)
from sae_kernels.codes import SparseCodes
from sae_kernels.data import ShardWriter
from sae_kernels.nn import JumpReLUSAE, SparseAutoencoder, TopKSAE
from tests.made_tensors import Sizes

if TYPE_CHECKING:
    from pathlib import Path


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [2, 60, 5000])
def test_neighbours_are_those_of_all_cosines(n: int) -> None:
    rows, k = torch.randn(n, 12, generator=generator()).double(), min(7, n - 1)
    found = neighbours(rows, k)
    units = torch.nn.functional.normalize(rows)
    cosines = (units @ units.T).fill_diagonal_(-math.inf)
    torch.testing.assert_close(found.cosines.double(), cosines.topk(k).values, atol=1e-6, rtol=0)
    assert found.latents.shape == (n, k)
    assert not (found.latents == torch.arange(n)[:, None]).any()
    given = cosines.gather(1, found.latents)
    torch.testing.assert_close(found.cosines.double(), given, atol=1e-6, rtol=0)


def test_equal_rows_are_each_others_neighbours() -> None:
    rows = torch.ones(6, 3)
    rows[5] = 0
    found = neighbours(rows, 2)
    assert not (found.latents == torch.arange(6)[:, None]).any()
    assert (found.cosines[:5] > 0.999).all()
    assert (found.cosines[5] == 0).all()
    for wrong in (0, 6):
        with pytest.raises(ValueError, match="expected from 1 to one less than the rows"):
            neighbours(rows, wrong)
    with pytest.raises(ValueError, match="finite"):
        neighbours(torch.tensor([[1.0], [torch.nan]]), 1)


@pytest.fixture(params=["topk", "jumprelu"])
def sae(request: pytest.FixtureRequest) -> SparseAutoencoder:
    if request.param == "topk":
        return TopKSAE(8, 40, k=6).double()
    return JumpReLUSAE(8, 40).double()


def test_co_firing_is_the_cosine_of_dense_columns(
    sae: SparseAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multidimensional, "_LOOKUPS", 64)  # several parts
    with torch.no_grad():
        codes = sae.encode(torch.randn(3, 50, 8, generator=generator()).double())
    others = torch.randint(40, (40, 5), generator=generator())
    fires = (codes.to_dense().flatten(0, 1) != 0).double()
    norms = fires.norm(dim=0)
    cosines = (fires.T @ fires) / (norms[:, None] * norms).clamp(min=1)
    torch.testing.assert_close(co_firing(codes, others), cosines.gather(1, others))
    nothing = codes.with_values(torch.zeros_like(codes.values))
    assert not co_firing(nothing, others).any()


def test_groups_are_chains_of_kept_pairs() -> None:
    near = Neighbours(torch.zeros(7, 1), torch.tensor([[1], [2], [1], [4], [3], [6], [5]]))
    keep = torch.tensor([[True], [True], [False], [True], [True], [False], [False]])
    assert [g.tolist() for g in join_neighbours(near, keep)] == [[0, 1, 2], [3, 4]]
    assert [g.tolist() for g in join_neighbours(near, keep, largest=2)] == [[3, 4]]
    assert join_neighbours(near, torch.zeros_like(keep)) == []


def test_points_are_the_clusters_part_of_the_reconstruction(sae: SparseAutoencoder) -> None:
    with torch.no_grad():
        codes = sae.encode(torch.randn(60, 8, generator=generator()).double())
    cluster = torch.tensor([3, 9, 20])
    dense = codes.to_dense()[:, cluster]
    expected = (dense @ sae.W_dec[cluster])[(dense != 0).any(1)]
    points = cluster_points(codes, sae.W_dec, cluster)
    torch.testing.assert_close(points, expected.detach())
    found = measure_cluster(codes, sae.W_dec, cluster)
    assert found.n_tokens == len(points)
    _, S, V = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    shares = S.square() / S.square().sum()
    torch.testing.assert_close(torch.tensor(found.explained), shares[:3].float())
    plane = (points - points.mean(0)) @ V[:2].T
    torch.testing.assert_close(found.points.abs(), plane.abs().float())  # signs are arbitrary
    assert sum(found.explained) == pytest.approx(1)


def circle(n: int) -> Tensor:
    angles = 2 * math.pi * torch.rand(n, generator=generator(1))
    noise = 0.02 * torch.randn(n, 2, generator=generator(2))
    return torch.stack([angles.cos(), angles.sin()], 1) + noise


def independent(n: int) -> Tensor:
    turn = torch.tensor([[0.8, -0.6], [0.6, 0.8]])
    return (torch.rand(n, 2, generator=generator(3)) * torch.tensor([1.0, 0.5])) @ turn


def exclusive(n: int) -> Tensor:
    """One of two features at a time."""
    points = torch.rand(n, 2, generator=generator(4)) + 0.5
    points[: n // 2, 0] = 0
    points[n // 2 :, 1] = 0
    return points


def test_indices_tell_a_circle_from_two_features() -> None:
    n = 4000
    bias = 9**2 / (2 * n * math.log(2))  # what few points add to the mutual information
    assert separability(independent(n)) < 3 * bias
    assert separability(circle(n)) > 0.5
    # The fullest band is at the rim: from 0.78 to 1 for a circle, that is arccos(0.78) / pi of it.
    assert mixture(circle(n)) == pytest.approx(math.acos(0.78) / math.pi, abs=0.02)
    assert mixture(exclusive(n)) == pytest.approx(0.5)
    scores = {f: (1 - mixture(f(n))) * separability(f(n)) for f in (circle, independent, exclusive)}
    assert max(scores, key=lambda f: scores[f]) is circle


def test_mixture_is_the_largest_over_lines() -> None:
    points = exclusive(40).double()
    best = 0.0
    for angle in torch.arange(100).double() * math.pi / 100:
        z = points @ torch.stack([angle.cos(), angle.sin()])
        for centre in z:
            away = z - centre
            near = away.abs() < 0.1 * away.square().mean().sqrt()
            best = max(best, float(near.double().mean()))
    assert mixture(points) == pytest.approx(best)
    for wrong in (torch.zeros(3), torch.zeros(0, 2)):
        with pytest.raises(ValueError, match=r"expected \[n, 2\]"):
            mixture(wrong)


def planted(n_tokens: int = 3000) -> tuple[SparseCodes, Tensor]:
    """Latents 0 to 7 around a circle, of which neighbours fire together, and 40 others."""
    W = torch.nn.functional.normalize(torch.randn(48, 64, generator=generator(5)))
    plane = torch.linalg.qr(torch.randn(64, 2, generator=generator(6)))[0].T
    around = 2 * math.pi * torch.arange(8) / 8
    W[:8] = torch.stack([around.cos(), around.sin()], 1) @ plane
    angle = 2 * math.pi * torch.rand(n_tokens, 1, generator=generator(7))
    dense = torch.zeros(n_tokens, 48)
    # Two neighbouring spokes write a point of the circle.
    spoke = (angle / around[1]).floor()
    rest = angle - spoke * around[1]
    sine = torch.sin(around[1])
    first, second = torch.sin(around[1] - rest) / sine, torch.sin(rest) / sine
    dense.scatter_(1, spoke.long() % 8, first).scatter_(1, (spoke.long() + 1) % 8, second)
    other = torch.randint(8, 48, (n_tokens, 1), generator=generator(8))
    dense.scatter_(1, other, torch.rand(n_tokens, 1, generator=generator(9)))
    return SparseCodes.from_dense(dense, 3), W


@pytest.mark.parametrize("together", [0.0, 0.2])
def test_a_planted_circle_is_found(together: float) -> None:
    codes, W = planted()
    best = find_clusters(codes, W, threshold=0.7, together=together)[0]
    assert best.latents.tolist() == list(range(8))
    assert best.n_tokens == 3000
    assert sum(best.explained[:2]) > 0.999
    radius = best.points.norm(dim=1)
    assert float(radius.std() / radius.mean()) < 0.05
    assert best.separability > 0.5
    # Decoders alone also join other latents; none that never fire together is joined with this.
    assert find_clusters(codes, W, threshold=0.7, together=0.99) == []


def test_a_cluster_of_one_token_has_no_indices() -> None:
    codes = SparseCodes.from_dense(torch.eye(4)[:1], 1)
    found = measure_cluster(codes, torch.eye(4), torch.tensor([0, 1]))
    assert found.n_tokens == 1
    assert math.isnan(found.score)
    assert measure_cluster(codes, torch.eye(4), torch.tensor([2, 3])).n_tokens == 0


@pytest.mark.parametrize("kind", [TopKSAE, JumpReLUSAE])
def test_codes_of_a_source_are_those_of_its_rows(
    kind: type[SparseAutoencoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multidimensional, "_QUERIES", 16)
    sae, x = kind(8, 40), torch.randn(50, 8, generator=generator())
    codes = codes_of(sae, x, n_tokens=37)
    assert codes.batch_shape == (37,)
    torch.testing.assert_close(codes.to_dense(), sae.encode(x[:37]).to_dense().detach())


def test_an_analysis_has_clusters_where_asked(tmp_path: Path) -> None:
    sae, x = TopKSAE(8, 64, k=4), torch.randn(500, 8, generator=generator())
    found = analyze(sae, x, clusters=True)
    assert found.clusters
    sae.eval()
    expected = find_clusters(codes_of(sae, x), sae.W_dec)
    assert [c.values() for c in found.clusters] == [c.values() for c in expected]
    assert found.values()["clusters"][0]["score"] == found.clusters[0].score
    assert ("clusters of latents", str(len(expected))) in tables.comparison([found])
    with pytest.raises(ValueError, match="clusters: expected activations"):
        analyze(sae, clusters=True)
    pytest.importorskip("matplotlib", reason="needs sae-kernels[report]")
    files = write_analyses([found], tmp_path)
    assert "clusters.png" in [path.name for path in files]


def test_a_folder_is_read_like_a_tensor(sae: SparseAutoencoder, tmp_path: Path) -> None:
    x = torch.randn(50, sae.config.d_in)
    with ShardWriter(tmp_path, x.shape[1]) as writer:
        writer.write(x)
    assert torch.equal(codes_of(sae, tmp_path).values, codes_of(sae, x).values)
    with pytest.raises(TypeError, match="read more than once, got list"):
        codes_of(sae, [x])  # type: ignore[arg-type]


def test_codes_of_another_sae_are_refused(sae: SparseAutoencoder) -> None:
    codes = codes_of(sae, torch.randn(50, sae.config.d_in))
    with pytest.raises(ValueError, match=r"W_dec: expected shape .*one row per latent"):
        find_clusters(codes, sae.decoder_rows()[:10])


def test_no_tensor_has_all_pairs() -> None:
    rows = torch.randn(9000, 8, generator=generator())
    codes = SparseCodes(torch.rand(64, 2), torch.randint(9000, (64, 2)).int(), 9000)
    with Sizes() as sizes:
        find_clusters(codes, rows, k=4, threshold=0.999, together=0.1)
    # Rows in fp64 for their norms, and neighbours of k + 1 entries, in int64 at most.
    assert sizes.largest <= 9000 * 8 * 8
