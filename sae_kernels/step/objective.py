"""What a training step minimises, written once for both training routes.

An objective is some reconstructions, each the codes of one set of kept entries, and a penalty on
those entries. The composable route lets autograd do all the rest; FusedStep knows the gradients of
the reconstructions in closed form and lets autograd see the entries alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.nn import BatchTopKSAE, JumpReLUSAE, ReLUSAE, SwitchSAE, TopKSAE
from sae_kernels.step.router import balance
from sae_kernels.step.sparsity import Penalised, SparsitySchedule, penalty

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SparseAutoencoder

_MULTI_TOPK, _MULTI_TOPK_WEIGHT = 4, 1 / 8


class Reconstruction(NamedTuple):
    """One reconstruction from the kept entries; its loss is ``weight * scale * squared error``.

    Attributes:
        values: like the pre-activations, differentiable in them; 0 where an entry takes no part.
        weight: in the loss.
        drops_zeros: whether an entry of value 0 has no gradient. A JumpReLU threshold learns from
            entries that are 0.
        trains_decoder: whether W_dec and b_dec get a gradient from it.
    """

    values: torch.Tensor
    weight: float = 1.0
    drops_zeros: bool = True
    trains_decoder: bool = True


class Objective(NamedTuple):
    """The reconstructions, the main one first, and the penalty, or None."""

    reconstructions: list[Reconstruction]
    penalty: torch.Tensor | None


class Prefixes(NamedTuple):
    """A Matryoshka SAE's prefixes and their weights in the loss."""

    ends: torch.Tensor  # int32 [G]
    weights: torch.Tensor  # fp32 [G]


class Facts(NamedTuple):
    """What an objective needs to know of the batch besides the entries; see `Penalised`."""

    n_tokens: int
    k: float
    norms: torch.Tensor | None
    sums: torch.Tensor | None
    dead: torch.Tensor | None


def objective(
    sae: SparseAutoencoder, pre: SparseCodes, facts: Facts, schedule: SparsitySchedule
) -> Objective:
    """The objective of kept pre-activations."""
    codes = sae.activate(pre)
    learns = isinstance(sae, JumpReLUSAE)
    main = Reconstruction(codes.values, drops_zeros=sae.drops_zeros and not learns)
    parts = [main]
    if schedule.config.multi_topk:
        assert isinstance(facts.k, int)
        first = torch.arange(pre.k, device=codes.values.device) < facts.k
        parts = [
            main._replace(values=torch.where(first, codes.values, 0)),
            main._replace(weight=_MULTI_TOPK_WEIGHT),
        ]
    auxiliary = sae.auxiliary(pre)
    if auxiliary is not None:
        trains = not sae.auxiliary_stops_decoder
        parts.append(Reconstruction(auxiliary.values, trains_decoder=trains))
    # Of multi-TopK's codes only the main ones are penalised.
    penalised = pre.with_values(parts[0].values) if auxiliary is None else auxiliary
    looked_at = Penalised(pre, penalised, facts.n_tokens, facts.norms, facts.sums, facts.dead)
    added = [
        penalty(sae, looked_at, schedule),
        balance(pre, sae.config.output_width, schedule.config),
    ]
    given = [each for each in added if each is not None]
    return Objective(parts, sum(given[1:], given[0]) if given else None)


def main_codes(
    pre: SparseCodes, values: torch.Tensor, k: float, config: TrainConfig
) -> SparseCodes:
    """The codes of the main reconstruction alone: of multi-TopK's entries the first k."""
    if not config.multi_topk:
        return pre.with_values(values)
    first = slice(None), slice(int(k))
    return pre.with_values(values[first], pre.indices[first])


def needs_norms(config: TrainConfig) -> bool:
    """Whether the penalty looks at the decoder's norms."""
    weighted = config.sparsity_norm_weighted and config.sparsity in ("l1", "lp", "tanh")
    return weighted or bool(config.preact_coefficient)


def k_of(sae: SparseAutoencoder, k: float | None) -> float:
    """Latents per token: k, or the configuration's; 0 where the architecture has none."""
    own: float = getattr(sae.config, "k", 0)
    return own if k is None else k


def k_at(sae: SparseAutoencoder, config: TrainConfig, step: int) -> float | None:
    """The k of a step (from 0) of a run; None where the architecture has none."""
    own: float | None = getattr(sae.config, "k", None)
    return None if own is None else config.k_at(step, own)


def kept_per_token(sae: SparseAutoencoder, k: float, config: TrainConfig) -> float:
    """How many latents the encoder keeps: 4 k for multi-TopK."""
    return min(_MULTI_TOPK * k, sae.config.n_latents) if config.multi_topk else k


def fixed_prefixes(sae: SparseAutoencoder, config: TrainConfig) -> Prefixes | None:
    """The prefixes of the SAE's own groups of latents; None where there are none."""
    groups: tuple[int, ...] | None = getattr(sae.config, "groups", None)
    if groups is None or config.random_prefixes:
        return None
    return _prefixes(sae, config, torch.tensor(groups).cumsum(0).to(torch.int32))


def random_prefixes(sae: SparseAutoencoder, config: TrainConfig, step: int) -> Prefixes | None:
    """The prefixes drawn for a step; None where they are not drawn."""
    if not config.random_prefixes:
        return None
    ends = _random_ends(sae.config.n_latents, config.random_prefixes, config.seed, step)
    return _prefixes(sae, config, ends)


def _prefixes(sae: SparseAutoencoder, config: TrainConfig, ends: torch.Tensor) -> Prefixes:
    device = sae.W_enc.device
    weight = 1 / len(ends) if config.matryoshka == "mean" else 1.0
    return Prefixes(ends.to(device), torch.full((len(ends),), weight, device=device))


def _random_ends(n_latents: int, n: int, seed: int, step: int) -> torch.Tensor:
    """So many prefix sizes by a Pareto law of power 1/2 on [1, F], and F itself."""
    generator = torch.Generator().manual_seed(hash((seed, step)) & 0x7FFFFFFF)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    low = n_latents**-0.5
    sizes = (1 - u * (1 - low)) ** -2  # inverse of 1 - s^(-1/2), cut off at F
    ends = sizes.long().clamp(1, n_latents).sort().values
    return torch.cat([ends, torch.tensor([n_latents])]).to(torch.int32)


def check_objective(sae: SparseAutoencoder, config: TrainConfig) -> None:
    """Raises ValueError for a loss that the architecture does not have."""
    name = sae.config.architecture
    jump = "it counts through JumpReLU's thresholds; choose architecture 'jumprelu'"
    grouped = isinstance(sae, (TopKSAE, BatchTopKSAE))
    wrong = (
        (config.sparsity in ("l0", "target_l0") and not isinstance(sae, JumpReLUSAE))
        and f"sparsity: expected l1, lp or tanh with architecture {name!r}, got "
        f"{config.sparsity!r}; {jump}",
        (config.preact_coefficient and not isinstance(sae, JumpReLUSAE))
        and f"preact_coefficient: expected 0 with architecture {name!r}, got "
        f"{config.preact_coefficient}; {jump}",
        (config.sparsity == "target_l0" and config.target_l0 is None)
        and "target_l0: expected a number with sparsity 'target_l0', got None",
        (config.sparsity != "none" and not sae.drops_zeros)
        and f"sparsity: expected none with relu 'none' (codes may be negative), got "
        f"{config.sparsity!r}",
        (config.balance_coefficient and not isinstance(sae, SwitchSAE))
        and f"balance_coefficient: expected 0 with architecture {name!r}, which has no experts, "
        f"got {config.balance_coefficient}",
        (config.multi_topk and not isinstance(sae, TopKSAE))
        and f"multi_topk: expected false with architecture {name!r}, got true",
        (config.fix_shrinkage and not isinstance(sae, ReLUSAE))
        and f"fix_shrinkage: expected false with architecture {name!r} (it mends what L1 does to "
        "ReLU codes), got true",
        (config.random_prefixes and not grouped)
        and f"random_prefixes: expected 0 with architecture {name!r} (prefixes are for topk and "
        f"batchtopk), got {config.random_prefixes}",
        (config.multi_topk and (config.random_prefixes or getattr(sae.config, "groups", None)))
        and "multi_topk: expected false with prefixes of latents, got true",
        (config.k_start is not None and not hasattr(sae.config, "k"))
        and f"k_start: expected none with architecture {name!r}, which has no k",
    )
    for message in wrong:
        if message:
            raise ValueError(message)
