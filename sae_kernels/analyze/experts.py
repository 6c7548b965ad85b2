"""Measures of each expert of a Switch SAE on data: load, reconstruction and specialisation."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.data.joint import JointRows
from sae_kernels.data.sources import open_rows
from sae_kernels.training.fresh import split

if TYPE_CHECKING:
    from sae_kernels.data.sources import Stored
    from sae_kernels.nn import SparseAutoencoder

_ROWS, _NUMBERS = 4096, 1 << 22  # of a batch; its rows are in fp64 for a moment


@dataclasses.dataclass(frozen=True, eq=False)
class ExpertUse:
    """Measures of each routed expert, fp64 [E]; NaN for an expert without tokens.

    Attributes:
        n_tokens: int64, the tokens that each expert has.
        load: their part of all tokens, F_i.
        probability: the router's mean probability of the expert over all tokens, P_i.
        chosen: the same over the expert's own tokens: its codes' mean gate.
        fvu: ``sum |x - x_hat|^2 / sum |x - mean(x)|^2`` over its tokens, the mean being that of all
            tokens, so that a token counts for its expert what it counts for the SAE.
        offset: how far the mean of its tokens lies from that of all, in standard deviations of all:
            ``|mean_i - mean| / sqrt(sum |x - mean|^2 / N)``.
        between: a number, the part of the activations' variance that lies between experts:
            ``sum_i n_i |mean_i - mean|^2 / sum |x - mean|^2``. For tokens sent at random it is
            (E - 1) / (N - 1) on average.
    """

    n_tokens: torch.Tensor
    load: torch.Tensor
    probability: torch.Tensor
    chosen: torch.Tensor
    fvu: torch.Tensor
    offset: torch.Tensor
    between: float

    @property
    def balance(self) -> float:
        """Load balance ``E sum_i F_i P_i`` over all tokens; 1 if all experts are equally busy."""
        return len(self.load) * float((self.load * self.probability).sum())

    @property
    def effective_experts(self) -> float:
        """The :func:`effective_number` of the loads."""
        return effective_number(self.load)

    def values(self) -> dict[str, Any]:
        """All measures as JSON values."""
        vectors = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del vectors["between"]
        return {
            "entropy": entropy(self.load),
            "effective_experts": self.effective_experts,
            "balance": self.balance,
            "between": self.between,
            "by_expert": {name: vector.tolist() for name, vector in vectors.items()},
        }


def entropy(load: torch.Tensor) -> float:
    """Entropy ``-sum F_i ln F_i`` in nats of loads F_i, [E].

    >>> round(entropy(torch.tensor([0.5, 0.5, 0.0])), 4)
    0.6931
    """
    return float(torch.special.entr(load.double()).sum())


def effective_number(load: torch.Tensor) -> float:
    """The exponential of the entropy: the number of equally busy experts of the same entropy.

    >>> round(effective_number(torch.tensor([0.25, 0.25, 0.25, 0.25])), 4)
    4.0
    >>> effective_number(torch.tensor([1.0, 0.0]))
    1.0
    """
    return float(torch.tensor(entropy(load), dtype=torch.float64).exp())


class ExpertMoments:
    """Running fp64 sums over each expert's tokens, for means and variances.

    Example:
        >>> moments = ExpertMoments(2, 1)
        >>> moments.add(torch.tensor([0, 1, 1]), torch.tensor([[0.0], [3.0], [3.0]]))
        >>> moments.between(), moments.about_mean().tolist()
        (1.0, [4.0, 2.0])
    """

    def __init__(
        self, n_experts: int, width: int, device: torch.device | str | None = None
    ) -> None:
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        self.counts = torch.zeros(n_experts, **options)
        self.total = torch.zeros(n_experts, width, **options)
        self.square = torch.zeros(n_experts, **options)

    def add(self, experts: torch.Tensor, rows: torch.Tensor) -> None:
        """Adds tokens [B, D] and their experts, int [B]."""
        rows = rows.double()
        self.counts += experts.bincount(minlength=len(self.counts))
        self.total.index_add_(0, experts, rows)
        self.square.index_add_(0, experts, rows.square().sum(1))

    def mean(self) -> torch.Tensor:
        """Mean of all tokens, [D]."""
        return self.total.sum(0) / self.counts.sum()

    def offsets(self) -> torch.Tensor:
        """Squared distance of each expert's mean from that of all, [E]; NaN without tokens."""
        return (self.total / self.counts[:, None] - self.mean()).square().sum(1)

    def about_mean(self) -> torch.Tensor:
        """Each expert's sum of ``|x - mean|^2`` about the mean of all tokens, [E]."""
        mean = self.mean()
        about = self.square - 2 * self.total @ mean + self.counts * mean.square().sum()
        # The difference of sums may come out below 0 where there is no variance.
        return about.clamp_min(0)

    def between(self) -> float:
        """The fraction of the variance between the experts' means; 0 without variance."""
        between = (self.counts * self.offsets()).nansum()
        return float((between / self.about_mean().sum()).nan_to_num(0, posinf=0))


@torch.inference_mode()
def expert_use(
    sae: SparseAutoencoder,
    source: Stored,
    *,
    target: Stored | None = None,
) -> ExpertUse:
    """Runs the SAE on every row of the source and measures each expert.

    Args:
        sae: in evaluation mode.
        source: raw activations as wide as the SAE's input, at least one row.
        target: what a transcoder is to reconstruct, of the same tokens; FVU is of it.

    Example:
        >>> from sae_kernels.nn import SwitchConfig, SwitchSAE
        >>> sae = SwitchSAE(SwitchConfig(d_in=4, n_latents=16, k=2, n_experts=4))
        >>> use = expert_use(sae, torch.randn(100, 4))
        >>> int(use.n_tokens.sum()), 1 <= use.effective_experts <= 4
        (100, True)
    """
    config, device = sae.config, sae.W_enc.device
    rows_of = open_rows(source)
    if target is not None:
        rows_of = JointRows([rows_of, open_rows(target)])
    n_experts = config.n_routed
    inputs = ExpertMoments(n_experts, config.input_width, device)
    targets = ExpertMoments(n_experts, config.output_width, device) if config.transcodes else inputs
    sums = torch.zeros(3, n_experts, dtype=torch.float64, device=device)
    probability, chosen, error = sums
    step = max(1, min(_ROWS, _NUMBERS // rows_of.d_in))
    for start in range(0, rows_of.n_tokens, step):
        batch = rows_of.rows(start, min(start + step, rows_of.n_tokens))
        x, goal = split(batch.activations.to(device).float(), config)
        x_hat, codes = sae(x)
        routing = codes.routing
        experts = routing.experts.long()
        inputs.add(experts, x)
        if goal is not None:
            targets.add(experts, goal)
        missed = (x if goal is None else goal) - x_hat
        probability += routing.probabilities.sum(0, dtype=torch.float64)
        chosen.index_add_(0, experts, routing.gates().double())
        error.index_add_(0, experts, missed.double().square().sum(1))
    return _use(inputs, targets, sums)


def _use(inputs: ExpertMoments, targets: ExpertMoments, sums: torch.Tensor) -> ExpertUse:
    probability, chosen, error = sums
    counts = inputs.counts
    n = counts.sum()
    deviation = (inputs.about_mean().sum() / n).sqrt()
    return ExpertUse(
        n_tokens=counts.long().cpu(),
        load=(counts / n).cpu(),
        probability=(probability / n).cpu(),
        chosen=(chosen / counts).cpu(),
        fvu=(error / targets.about_mean()).cpu(),
        offset=(inputs.offsets().sqrt() / deviation).cpu(),
        between=inputs.between(),
    )
