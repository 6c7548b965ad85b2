"""Loss and gradients of a batch by dense products, for codes that are not sparse yet.

A ReLU-like SAE starts with about half of its latents firing on every token, and there products are
faster than gathers. They go through tiles of latents twice: once for the reconstructions, and once
more, the tile's codes computed anew, for the gradients, which so are complete tile by tile. The
objective is the sparse pass's own: it acts on entries, and in a tile every latent of a token is
one. Products are torch's; bf16 ones come out in bf16 and stay so, as under autocast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from sae_kernels.codes import SparseCodes
from sae_kernels.nn import GatedSAE, JumpReLUSAE, ReLUSAE
from sae_kernels.primitives.checks import gradient_operand
from sae_kernels.primitives.terms import Gradient
from sae_kernels.step.entries import Batch, Leaves, Operands, Pass, gradients_of_vectors
from sae_kernels.step.objective import Facts, objective

if TYPE_CHECKING:
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step.objective import Objective
    from sae_kernels.step.sparsity import SparsitySchedule

_TILE_BYTES = 8 << 20  # of fp32 numbers [B, latents of a tile]
# From this part of the latents on a token's codes are faster as a dense row: measured between 1/24
# and 1/12 in bf16 (docs/benchmarks.md).
DENSE_FROM = 1 / 20


def can_be_dense(sae: SparseAutoencoder, config: TrainConfig) -> bool:
    """Whether the objective is a sum over entries, so that tiles of them add up.

    Lazy Adam leaves latents alone that did not fire, where a dense gradient has rows for all.
    """
    whole = config.sparsity == "target_l0" or bool(config.preact_coefficient)
    fits = isinstance(sae, (ReLUSAE, JumpReLUSAE, GatedSAE)) and config.adam == "dense"
    return fits and not whole


class _Tile(NamedTuple):
    """Some latents of all tokens."""

    leaves: Leaves
    aim: Objective


class _Output(NamedTuple):
    """A reconstruction of all tokens."""

    factor: torch.Tensor  # scalar: dL/dx_hat = factor * residual
    trains_decoder: bool
    residual: torch.Tensor


class _Dense:
    """The two rounds over the tiles."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        operands: Operands,
        batch: Batch,
        schedule: SparsitySchedule,
    ) -> None:
        self.sae, self.batch, self.schedule = sae, batch, schedule
        self.product = gradient_operand(batch.x.dtype)
        # fp16 operands are rounded to fp16 and multiplied in fp32.
        self.x = batch.x.to(self.product)
        self.operands = Operands(*(W.to(batch.x.dtype).to(self.product) for W in operands))
        F = sae.config.n_latents
        width = max(1, min(F, _TILE_BYTES // (4 * batch.x.shape[0])))
        self.tiles = [slice(first, min(first + width, F)) for first in range(0, F, width)]
        self.every = torch.arange(F, dtype=torch.int32, device=batch.x.device)

    def tile(self, latents: slice) -> _Tile:
        """The objective on a tile's entries, differentiable."""
        sae, batch = self.sae, self.batch
        bias = sae.b_enc.detach()[latents].to(self.product)
        h = torch.nn.functional.linear(self.x, self.operands.W_enc[latents], bias)
        pre = SparseCodes(h, self.every[latents].expand(h.shape), sae.config.n_latents)
        leaves = Leaves.of(sae, pre, batch)
        with torch.enable_grad():
            facts = Facts(h.shape[0], batch.k, leaves.norms, None, batch.dead)
            aim = objective(sae, leaves.entries(pre), facts, self.schedule)
        return _Tile(leaves, aim)

    def reconstruct(self) -> tuple[list[_Output], torch.Tensor, torch.Tensor]:
        """The reconstructions, the penalty, and how often each latent fired."""
        sae, target = self.sae, self.batch.target
        fired = torch.zeros_like(self.every)
        penalty = target.new_zeros(())
        outputs: list[_Output] = []
        for latents in self.tiles:
            aim = self.tile(latents).aim
            for i, part in enumerate(aim.reconstructions):
                if i == len(outputs):
                    factor = 2 * part.weight * self.batch.scale
                    e = sae.b_dec.detach() - target
                    outputs.append(_Output(factor, part.trains_decoder, e))
                values = part.values.detach()
                W_dec = self.operands.W_dec[latents]
                outputs[i].residual.add_(values.to(self.product) @ W_dec)
                if i == 0:
                    fired[latents] = (values != 0).sum(0, dtype=torch.int32)
            if aim.penalty is not None:
                penalty += aim.penalty.detach()
        return outputs, penalty, fired

    def differentiate(
        self, reconstructed: list[_Output]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        """The gradients of W_enc and W_dec, and those of vectors by name ("h": summed over B)."""
        F, target = self.sae.config.n_latents, self.batch.target
        dW_enc = target.new_empty(F, self.x.shape[1])
        dW_dec = target.new_empty(F, target.shape[1])
        grads = [(out.factor * out.residual).to(self.product) for out in reconstructed]
        total = {"h": target.new_zeros(F)}
        for latents in self.tiles:
            tile = self.tile(latents)
            W_dec = self.operands.W_dec[latents]
            parts = list(zip(tile.aim.reconstructions, grads, strict=True))
            outputs = [
                (part.values, (grad @ W_dec.T).to(part.values.dtype)) for part, grad in parts
            ]
            slopes = tile.leaves.gradients(outputs, tile.aim.penalty)
            dh = slopes.pop("h")
            total["h"][latents] = dh.sum(0, dtype=target.dtype)
            dW_enc[latents] = dh.to(self.product).T @ self.x
            shares = [
                part.values.detach().to(self.product).T @ grad
                for part, grad in parts
                if part.trains_decoder
            ]
            dW_dec[latents] = sum(shares[1:], shares[0])
            for name, slope in slopes.items():
                total[name] = total[name] + slope if name in total else slope
        return dW_enc, dW_dec, total


def dense_pass(
    sae: SparseAutoencoder, operands: Operands, batch: Batch, schedule: SparsitySchedule
) -> Pass:
    """The same as :func:`~sae_kernels.step.sparse_pass.sparse_pass`, by tiles of latents."""
    dense = _Dense(sae, operands, batch, schedule)
    outputs, loss, fired = dense.reconstruct()
    squares = [out.residual.square().sum(1).sum() for out in outputs]
    for out, square in zip(outputs, squares, strict=True):
        loss = loss + out.factor / 2 * square
    dW_enc, dW_dec, slopes = dense.differentiate(outputs)
    db = slopes.pop("h")
    slopes["b_enc"] = slopes["b_enc"] + db if "b_enc" in slopes else db
    gradients = gradients_of_vectors(sae, slopes, Gradient())
    gradients["W_enc"] = Gradient.whole(dW_enc)
    gradients["W_dec"] = Gradient.whole(dW_dec, slopes.get("norms"))
    grads = [out.factor * out.residual for out in outputs if out.trains_decoder]
    dx_hat = sum(grads[1:], grads[0])
    if batch.skip_input is not None:
        gradients["W_skip"] = Gradient.whole(dx_hat.T @ batch.skip_input)
    return Pass(
        loss=loss,
        error=squares[0],
        residual=outputs[0].residual,
        gradients=gradients,
        dx_sum=db,
        db_dec=dx_hat.sum(0),
        fired=fired,
        n_kept=int(fired.sum()),
    )
