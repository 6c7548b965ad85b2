"""Effects of latents and of SAEs' errors on a metric of a model's predictions."""

from __future__ import annotations

import functools
import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from sae_kernels.errors import ModelError
from sae_kernels.functional import decode
from sae_kernels.harvest.model import input_device
from sae_kernels.harvest.splice import check_fits, clean_logits, frozen, splice
from sae_kernels.harvest.tokens import TokenBatch
from sae_kernels.primitives import checks
from sae_kernels.primitives.code_grad import code_grad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn import SparseAutoencoder

    Metric = Callable[[Tensor], Tensor]


class Node(NamedTuple):
    """A latent of a layer's SAE, or what the SAE does not reconstruct there (``latent`` None)."""

    layer: str
    latent: int | None


class Effects(NamedTuple):
    """Effects of a layer's N active latents and of its errors, one for each token.

    An effect is what the metric changes by when the entry is ablated: below 0 for one that
    supports the metric.

    Attributes:
        tokens: int64 [N], the entry's token among the B * S of the batch, ascending.
        latents: int64 [N], its latent; distinct within a token.
        effects: [N].
        errors: [B * S], of the SAE's error; 0 at tokens that are not replaced.
    """

    tokens: Tensor
    latents: Tensor
    effects: Tensor
    errors: Tensor

    def by_latent(self) -> tuple[Tensor, Tensor]:
        """The latents, and their effects summed over tokens, the strongest first."""
        latents, at = self.latents.unique(return_inverse=True)
        sums = self.effects.new_zeros(len(latents)).index_add_(0, at, self.effects)
        order = sums.abs().argsort(descending=True, stable=True)
        return latents[order], sums[order]


class Pass(NamedTuple):
    """A forward pass that can be differentiated by the activations of the layers.

    Attributes:
        value: the metric.
        x: by layer, its output [n, D] at the n replaced tokens.
    """

    value: Tensor
    x: dict[str, Tensor]


class _Absent(NamedTuple):
    """What ablated latents and errors of a layer become; None is 0."""

    codes: SparseCodes | None = None
    error: Tensor | None = None


class Attribution:
    """A metric of a model's predictions, as a function of latents and errors at several layers.

    A layer's output is ``x = decode(codes) + error``. What is ablated becomes 0, or with
    ``against`` what it is at the same token of other prompts.

    Args:
        model: a causal transformers model; left as it was.
        saes: the SAE of each layer by dotted path.
        inputs: token ids [B, S], or what a tokenizer gives; of a
            :class:`~sae_kernels.harvest.TokenBatch` the tokens that are replaced.
        metric: logits [B, S, V] -> a scalar, such as the mean difference of two logits.
        against: other prompts of the same shape.

    Raises:
        ModelError: an unknown layer, or one that puts out no tensor [B, S, D].
        ValueError: no layer, an SAE of another width, ``against`` of another shape.

    Example:
        >>> import pytest
        >>> from sae_kernels.nn import TopKSAE
        >>> transformers = pytest.importorskip("transformers")
        >>> config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2)
        >>> model, sae = transformers.GPT2LMHeadModel(config), TopKSAE(8, 32, k=4)
        >>> metric = lambda logits: (logits[:, -1, 5] - logits[:, -1, 6]).mean()
        >>> study = Attribution(model, {"h.0": sae}, torch.tensor([[1, 2, 3]]), metric)
        >>> latents, effects = study.effects()["h.0"].by_latent()
        >>> study.exact([Node("h.0", int(latents[0])), Node("h.0", None)]).shape
        torch.Size([2])
    """

    def __init__(
        self,
        model: nn.Module,
        saes: Mapping[str, SparseAutoencoder],
        inputs: TokenBatch | Tensor | Mapping[str, Tensor],
        metric: Metric,
        against: TokenBatch | Tensor | Mapping[str, Tensor] | None = None,
    ) -> None:
        if not saes:
            raise ValueError("saes: expected the SAE of at least one layer, got none")
        self.model, self.saes, self.measure = model, dict(saes), metric
        self.batch = TokenBatch.of(inputs).to(input_device(model))
        self._absent = dict.fromkeys(self.saes, _Absent())
        if against is not None:
            other = TokenBatch.of(against).to(input_device(model))
            if not torch.equal(other.replaced, self.batch.replaced):
                raise ValueError(
                    "against: expected prompts of the same shape with the same padding, "
                    f"{list(self.batch.input_ids.shape)}, got {list(other.input_ids.shape)}"
                )
            own, self.batch = self.batch, other
            with torch.no_grad():
                x = self.record().x
            self._absent = {layer: _Absent(*self.parts(layer, x[layer])) for layer in self.saes}
            self.batch = own

    def effects(self, steps: int = 0) -> dict[str, Effects]:
        """The estimated effect of every active latent and of the errors, by layer.

        With ``steps`` 0 it is gradient times change of the activation, at the activation as it is:
        one forward and one backward pass for all layers. Otherwise the gradient is the mean over
        the middles of so many steps on the way to a layer that is ablated as a whole (integrated
        gradients; Marks et al., arXiv 2403.19647): a pass each for every layer. The effects of a
        layer then add up to the change of the metric when all of it is ablated, up to
        O(1 / steps^2).

        Raises:
            ValueError: a metric that is no scalar, or does not depend on a layer; steps below 0.
        """
        checks.count("steps", steps)
        run = self.record()
        x = {layer: rows.detach() for layer, rows in run.x.items()}
        if not steps:
            grads = self._gradients(run.value, run.x)
        else:
            grads = {layer: self._mean_gradient(layer, x[layer], steps) for layer in self.saes}
        return {layer: self.entries(layer, x[layer], grads[layer]) for layer in self.saes}

    def exact(self, nodes: Iterable[Node | tuple[str, int | None]]) -> Tensor:
        """The change of the metric when each node is ablated by itself, [nodes]; a pass each."""
        whole = self.without([])
        return torch.tensor([self.without([node]) - whole for node in nodes], dtype=torch.float64)

    def without(self, nodes: Iterable[Node | tuple[str, int | None]]) -> float:
        """The metric when nodes are ablated, all at once.

        Raises:
            ValueError: a node of another layer, or an unknown latent.
        """
        named = self._masks(nodes)
        return self._changed({layer: (~mask, not error) for layer, (mask, error) in named.items()})

    def only(self, nodes: Iterable[Node | tuple[str, int | None]]) -> float:
        """The metric when everything at the layers is ablated but these nodes.

        Raises:
            ValueError: as :meth:`without`.
        """
        nothing = {layer: (self._no_latent(layer), False) for layer in self.saes}
        return self._changed(nothing | self._masks(nodes))

    def record(self) -> Pass:
        """A forward pass with the layers' activations in its graph."""
        x: dict[str, Tensor] = {}

        def keep(layer: str) -> Callable[[Tensor], Tensor]:
            def hook(rows: Tensor) -> Tensor:
                check_fits(self.saes[layer], rows.shape[1], layer)
                needs = torch.is_grad_enabled() and not rows.requires_grad
                x[layer] = rows.detach().requires_grad_() if needs else rows
                return x[layer]

            return hook

        value = self._run({layer: keep(layer) for layer in self.saes})
        for layer in self.saes:
            if layer not in x:
                raise ModelError(
                    f"{layer}: expected a layer that runs, it did not; choose a whole block"
                )
        return Pass(value, x)

    def parts(self, layer: str, x: Tensor) -> tuple[SparseCodes, Tensor]:
        """Codes and error of a layer's activations [n, D]; differentiable in them."""
        sae = self.saes[layer]
        with frozen(sae):
            codes = sae.encode(x)
            return codes, x - sae.decode(codes)

    def entries(self, layer: str, x: Tensor, grad: Tensor) -> Effects:
        """Effects by ``grad`` [n, D] times change: of active latents at activations [n, D]."""
        sae, absent = self.saes[layer], self._absent[layer]
        with torch.no_grad():
            codes, error = self.parts(layer, x)
            W = sae.W_dec.detach()
            grad = grad.to(checks.accumulator(W.dtype)).contiguous()
            keys, changes = [], []
            for sign, of in ((-1, codes), (1, absent.codes)):
                if of is not None:
                    slopes = code_grad(grad, of.indices, W, None, of.offsets) / sae.target_scale
                    fired = of.values != 0  # a dropped entry is no active latent
                    changes.append((sign * slopes * of.values)[fired])
                    keys.append((of.tokens.long() * W.shape[0] + of.indices)[fired])
            key, at = torch.cat(keys).unique(return_inverse=True)
            effects = grad.new_zeros(len(key)).index_add_(0, at, torch.cat(changes))
            change = -error if absent.error is None else absent.error - error
            where = self.batch.replaced.flatten().nonzero()[:, 0].to(x.device)
            errors = grad.new_zeros(self.batch.replaced.numel())
            errors[where] = (grad * change).sum(1)
        return Effects(where[key // W.shape[0]], key % W.shape[0], effects, errors)

    def _gradients(self, value: Tensor, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The metric's gradients by activations."""
        if value.requires_grad:
            grads = torch.autograd.grad(value, list(x.values()), allow_unused=True)
            found = {layer: grad for layer, grad in zip(x, grads, strict=True) if grad is not None}
            if len(found) == len(x):
                return found
        raise ValueError("metric: expected one that depends on every layer, it does not")

    def _mean_gradient(self, layer: str, x: Tensor, steps: int) -> Tensor:
        start = self._mixed(layer, x, self._no_latent(layer), False)
        total = torch.zeros_like(start)
        for step in range(steps):
            point = torch.lerp(start, x.to(start.dtype), (step + 0.5) / steps).requires_grad_()
            value = self._run({layer: functools.partial(_exchange, point)})
            total += self._gradients(value, {layer: point})[layer]
        return total / steps

    def _run(self, replace: Mapping[str, Callable[[Tensor], Tensor]]) -> Tensor:
        """The metric of a forward pass with the replaced tokens' activations replaced."""
        with frozen(self.model), ExitStack() as hooks:
            for layer, function in replace.items():
                hooks.enter_context(splice(self.model, layer, function, self.batch.replaced))
            value = self.measure(clean_logits(self.model, self.batch))
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"metric: expected one that gives a scalar tensor, got {got}")
        return value.reshape(())

    @torch.no_grad()
    def _changed(self, kept: Mapping[str, tuple[Tensor, bool]]) -> float:
        """The metric with, at each layer, all but the kept latents (and error) ablated."""

        def change(layer: str) -> Callable[[Tensor], Tensor]:
            return lambda rows: self._mixed(layer, rows, *kept[layer])

        return float(self._run({layer: change(layer) for layer in kept}))

    @torch.no_grad()
    def _mixed(self, layer: str, x: Tensor, kept: Tensor, keeps_error: bool) -> Tensor:
        """Activations with all latents ablated but the kept ones [F], and perhaps the error."""
        codes, error = self.parts(layer, x)
        absent = self._absent[layer]
        out = x - written(self.saes[layer], codes, ~kept)
        if absent.codes is not None:
            out = out + written(self.saes[layer], absent.codes, ~kept)
        if not keeps_error:
            out = out - error if absent.error is None else out - error + absent.error
        return out

    def _no_latent(self, layer: str) -> Tensor:
        """A mask of a layer's latents [F] without any."""
        W = self.saes[layer].W_dec
        return torch.zeros(W.shape[0], dtype=torch.bool, device=W.device)

    def _masks(
        self, nodes: Iterable[Node | tuple[str, int | None]]
    ) -> dict[str, tuple[Tensor, bool]]:
        """By layer of any node, a mask of its latents [F], and whether its error is among them."""
        of_layer: dict[str, list[int | None]] = {}
        for layer, latent in nodes:
            if layer not in self.saes:
                raise ValueError(f"layer: expected one of {', '.join(self.saes)}, got {layer!r}")
            of_layer.setdefault(layer, []).append(latent)
        masks = {}
        for layer, latents in of_layer.items():
            mask = self._no_latent(layer)
            numbers = [latent for latent in latents if latent is not None]
            mask[checks.latents(numbers, len(mask)).to(mask.device)] = True
            masks[layer] = (mask, None in latents)
        return masks


def written(sae: SparseAutoencoder, codes: SparseCodes, chosen: Tensor) -> Tensor:
    """The part of some latents, bool [F], in the reconstruction, [tokens, D]; without b_dec."""
    values = torch.where(chosen[codes.indices.long()], codes.values, 0)
    rows = decode(codes.with_values(values), sae.W_dec.detach(), backend=sae.backend)
    return rows / sae.target_scale


def _exchange(point: Tensor, _rows: Tensor) -> Tensor:
    """Other activations in place of a layer's rows."""
    return point


def strongest(effects: Mapping[str, Effects], n: int) -> list[tuple[Node, float]]:
    """The n nodes with the largest effects over all tokens, errors among them, with the effects."""
    checks.count("n", n)
    found: list[tuple[Node, float]] = []
    for layer, each in effects.items():
        latents, sums = each.by_latent()
        pairs = zip(latents[:n].tolist(), sums[:n].tolist(), strict=True)
        found += [(Node(layer, latent), effect) for latent, effect in pairs]
        found.append((Node(layer, None), float(each.errors.sum())))
    return sorted(found, key=lambda pair: -abs(pair[1]))[:n]


def rank_correlation(a: Sequence[float] | Tensor, b: Sequence[float] | Tensor) -> float:
    """Spearman's rank correlation of two lists, equal values having their mean rank.

    NaN where a list holds NaN, or where all of its values are equal.

    Raises:
        ValueError: lists of different lengths.

    >>> round(rank_correlation([1.0, 2.0, 5.0], [10.0, 30.0, 20.0]), 6)
    0.5
    """
    if len(a) != len(b):
        raise ValueError(f"expected two lists of one length, got {len(a)} and {len(b)} values")
    ranks = []
    for values in (a, b):
        x = torch.as_tensor(values, dtype=torch.float64)
        if x.isnan().any():
            return math.nan
        # The mean rank: how many lie below, and half of those that are equal.
        ranks.append((x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2)
    centred = [rank - rank.mean() for rank in ranks]
    norms = centred[0].norm() * centred[1].norm()
    return float(centred[0] @ centred[1] / norms)
