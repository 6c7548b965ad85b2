"""What the sparse and the dense pass share: a batch, its result, and autograd over entries.

A pass knows the products in closed form. What an architecture and its penalty do to an entry is
left to autograd, which sees vectors of kept entries and of latents and nothing larger.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.functional import RoutedCodes
from sae_kernels.primitives.terms import Gradient

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step.objective import Prefixes


class Operands(NamedTuple):
    """The matrices that the kernels read: compute copies, or the parameters themselves."""

    W_enc: torch.Tensor
    W_dec: torch.Tensor


class Batch(NamedTuple):
    """A batch as both passes take it, in the scale of training.

    Attributes:
        x: [B, input width], in the compute dtype, b_dec subtracted where that is the variant.
        target: fp32 [B, output width], less what a skip connection gives.
        scale: scalar, multiplies squared errors.
        k: latents per token, where the architecture has a k.
        norms: [F, n_layers], the decoder's norms, or None where no penalty weighs them.
        sums: [F], sums of all pre-activations over the batch, or None.
        dead: bool [F], or None where no penalty looks at it.
        prefixes: of a Matryoshka SAE.
        skip_input: fp32 [B, input width], what the skip connection reads, or None.
    """

    x: torch.Tensor
    target: torch.Tensor
    scale: torch.Tensor
    k: float
    norms: torch.Tensor | None
    sums: torch.Tensor | None
    dead: torch.Tensor | None
    prefixes: Prefixes | None
    skip_input: torch.Tensor | None


class Pass(NamedTuple):
    """What a forward and backward pass leaves for the optimizer.

    Attributes:
        loss: scalar, without AuxK.
        error: scalar, the main reconstruction's squared error.
        residual: fp32 [B, output width], the main reconstruction less the target.
        gradients: of all parameters but b_dec.
        dx_sum: [F]; ``W_enc^T dx_sum`` is the gradient of x, summed over the tokens.
        db_dec: [output width], through the output alone.
        fired: int32 [F], how often each latent fired.
        n_kept: how many entries the encoder kept.
    """

    loss: torch.Tensor
    error: torch.Tensor
    residual: torch.Tensor
    gradients: dict[str, Gradient]
    dx_sum: torch.Tensor
    db_dec: torch.Tensor
    fired: torch.Tensor
    n_kept: int


class Leaves(NamedTuple):
    """What autograd differentiates: entries, vectors of latents, and nothing larger.

    Attributes:
        h: the kept pre-activations.
        vectors: the parameters [F]: biases, thresholds.
        norms, sums: as of `Batch`.
        probabilities: [B, E], a router's, or None.
    """

    h: torch.Tensor
    vectors: dict[str, torch.Tensor]
    norms: torch.Tensor | None
    sums: torch.Tensor | None
    probabilities: torch.Tensor | None

    @classmethod
    def of(cls, sae: SparseAutoencoder, pre: SparseCodes, batch: Batch) -> Leaves:
        """Fresh leaves with these values; parameters are leaves already."""

        def leaf(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor.detach().requires_grad_()

        vectors: dict[str, torch.Tensor] = {
            name: parameter
            for name, parameter in sae.named_parameters()
            if parameter.dim() == 1 and name not in sae.width_vectors and parameter.requires_grad
        }
        probabilities = pre.routing.probabilities if isinstance(pre, RoutedCodes) else None
        h = pre.values.detach().requires_grad_()
        return cls(h, vectors, leaf(batch.norms), leaf(batch.sums), leaf(probabilities))

    def entries(self, pre: SparseCodes) -> SparseCodes:
        """The entries that the leaves were made of, with these in their places."""
        pre = pre.with_values(self.h)
        if self.probabilities is None:
            return pre
        assert isinstance(pre, RoutedCodes)
        routing = pre.routing._replace(probabilities=self.probabilities)
        return dataclasses.replace(pre, routing=routing)

    def gradients(
        self,
        outputs: list[tuple[torch.Tensor, torch.Tensor]],
        penalty: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The gradients by name, those that there are; "h" always.

        Args:
            outputs: the values of each reconstruction and dL/dvalues.
            penalty: added to the loss, or None.
        """
        if penalty is not None:
            outputs = [*outputs, (penalty, torch.ones_like(penalty))]
        given = self._asdict()
        names = given.pop("vectors") | given
        present = {name: leaf for name, leaf in names.items() if leaf is not None}
        live = [(value, grad) for value, grad in outputs if value.requires_grad]
        values, slopes = zip(*live, strict=True)
        found = torch.autograd.grad(values, list(present.values()), slopes, allow_unused=True)
        result = {name: grad for name, grad in zip(present, found, strict=True) if grad is not None}
        result.setdefault("h", torch.zeros_like(self.h))
        return result


def gradients_of_vectors(
    sae: SparseAutoencoder, slopes: dict[str, torch.Tensor], db_enc: Gradient
) -> dict[str, Gradient]:
    """The gradients of all parameters [F], each a matrix of width 1.

    Args:
        sae: whose parameters.
        slopes: of :meth:`Leaves.gradients`.
        db_enc: b_enc's share as the bias of the encoder product, of terms alone.
    """
    result = {"b_enc": db_enc}
    for name, parameter in sae.named_parameters():
        if parameter.dim() != 1 or name in sae.width_vectors or name not in slopes:
            continue
        terms = result.get(name, Gradient()).terms
        result[name] = Gradient.whole(slopes[name][:, None])._replace(terms=terms)
    return result
