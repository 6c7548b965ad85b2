"""dictionary_learning's TopK, BatchTopK and Matryoshka dictionaries on the kernels.

Their decoders are left alone: a product with lazy codes is computed from the entries.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels import functional
from sae_kernels.codes import SparseCodes
from sae_kernels.functional.recording import autocast_dtype
from sae_kernels.integrations.late import LateTensor
from sae_kernels.integrations.lazy_codes import LazyCodes
from sae_kernels.integrations.patching import hooked, unfit

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.integrations.adapters import Installation


class Weights(NamedTuple):
    """A dictionary's weights with latents first, whatever it keeps them in."""

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor


def weights_of(installation: Installation, ae: Any) -> Weights:
    """The weights of a TopK, BatchTopK or Matryoshka dictionary."""
    rows = installation.rows
    if hasattr(ae, "W_enc"):
        return Weights(rows.of(ae.W_enc), ae.b_enc, ae.W_dec, ae.b_dec)
    W_enc, W_dec = rows.straight(ae.encoder.weight), rows.of(ae.decoder.weight)
    return Weights(W_enc, ae.encoder.bias, W_dec, ae.b_dec)


def why_not(installation: Installation, ae: Any, served: type, x: torch.Tensor) -> str | None:
    """Why a dictionary's encoder is left to the library, or None."""
    kind: type = type(ae)
    if kind is not served:
        return f"class {kind.__name__}"
    if any(hooked(layer) for layer in ae.children()):
        return "hooks on its layers"
    turned = ae.W_enc if hasattr(ae, "W_enc") else ae.decoder.weight
    return unfit(x, *ae.parameters()) or installation.rows.why_not(turned)


def install(installation: Installation) -> None:
    """Replaces encoders and the losses that read more than codes."""
    folder = "dictionary_learning.trainers"
    one, batch, nested = (
        importlib.import_module(f"{folder}.{name}")
        for name in ("top_k", "batch_top_k", "matryoshka_batch_top_k")
    )
    replace = installation.patches.replace
    replace(one.AutoEncoderTopK, "encode", _encode_topk(installation, one.AutoEncoderTopK))
    for ae, trainer in (
        (batch.BatchTopKSAE, batch.BatchTopKTrainer),
        (nested.MatryoshkaBatchTopKSAE, nested.MatryoshkaBatchTopKTrainer),
    ):
        replace(ae, "encode", _encode_batch_topk(installation, ae))
        replace(trainer, "get_auxiliary_loss", _auxiliary_loss(installation))
    replace(one.TopKTrainer, "get_auxiliary_loss", _auxiliary_loss(installation))
    replace(nested.MatryoshkaBatchTopKTrainer, "loss", _nested_loss(installation))
    if installation.optimizer is not None:
        for trainer in (
            one.TopKTrainer,
            batch.BatchTopKTrainer,
            nested.MatryoshkaBatchTopKTrainer,
            importlib.import_module(f"{folder}.jumprelu").JumpReluTrainer,
        ):
            replace(trainer, "__init__", _fusing(installation))


def _fusing(installation: Installation) -> Callable[..., Any]:
    def make(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if installation.covers(self.ae):
                installation.fuse(self.optimizer)

        return __init__

    return make


def _encode_topk(installation: Installation, served: type) -> Callable[..., Any]:
    what, ledger = "AutoEncoderTopK.encode", installation.ledger

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def encode(
            self: Any, x: torch.Tensor, return_topk: bool = False, use_threshold: bool = False
        ) -> Any:
            if not installation.covers(self):
                return original(self, x, return_topk, use_threshold)
            why = why_not(installation, self, served, x)
            if use_threshold and return_topk:
                why = "a threshold and the k largest in one"
            if not ledger.takes(what, why):
                return original(self, x, return_topk, use_threshold)
            weights = weights_of(installation, self)
            if use_threshold:
                return _above_threshold(installation, self, x, weights)
            W, b = weights.W_enc, weights.b_enc
            codes = functional.encode_topk(x, W, b, int(self.k), b_dec=weights.b_dec)
            acts = _handed(installation, codes, x)
            if not return_topk:
                return acts
            values, indices = winners(self, x, acts.entries or codes)
            return acts, values, indices, pre_activations(installation, self, x, weights)

        return encode

    return make


def winners(ae: Any, x: torch.Tensor, codes: SparseCodes) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and latents of the k winners; the trainer counts all of them as fired.

    Which latents of value 0 win where fewer than k are positive, is up to torch's top-k.
    """
    values, indices = codes.values, codes.indices.long()
    short = ~(values.detach() > 0).all(-1)
    if bool(short.any()):
        with torch.no_grad():
            pre = ae.encoder(x[short] - ae.b_dec).relu()
            theirs = pre.topk(values.shape[-1], sorted=False, dim=-1).indices
        some = SparseCodes(values[short], codes.indices[short], codes.n_latents).to_dense()
        values = values.index_put((short,), some.gather(-1, theirs))
        indices = indices.index_put((short,), theirs)
    return values, indices


def _encode_batch_topk(installation: Installation, served: type) -> Callable[..., Any]:
    what, ledger = f"{served.__name__}.encode", installation.ledger

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def encode(
            self: Any, x: torch.Tensor, return_active: bool = False, use_threshold: bool = True
        ) -> Any:
            if not installation.covers(self):
                return original(self, x, return_active, use_threshold)
            why = why_not(installation, self, served, x)
            if why is None and x.dim() != 2:
                why = f"a batch of {x.dim()} dimensions"
            if why is None and not _all_groups(self):
                why = "groups that are not active"
            if not ledger.takes(what, why):
                return original(self, x, return_active, use_threshold)
            weights = weights_of(installation, self)
            if use_threshold:
                acts = _above_threshold(installation, self, x, weights)
            else:
                W, b = weights.W_enc, weights.b_enc
                codes = functional.encode_batch_topk(x, W, b, int(self.k), b_dec=weights.b_dec)
                acts = _handed(installation, codes, x)
            if not return_active:
                return acts
            late = pre_activations(installation, self, x, weights)
            return acts, acts.sum(0) > 0, late

        return encode

    return make


def _all_groups(ae: Any) -> bool:
    return getattr(ae, "active_groups", 0) == len(getattr(ae, "group_sizes", ()))


def _above_threshold(
    installation: Installation, ae: Any, x: torch.Tensor, weights: Weights
) -> LazyCodes:
    bound = ae.threshold.detach().clamp(min=0)
    W, b = weights.W_enc, weights.b_enc
    codes = functional.encode_threshold(x, W, b, bound, b_dec=weights.b_dec)
    return _handed(installation, codes, x)


def _handed(installation: Installation, codes: SparseCodes, x: torch.Tensor) -> LazyCodes:
    dtype = autocast_dtype(x) or x.dtype
    return LazyCodes.of(codes.with_values(codes.values.to(dtype)), installation.ledger)


def pre_activations(
    installation: Installation, ae: Any, x: torch.Tensor, weights: Weights
) -> LateTensor:
    """All pre-activations after their ReLU, as ``encode`` returns them."""

    def compute(
        x: torch.Tensor, W: torch.Tensor, b: torch.Tensor, b_dec: torch.Tensor
    ) -> torch.Tensor:
        return torch.nn.functional.linear(x - b_dec, W, b).relu()

    W, b, b_dec = weights.W_enc, weights.b_enc, weights.b_dec
    shape = (*x.shape[:-1], W.shape[0])
    dtype = autocast_dtype(x) or x.dtype
    late = LateTensor.of(shape, compute, x, W, b, b_dec, dtype=dtype, ledger=installation.ledger)
    late.columns = lambda latents: compute(x, W[latents], b[latents], b_dec)
    return late


def _auxiliary_loss(installation: Installation) -> Callable[..., Any]:
    """Makes ``get_auxiliary_loss``: the dead latents alone try to predict the residual."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_auxiliary_loss(
            self: Any, residual_BD: torch.Tensor, post_relu_acts_BF: torch.Tensor
        ) -> torch.Tensor:
            late = post_relu_acts_BF
            columns = late.columns if isinstance(late, LateTensor) and not late.computed else None
            if columns is None:
                found: torch.Tensor = original(self, residual_BD, post_relu_acts_BF)
                return found
            dead = (self.num_tokens_since_fired >= self.dead_feature_threshold).nonzero()[:, 0]
            self.dead_features = dead.numel()
            if not self.dead_features:
                self.pre_norm_auxk_loss = -1
                return residual_BD.new_zeros(())
            installation.ledger.took(f"{type(self).__name__}.get_auxiliary_loss")
            acts = columns(dead)
            top = acts.topk(min(self.top_k_aux, self.dead_features), sorted=False)
            acts = torch.zeros_like(acts).scatter(-1, top.indices, top.values)
            rows = weights_of(installation, self.ae).W_dec[dead]
            residual = residual_BD.float()
            error = (residual - (acts @ rows).float()).pow(2).sum(dim=-1).mean()
            self.pre_norm_auxk_loss = error
            away = (residual - residual_BD.mean(dim=0).float()).pow(2).sum(dim=-1).mean()
            return (error / away).nan_to_num(0.0)

        return get_auxiliary_loss

    return make


def _nested_loss(installation: Installation) -> Callable[..., Any]:
    """Makes the Matryoshka trainer's ``loss``: all prefixes are decoded in one pass."""
    what = "MatryoshkaBatchTopKTrainer.loss"
    of_library = importlib.import_module("dictionary_learning.trainers.matryoshka_batch_top_k")
    served = of_library.MatryoshkaBatchTopKSAE

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def loss(self: Any, x: torch.Tensor, step: Any = None, logging: bool = False) -> Any:
            if not installation.covers(self.ae):
                return original(self, x, step, logging)
            why = why_not(installation, self.ae, served, x)
            if why is None and not (x.dim() == 2 and _all_groups(self.ae)):
                why = "its encoder is left to the library"
            if not installation.ledger.takes(what, why):
                return original(self, x, step, logging)
            f, active, late = self.ae.encode(x, return_active=True, use_threshold=False)
            if step > self.threshold_start_step:
                self.update_threshold(f)
            ends = self.ae.group_sizes.cumsum(0).to(torch.int32)
            rows = self.ae.W_dec
            recons = functional.decode(f.entries, rows, self.ae.b_dec, group_ends=ends).to(x.dtype)
            each = (x - recons).pow(2).sum(dim=-1).mean(dim=-1)
            each = each * each.new_tensor(self.group_weights)
            self.effective_l0 = self.k
            self.num_tokens_since_fired += x.size(0)
            self.num_tokens_since_fired[active] = 0
            aux = self.get_auxiliary_loss((x - recons[-1]).detach(), late)
            total = each.mean() + self.auxk_alpha * aux
            if not logging:
                return total
            losses = {"l2_loss": each.mean(), "auxk_loss": aux, "loss": total}
            losses |= {"min_l2_loss": each.min(), "max_l2_loss": each.max()}
            return _log(x, recons[-1], f, losses)

        return loss

    return make


class LossLog(NamedTuple):
    """What a trainer's ``loss`` returns for its log."""

    x: torch.Tensor
    x_hat: torch.Tensor
    f: torch.Tensor
    losses: dict[str, float]


def _log(
    x: torch.Tensor, x_hat: torch.Tensor, f: torch.Tensor, losses: dict[str, torch.Tensor]
) -> LossLog:
    return LossLog(x, x_hat, f, {name: value.item() for name, value in losses.items()})
