"""SHIFT: a probe trained on confounded documents, without the latents that carry the confounder."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sae_kernels.codes import SparseCodes
from sae_kernels.harvest.splice import check_fits, frozen, replaced_rows
from sae_kernels.harvest.tokens import TokenBatch
from sae_kernels.interventions.attribution import written
from sae_kernels.primitives import checks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sae_kernels.nn import SparseAutoencoder


class Documents(NamedTuple):
    """Activations and codes of N documents, each the mean over the document's tokens.

    Attributes:
        x: [N, D].
        codes: ragged, a "token" for each document.
    """

    x: Tensor
    codes: SparseCodes

    def without(self, sae: SparseAutoencoder, latents: Sequence[int] | Tensor) -> Tensor:
        """The activations [N, D] with latents ablated to 0; what the SAE misses stays.

        As the mean is linear, they are the means of activations whose latents are ablated.

        Raises:
            ValueError: an unknown latent.
        """
        removed = torch.zeros(self.codes.n_latents, dtype=torch.bool, device=self.x.device)
        removed[checks.latents(latents, self.codes.n_latents).to(removed.device)] = True
        return self.x - written(sae, self.codes, removed)


class Probe(NamedTuple):
    """A linear classifier of two classes: ``x @ weight + bias > 0``.

    Attributes:
        weight: fp64 [D].
        bias: fp64 scalar.
    """

    weight: Tensor
    bias: Tensor

    def margins(self, x: Tensor) -> Tensor:
        """``x @ weight + bias`` of activations [N, D]."""
        return x.to(self.weight) @ self.weight + self.bias

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """The fraction of activations [N, D] whose class is that of bool labels [N]."""
        return float(((self.margins(x) > 0) == labels.to(x.device)).double().mean())


def mean_documents(
    model: nn.Module,
    layer: str,
    sae: SparseAutoencoder,
    batches: Iterable[TokenBatch | Tensor | Mapping[str, Tensor]],
) -> Documents:
    """Each document's mean activation at a layer, and the mean of its codes.

    Args:
        model: a transformers model; left as it was.
        layer: a dotted path.
        sae: of this layer.
        batches: of documents, one a row: token ids [B, S], or what a tokenizer gives; of a
            :class:`~sae_kernels.harvest.TokenBatch` the tokens that are replaced count.

    Raises:
        ModelError: an unknown layer, or one that puts out no tensor [B, S, D].
        ValueError: a document without a token, no batch, an SAE of another width.
    """
    means: list[Tensor] = []
    parts: list[SparseCodes] = []
    F = sae.config.n_latents
    for inputs in batches:
        batch = TokenBatch.of(inputs)
        (rows,) = replaced_rows(model, [batch], layer)
        check_fits(sae, rows.shape[1], layer)
        counts = batch.replaced.sum(1).to(rows.device)
        if not counts.all():
            raise ValueError("batches: expected a token in each document, got one without")
        documents = torch.arange(len(counts), device=rows.device).repeat_interleave(counts)
        with frozen(sae), torch.no_grad():
            codes = sae.encode(rows)
        high = codes.values.dtype
        total = torch.zeros(len(counts), rows.shape[1], dtype=high, device=rows.device)
        means.append(total.index_add_(0, documents, rows.to(high)) / counts[:, None])
        fired = codes.values != 0
        keys = (documents[codes.tokens.long()] * F + codes.indices)[fired]
        key, at = keys.unique(return_inverse=True)
        sums = total.new_zeros(len(key)).index_add_(0, at, codes.values[fired])
        lengths = (key // F).bincount(minlength=len(counts))
        offsets = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        parts.append(SparseCodes(sums / counts[key // F], (key % F).int(), F, offsets))
    if not parts:
        raise ValueError("batches: expected at least one, got none")
    return Documents(torch.cat(means), SparseCodes.cat(parts))


def fit_probe(x: Tensor, labels: Tensor, *, l2: float = 1e-3) -> Probe:
    """Logistic regression: the probe with the least mean log loss, plus ``l2 |weight|^2 / 2``.

    Args:
        x: [N, D].
        labels: bool [N], both classes.
        l2: in units of the activations' mean variance.

    Raises:
        ValueError: labels of one class, or of another number.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> probe = fit_probe(x, torch.tensor([False, False, True, True]))
        >>> probe.accuracy(x, torch.tensor([False, False, True, True]))
        1.0
    """
    fits = labels.shape == x.shape[:1] and labels.dtype == torch.bool
    if not fits or labels.all() or not labels.any():
        raise ValueError(
            f"labels: expected bool [{x.shape[0]}] of both classes, got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    x, y = x.detach().double(), labels.to(x.device).double()
    mean = x.mean(0)
    scale = (x - mean).square().mean().sqrt()
    z = (x - mean) / scale
    parameters = z.new_zeros(z.shape[1] + 1).requires_grad_()
    solver = torch.optim.LBFGS(
        [parameters],
        max_iter=500,
        tolerance_grad=1e-9,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        solver.zero_grad()
        margins = z @ parameters[:-1] + parameters[-1]
        value = nn.functional.binary_cross_entropy_with_logits(margins, y)
        value = value + l2 * parameters[:-1].square().sum() / 2
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    weight = parameters[:-1].detach() / scale
    return Probe(weight, parameters[-1].detach() - mean @ weight)


def separation(
    probe: Probe, sae: SparseAutoencoder, documents: Documents, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Ranks active latents by how much each separates two classes along a probe's weight.

    A latent's part is ``(mean of its value over the true class - over the other) * W_dec[f] @
    weight``: what the distance between the classes' mean margins loses when it is ablated. SHIFT
    (Marks et al., arXiv 2403.19647) shows them in this order to somebody who says which of them
    have nothing to do with the task.

    Args:
        probe: of the layer of ``sae``.
        sae: its decoder rows are read.
        documents: N of them.
        labels: bool [N].

    Returns:
        Latents int64 [n] and their parts [n].
    """
    codes, W = documents.codes, sae.W_dec.detach()
    truth = labels.to(codes.values.device)
    shares = truth.double() / truth.sum() - (~truth).double() / (~truth).sum()
    latents, at = codes.indices.long().unique(return_inverse=True)
    apart = shares.new_zeros(len(latents))
    apart.index_add_(0, at, codes.values * shares[codes.tokens.long()])
    slopes = W[latents].to(probe.weight) @ probe.weight / sae.target_scale
    parts = apart * slopes
    order = parts.abs().argsort(descending=True, stable=True)
    return latents[order], parts[order]
