"""Training objectives: reconstructions, penalties and the batch's context.

An architecture defines them (:meth:`~sae_kernels.nn.SparseAutoencoder.reconstructions` and
``penalties``). The autograd step lets autograd do all the rest; FusedStep knows the gradients of
the reconstructions in closed form and lets autograd see entries and per-latent vectors only.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.base import SparseAutoencoder
    from sae_kernels.step.ranks import Ranks


# Group sizes of the presets: each is n_latents over this, the last takes the rest.
NESTED = (16, 16, 8, 4, 2)


class Reconstruction(NamedTuple):
    """One reconstruction from the kept entries; its loss is ``weight * scale * squared error``.

    Attributes:
        values: like the pre-activations, differentiable in them; 0 where an entry takes no part.
        weight: factor in the loss.
        drops_zeros: whether an entry of value 0 has no gradient. A JumpReLU threshold learns from
            entries that are 0.
        trains_decoder: whether W_dec and b_dec get a gradient from it.
        always: whether it counts in full also where a language model judges the main
            reconstruction (end to end): a gate learns from nothing else.
    """

    values: torch.Tensor
    weight: float = 1.0
    drops_zeros: bool = True
    trains_decoder: bool = True
    always: bool = False


class Prefixes(NamedTuple):
    """A Matryoshka SAE's prefixes of latents and their weights in the loss.

    Attributes:
        ends: int32 [G], ascending; prefix g is the latents before ``ends[g]``.
        weights: fp32 [G].
    """

    ends: torch.Tensor
    weights: torch.Tensor


@dataclasses.dataclass(eq=False)
class Context:
    """A batch or a micro-batch of it, in the scale of training, and all its objective depends on.

    Attributes:
        sae: the module in training.
        objective: the settings, of the architecture's own class.
        x: [B, input width], in the compute dtype, b_dec subtracted where that is the variant.
        target: fp32 [B, output width].
        scale: scalar, multiplies squared errors.
        k: latents per token, where the architecture has a k.
        coefficient: multiplies the sparsity penalty at this step.
        p: the exponent of the penalty "lp" at this step.
        observe: called with the codes that "lp" sums the powers of.
        dead_mask: returns bool [F], which latents are dead.
        prefixes: of a Matryoshka SAE, else None.
        skip_input: fp32 [B, input width], what a skip connection reads, else None.
        leaves: None where autograd reaches the weights. In FusedStep it reaches entries and
            per-latent vectors only; what is derived from the weights here becomes a leaf, by name.
        total_tokens: of a micro-batch, the tokens of its whole batch; None: these are the batch.
        survey: of a micro-batch, what :meth:`~sae_kernels.nn.SparseAutoencoder.survey` found in
            all of them; else None.
        ranks: the processes that the latents are spread over; None: this one has all.
    """

    sae: SparseAutoencoder
    objective: Any
    x: torch.Tensor
    target: torch.Tensor
    scale: torch.Tensor
    k: float
    coefficient: float | torch.Tensor
    p: float
    observe: Callable[[torch.Tensor], None]
    dead_mask: Callable[[], torch.Tensor]
    prefixes: Prefixes | None = None
    skip_input: torch.Tensor | None = None
    leaves: dict[str, torch.Tensor] | None = None
    total_tokens: int | None = None
    survey: Any = None
    ranks: Ranks | None = None
    # functools.cached_property has a lock before Python 3.12, at which a compiled graph breaks.
    _known: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict, init=False)

    @property
    def n_tokens(self) -> int:
        """Tokens in these rows, B."""
        return self.x.shape[0]

    @property
    def batch_tokens(self) -> int:
        """Tokens of the whole batch, over which losses are averaged."""
        return self.n_tokens if self.total_tokens is None else self.total_tokens

    def summed(self, entries: torch.Tensor) -> torch.Tensor:
        """The sum over all latents' entries, in fp32 at least: a dense tile's may be bf16."""
        own = entries.sum(dtype=torch.promote_types(entries.dtype, torch.float32))
        return own if self.ranks is None else self.ranks.total(own)

    @property
    def norms(self) -> torch.Tensor:
        """The norm of each layer's part of the decoder rows, [F, n_layers], differentiable."""
        return self._derived("norms", self.sae.decoder_norms)

    @property
    def preact_sums(self) -> torch.Tensor:
        """The sum of each latent's pre-activations over the batch, [F], differentiable."""
        sae = self.sae
        return self._derived(
            "preact_sums",
            lambda: sae.products(self.x.float().sum(0)) + self.n_tokens * sae.b_enc,
        )

    def _derived(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """A tensor computed once from the weights; a leaf by this name in FusedStep."""
        if name in self._known:
            return self._known[name]
        with torch.set_grad_enabled(self.leaves is None and torch.is_grad_enabled()):
            value = compute()
        if self.leaves is not None:
            self.leaves[name] = value.requires_grad_()
        self._known[name] = value
        return value


class SurveyContext(NamedTuple):
    """What a survey of a batch in micro-batches depends on.

    Attributes:
        objective: the settings.
        n_tokens: tokens of the whole batch.
        k: latents that :meth:`~sae_kernels.nn.SparseAutoencoder.select` keeps per token.
        W_enc: read instead of the parameter; or None.
    """

    objective: Any
    n_tokens: int
    k: float
    W_enc: torch.Tensor | None = None


def objective_of(
    preacts: SparseCodes, context: Context
) -> tuple[list[Reconstruction], torch.Tensor | None]:
    """Reconstructions of selected pre-activations, the main one first; the penalty or None."""
    parts = context.sae.reconstructions(preacts, context)
    terms = context.sae.penalties(preacts, parts, context)
    return parts, sum(terms[1:], terms[0]) if terms else None


def sparsity_penalty(codes: SparseCodes, context: Context) -> torch.Tensor:
    """The configured penalty averaged over the batch's tokens, before its coefficient."""
    sae, objective = context.sae, context.objective
    values = codes.values
    if objective.sparsity_norm_weighted:
        weights = sae.latent_norms(context.norms)
        values = values * functional.gather_by_latent(weights, codes, backend=sae.backend)
    return context.summed(PENALTIES[objective.sparsity](values, context)) / context.batch_tokens


def l1(codes: torch.Tensor, context: Context) -> torch.Tensor:
    """The codes themselves (they are not negative)."""
    return codes


def lp(codes: torch.Tensor, context: Context) -> torch.Tensor:
    """``codes^p``, p falling over the run (p-annealing, arXiv 2408.00113)."""
    context.observe(codes)
    return powers(codes, context.p)


def tanh(codes: torch.Tensor, context: Context) -> torch.Tensor:
    """``tanh(tanh_scale * codes)`` (Anthropic, January 2025)."""
    return torch.tanh(context.objective.tanh_scale * codes)


def powers(codes: torch.Tensor, p: float) -> torch.Tensor:
    """``codes^p``; at 0 the derivative is 0, where that of a power below 1 is infinite."""
    live = codes != 0
    return torch.where(live, torch.where(live, codes, 1) ** p, 0)


# The values of the setting ``sparsity``. Each function maps codes (entries) and the batch's context
# to a penalty per entry; their sum is divided by the number of tokens.
PENALTIES: dict[str, Callable[[torch.Tensor, Context], torch.Tensor]] = {
    "l1": l1,
    "lp": lp,
    "tanh": tanh,
}


def with_leaves(
    sae: SparseAutoencoder, preacts: SparseCodes
) -> tuple[SparseCodes, dict[str, torch.Tensor]]:
    """Detaches entries for autograd: the entries, and every leaf to differentiate by, by name.

    The leaves are the pre-activations "h", the per-latent parameters and the architecture's
    :meth:`~sae_kernels.nn.SparseAutoencoder.entry_leaves`.
    """
    added = {name: t.detach().requires_grad_() for name, t in sae.entry_leaves(preacts).items()}
    h = preacts.values.detach().requires_grad_()
    return sae.with_leaves(preacts, added).with_values(h), {"h": h, **latent_vectors(sae), **added}


def latent_vectors(sae: SparseAutoencoder) -> dict[str, torch.Tensor]:
    """The trained parameters with one number per latent, by name."""
    # Its own are looked at directly: the walk through all modules takes as long as a small kernel.
    named = sae.named_parameters() if sae._modules else sae._parameters.items()
    return {
        name: parameter
        for name, parameter in named
        if parameter is not None
        and parameter.dim() == 1
        and name not in sae.non_latent_vectors
        and parameter.requires_grad
    }


def entry_gradients(
    leaves: dict[str, torch.Tensor],
    outputs: list[tuple[torch.Tensor, torch.Tensor]],
    penalty: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """Gradients of the leaves by name, without those that are None; "h" is always there.

    Args:
        leaves: of :func:`with_leaves`, and those of the context.
        outputs: the values of each reconstruction and dL/dvalues.
        penalty: added to the loss, or None.
    """
    if penalty is None and len(outputs) == 1:
        kept, grad = outputs[0]
        if _is_relu_of(kept, leaves["h"]):
            # What autograd would do; its engine alone takes as long as a small kernel.
            return {"h": torch.ops.aten.threshold_backward(grad, kept, 0)}
    if penalty is not None:
        outputs = [*outputs, (penalty, torch.ones_like(penalty))]
    values, grads = zip(*[pair for pair in outputs if pair[0].requires_grad], strict=True)
    found = torch.autograd.grad(values, list(leaves.values()), grads, allow_unused=True)
    result = {name: grad for name, grad in zip(leaves, found, strict=True) if grad is not None}
    result.setdefault("h", torch.zeros_like(leaves["h"]))
    return result


def _is_relu_of(values: torch.Tensor, h: torch.Tensor) -> bool:
    """Whether autograd recorded a ReLU of the leaf h, and nothing else."""
    node = values.grad_fn
    if node is None or node.name() != "ReluBackward0":
        return False
    return getattr(node.next_functions[0][0], "variable", None) is h


def nested_groups(n_latents: int, parts: tuple[int, ...] = NESTED) -> tuple[int, ...]:
    """Group sizes ``n_latents // part`` for each part; the last group takes what is left.

    Raises:
        ValueError: fewer latents than groups.

    Example:
        >>> nested_groups(100)
        (6, 6, 12, 25, 51)
    """
    if n_latents < len(parts):
        raise ValueError(
            f"n_latents: expected at least {len(parts)} for as many groups, got {n_latents}"
        )
    sizes = [max(1, n_latents // part) for part in parts[:-1]]
    return (*sizes, n_latents - sum(sizes))


def check_groups(groups: tuple[int, ...] | None, n_latents: int) -> None:
    """Raises ValueError unless the group sizes are positive and add up to n_latents."""
    if groups is None:
        return
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in groups)
    if not (whole and sum(groups) == n_latents):
        total = f"{sum(groups)} in all" if whole and groups else "no such list"
        raise ValueError(
            f"groups: expected positive integers that add up to n_latents = {n_latents}, "
            f"got {groups!r} ({total})"
        )


def prefixes_of(sae: SparseAutoencoder, objective: Any, step: int, seed: int) -> Prefixes | None:
    """The prefixes at a 0-based step: random ones if the objective says so, else the groups.

    Random ones are drawn on the host, so not inside of a graph of torch.compile.
    """
    config, device = sae.config, sae.W_enc.device
    if objective.random_prefixes:
        ends = _random_ends(config.n_latents, objective.random_prefixes, seed, step)
        return _weighted(ends.tolist(), objective.matryoshka, device)
    return None if config.groups is None else _fixed(config.groups, objective.matryoshka, device)


@functools.cache
def _fixed(groups: tuple[int, ...], matryoshka: str, device: torch.device) -> Prefixes:
    return _weighted(list(itertools.accumulate(groups)), matryoshka, device)


def _weighted(ends: Iterable[int], matryoshka: str, device: torch.device) -> Prefixes:
    """Prefixes with the weights that average ("mean") or sum ("sum") their errors."""
    # From pageable memory the host would wait until the GPU has done all that was asked before.
    on_gpu = device.type == "cuda"
    placed = torch.tensor(ends, dtype=torch.int32, pin_memory=on_gpu).to(device, non_blocking=True)
    weight = 1 / len(placed) if matryoshka == "mean" else 1.0
    return Prefixes(placed, torch.full((len(placed),), weight, device=device))


def _random_ends(n_latents: int, n: int, seed: int, step: int) -> torch.Tensor:
    """n prefix sizes drawn by a Pareto law of power 1/2 on [1, F], ascending, then F itself."""
    generator = torch.Generator().manual_seed(hash((seed, step)) & 0x7FFFFFFF)
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    low = n_latents**-0.5
    sizes = (1 - u * (1 - low)) ** -2  # inverse of 1 - s^(-1/2), cut off at F
    ends = sizes.long().clamp(1, n_latents).sort().values
    return torch.cat([ends, torch.tensor([n_latents])])
