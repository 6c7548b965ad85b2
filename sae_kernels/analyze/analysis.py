"""Running all analyses on one SAE."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal

from sae_kernels.analyze.diffing import difference
from sae_kernels.analyze.experts import expert_use
from sae_kernels.analyze.geometry import geometry
from sae_kernels.analyze.layers import layer_spread
from sae_kernels.analyze.multidimensional import codes_of, find_clusters
from sae_kernels.data.sources import open_rows
from sae_kernels.training import evaluate
from sae_kernels.training.evaluate import evaluating

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from sae_kernels.analyze.diffing import Difference
    from sae_kernels.analyze.experts import ExpertUse
    from sae_kernels.analyze.geometry import Geometry
    from sae_kernels.analyze.layers import LayerSpread
    from sae_kernels.analyze.multidimensional import Cluster
    from sae_kernels.data.sources import Stored
    from sae_kernels.nn import SAEConfig, SparseAutoencoder
    from sae_kernels.training import Evaluation

Side = Literal["decoder", "encoder"]


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """The results of all analyses of one SAE.

    Attributes:
        name: what tables and pictures call it.
        config: the SAE's.
        side: whose rows the geometry is of, "decoder" or "encoder".
        geometry: nearest neighbours and duplicates.
        evaluation: what ``eval`` measures, given data.
        use: what the experts do, given data and a Switch SAE.
        spread: how latents spread over layers, of an SAE of several.
        clusters: multi-dimensional features, the best first, where they were asked for.
        difference: whose the latents are, of a crosscoder of two models.
    """

    name: str
    config: SAEConfig
    side: Side
    geometry: Geometry
    evaluation: Evaluation | None = None
    use: ExpertUse | None = None
    spread: LayerSpread | None = None
    clusters: list[Cluster] | None = None
    difference: Difference | None = None

    @property
    def n_experts(self) -> int:
        """Number of experts, a shared one included; 1 for an SAE without experts."""
        return int(getattr(self.config, "n_experts", 1))

    @property
    def shared(self) -> int:
        """Number of shared experts: 0, or 1, which is the first."""
        return int(getattr(self.config, "shared_expert", False))

    def dead(self) -> torch.Tensor | None:
        """The fraction of each expert's latents that fired on no token, fp64 [E]; needs data.

        Those of a shared expert come first; :attr:`use` does not have it.
        """
        if self.evaluation is None:
            return None
        density = self.evaluation.latent_density
        return (density == 0).double().view(self.n_experts, -1).mean(1)

    def values(self) -> dict[str, Any]:
        """All results but those of single latents, as JSON values."""
        found: dict[str, Any] = {
            "name": self.name,
            "architecture": self.config.architecture,
            "n_latents": self.config.n_latents,
            "n_experts": self.n_experts if self.n_experts > 1 else None,
            "n_encoded": self.config.n_encoded,
            "rows": self.side,
            **self.geometry.values(experts=self.n_experts > 1),
        }
        if self.spread is not None:
            found["layers"] = self.spread.values()
        if self.evaluation is not None:
            found["evaluation"] = self.evaluation.scalars()
        if self.use is not None:
            dead = self.dead()
            assert dead is not None
            found["experts"] = self.use.values()
            found["experts"]["by_expert"]["dead"] = dead[self.shared :].tolist()
            if self.shared:
                found["experts"]["shared_dead"] = float(dead[0])
        if self.clusters is not None:
            found["clusters"] = [cluster.values() for cluster in self.clusters]
        if self.difference is not None:
            found["difference"] = self.difference.values()
        return found


def analyze(
    sae: SparseAutoencoder,
    source: Stored | None = None,
    *,
    target: Stored | None = None,
    name: str = "SAE",
    side: Side = "decoder",
    threshold: float = 0.9,
    clusters: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Analysis:
    """Runs the analyses of the Switch SAE paper (arXiv 2410.08201) on an SAE of any architecture.

    Args:
        sae: the SAE; left in the mode in which it was.
        source: raw activations to run it on, [N, D] or a folder; None for its weights' geometry
            alone.
        target: what a transcoder is to reconstruct.
        name: what to call it.
        side: whose rows to compare: the "decoder"'s or the "encoder"'s.
        threshold: from which cosine on two latents are duplicates.
        clusters: whether to look for multi-dimensional features too, in the first 65,536 tokens;
            see :func:`~sae_kernels.analyze.find_clusters`.
        progress: gets how many tiles of cosines are done, of how many.

    Raises:
        ValueError: what :func:`~sae_kernels.training.evaluate` and
            :func:`~sae_kernels.analyze.geometry.geometry` refuse, or no such side.

    Example:
        >>> import torch
        >>> from sae_kernels.nn import SwitchSAE
        >>> sae = SwitchSAE(8, 32, k=4, n_experts=4)
        >>> found = analyze(sae, torch.randn(100, 8))
        >>> found.geometry.within.shape, found.use.load.shape, found.dead().shape
        (torch.Size([32]), torch.Size([4]), torch.Size([4]))
    """
    if side not in ("decoder", "encoder"):
        raise ValueError(f"side: expected decoder or encoder, got {side!r}")
    if clusters and source is None:
        raise ValueError("clusters: expected activations to find them in, got none")
    measured = use = found = whose = None
    rows = None if source is None else open_rows(source)
    if rows is not None:
        goal = None if target is None else open_rows(target)
        measured = evaluate(sae, rows, target=goal)  # refuses what does not fit
        with evaluating(sae):
            if sae.latent_experts() is not None:
                use = expert_use(sae, rows, target=goal)
            if clusters:
                found = find_clusters(codes_of(sae, rows), sae.decoder_rows())
    if sae.config.n_layers == 2 and not sae.config.transcodes:
        whose = difference(sae, rows)
    W = sae.decoder_rows() if side == "decoder" else sae.W_enc
    shape = geometry(W, sae.latent_experts(), threshold=threshold, progress=progress)
    spread = layer_spread(sae)
    return Analysis(name, sae.config, side, shape, measured, use, spread, found, whose)
