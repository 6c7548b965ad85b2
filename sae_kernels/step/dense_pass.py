"""Loss and gradients of a batch by dense products, while codes are not sparse yet.

A ReLU-like SAE starts with about half of its latents firing on every token, where dense products
are faster than gathers. Two passes go over tiles of latents: one for the reconstructions, one that
recomputes each tile's codes and completes its gradients. The objective is that of the sparse pass,
with every (token, latent) of a tile as an entry. Products are torch's; those of bf16 operands are
bf16, as under autocast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.codes import SparseCodes
from sae_kernels.nn.objective import entry_gradients, objective_of, with_leaves
from sae_kernels.primitives.checks import gradient_operand
from sae_kernels.primitives.terms import Gradient
from sae_kernels.step.sparse_pass import PassResult, vector_gradients

if TYPE_CHECKING:
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.nn.objective import Context, Reconstruction

_TILE_BYTES = 8 << 20  # of fp32 numbers [B, latents of a tile]


class _Tile(NamedTuple):
    """The objective on a tile: some latents of all tokens, and the leaves of its gradients."""

    parts: list[Reconstruction]
    penalty: torch.Tensor | None
    leaves: dict[str, torch.Tensor]


class _Output(NamedTuple):
    """A reconstruction of all tokens; dL/dx_hat is ``factor * residual``."""

    factor: torch.Tensor
    trains_decoder: bool
    residual: torch.Tensor


class _TiledPass:
    """The two passes over tiles of latents."""

    def __init__(self, W_enc: torch.Tensor, W_dec: torch.Tensor, context: Context) -> None:
        self.sae, self.context = context.sae, context
        dtype = context.x.dtype
        self.product = gradient_operand(dtype)
        # fp16 operands are rounded to fp16 and multiplied in fp32.
        self.x = context.x.to(self.product)
        self.W_enc, self.W_dec = (W.to(dtype).to(self.product) for W in (W_enc, W_dec))
        F = len(self.sae.latents)
        width = max(1, min(F, _TILE_BYTES // (4 * context.n_tokens)))
        self.tiles = [slice(first, min(first + width, F)) for first in range(0, F, width)]
        self.every = torch.arange(F, dtype=torch.int32, device=context.x.device)

    def tile(self, latents: slice) -> _Tile:
        """Encodes a tile and evaluates the objective on its entries, differentiable."""
        sae = self.sae
        bias = sae.b_enc.detach()[latents].to(self.product)
        h = torch.nn.functional.linear(self.x, self.W_enc[latents], bias)
        preacts = SparseCodes(h, self.every[latents].expand(h.shape), len(self.every))
        with torch.enable_grad():
            entries, leaves = with_leaves(sae, preacts)
            parts, penalty = objective_of(entries, self.context)
        return _Tile(parts, penalty, {**leaves, **(self.context.leaves or {})})

    def reconstruct(self) -> tuple[list[_Output], torch.Tensor, torch.Tensor]:
        """First pass: the reconstructions, the penalty, and how often each latent fired."""
        context, sae = self.context, self.sae
        fired = torch.zeros_like(self.every)
        penalty = context.target.new_zeros(())
        outputs: list[_Output] = []
        for latents in self.tiles:
            tile = self.tile(latents)
            for i, part in enumerate(tile.parts):
                if i == len(outputs):
                    factor = 2 * part.weight * context.scale
                    e = sae.b_dec.detach() - context.target
                    outputs.append(_Output(factor, part.trains_decoder, e))
                values = part.values.detach()
                outputs[i].residual.add_(values.to(self.product) @ self.W_dec[latents])
                if i == 0:
                    fired[latents] = (values != 0).sum(0, dtype=torch.int32)
            if tile.penalty is not None:
                penalty += tile.penalty.detach()
        return outputs, penalty, fired

    def differentiate(
        self, reconstructed: list[_Output]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """Second pass: gradients of W_enc, W_dec and the leaves by name ("h": summed over B)."""
        F, target = len(self.every), self.context.target
        dW_enc = target.new_empty(F, self.x.shape[1])
        dW_dec = target.new_empty(F, target.shape[1])
        dx_hats = [(out.factor * out.residual).to(self.product) for out in reconstructed]
        sums = {"h": target.new_zeros(F)}
        for latents in self.tiles:
            tile, W_dec = self.tile(latents), self.W_dec[latents]
            pairs = list(zip(tile.parts, dx_hats, strict=True))
            outputs = [
                (part.values, (dx_hat @ W_dec.T).to(part.values.dtype)) for part, dx_hat in pairs
            ]
            grads = entry_gradients(tile.leaves, outputs, tile.penalty)
            dh = grads.pop("h")
            sums["h"][latents] = dh.sum(0, dtype=target.dtype)
            dW_enc[latents] = dh.to(self.product).T @ self.x
            shares = [
                part.values.detach().to(self.product).T @ dx_hat
                for part, dx_hat in pairs
                if part.trains_decoder
            ]
            dW_dec[latents] = sum(shares[1:], shares[0])
            for name, grad in grads.items():
                sums[name] = sums[name] + grad if name in sums else grad
        return dW_enc, dW_dec, sums


def dense_pass(
    sae: SparseAutoencoder, W_enc: torch.Tensor, W_dec: torch.Tensor, context: Context
) -> PassResult:
    """Loss and gradients of a batch by dense products over tiles of latents.

    Arguments and result as of :func:`~sae_kernels.step.sparse_pass.sparse_pass`.
    """
    dense = _TiledPass(W_enc, W_dec, context)
    outputs, loss, fired = dense.reconstruct()
    squares = [out.residual.square().sum(1).sum() for out in outputs]
    for out, square in zip(outputs, squares, strict=True):
        loss = loss + out.factor / 2 * square
    dW_enc, dW_dec, grads = dense.differentiate(outputs)
    dh_sum = grads.pop("h")
    grads["b_enc"] = grads["b_enc"] + dh_sum if "b_enc" in grads else dh_sum.clone()
    gradients = vector_gradients(sae, grads, Gradient())
    gradients["W_enc"] = Gradient.whole(dW_enc)
    gradients["W_dec"] = Gradient.whole(dW_dec, grads.get("norms"))
    dx_hats = [out.factor * out.residual for out in outputs if out.trains_decoder]
    dx_hat = sum(dx_hats[1:], dx_hats[0])
    if context.skip_input is not None:
        gradients["W_skip"] = Gradient.whole(dx_hat.T @ context.skip_input)
    gradients["b_dec"] = Gradient.whole(dx_hat.sum(0)[None])
    return PassResult(
        loss=loss,
        errors=squares[0],
        residual=outputs[0].residual,
        x=context.x,
        preacts=None,
        gradients=gradients,
        dh_sum=dh_sum,
        fired=fired,
        n_kept=int(fired.sum()),
    )
