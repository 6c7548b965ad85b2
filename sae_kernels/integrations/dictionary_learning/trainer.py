"""dictionary_learning at trainer level: the trainers' ``update`` on FusedStep."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels.integrations.adopted import (
    AdoptedStep,
    of_dead_latents,
    why_not_adam,
    why_not_autocast,
)
from sae_kernels.integrations.dictionary_learning.module import winners
from sae_kernels.nn import BatchTopKConfig, BatchTopKSAE, TopKConfig, TopKSAE

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.integrations.adapters import Installation
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.nn.objective import Prefixes
    from sae_kernels.step import Differentiated, OutsideGradient

# What is replaced or relied on, and its code in the tested versions.
_CODE = {
    "top_k:TopKTrainer.update": "f81adf159f47",
    "top_k:TopKTrainer.loss": "09e8b75f1c57",
    "top_k:TopKTrainer.get_auxiliary_loss": "9e0194ecca51",
    "top_k:TopKTrainer.update_threshold": "431b30de4fc4",
    "top_k:AutoEncoderTopK.encode": "cf549cb03f38",
    "top_k:AutoEncoderTopK.decode": "77ff5a0e88b2",
    "batch_top_k:BatchTopKTrainer.update": "773d512b06cb",
    "batch_top_k:BatchTopKTrainer.loss": "8a967d09e677",
    "batch_top_k:BatchTopKTrainer.get_auxiliary_loss": "34339a8f7090",
    "batch_top_k:BatchTopKTrainer.update_threshold": "6afa59187b18",
    "batch_top_k:BatchTopKSAE.encode": "bdacae518284",
    "batch_top_k:BatchTopKSAE.decode": "77ff5a0e88b2",
    "matryoshka_batch_top_k:MatryoshkaBatchTopKTrainer.update": "41cc57ff279f",
    "matryoshka_batch_top_k:MatryoshkaBatchTopKTrainer.loss": "a078381c9a15",
    "matryoshka_batch_top_k:MatryoshkaBatchTopKTrainer.get_auxiliary_loss": "9a4f527a2aac",
    "matryoshka_batch_top_k:MatryoshkaBatchTopKTrainer.update_threshold": "6afa59187b18",
    "matryoshka_batch_top_k:MatryoshkaBatchTopKSAE.encode": "434ff3a93fa4",
    "trainer:remove_gradient_parallel_to_decoder_directions": "5d6d451146bf",
    "trainer:set_decoder_norm_to_unit_norm": "1efab197359c",
}
SEAMS = {f"dictionary_learning.trainers.{seam}": code for seam, code in _CODE.items()}
# What update would call; a trainer with its own is left to the library.
_OWN = ("loss", "get_auxiliary_loss", "update_threshold")
_HALVES = (torch.bfloat16, torch.float16)


class Kind(NamedTuple):
    """A trainer that is served.

    Attributes:
        trainer: its class.
        dictionary: the class of its SAE.
        median: its geometric median, from which b_dec starts.
    """

    trainer: Any
    dictionary: Any
    median: Callable[[torch.Tensor], torch.Tensor]


class _Weighted(BatchTopKSAE):
    """A Matryoshka SAE whose prefixes have weights of their own."""

    weights: list[float]

    def prefixes(self, objective: Any, step: int, seed: int) -> Prefixes | None:
        fixed = super().prefixes(objective, step, seed)
        assert fixed is not None
        return fixed._replace(weights=fixed.weights.new_tensor(self.weights))


def install(installation: Installation) -> None:
    """Replaces ``update`` of the TopK, BatchTopK and Matryoshka trainers."""
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    batch, nested = batch_top_k.BatchTopKTrainer, matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer
    kinds = (
        Kind(top_k.TopKTrainer, top_k.AutoEncoderTopK, top_k.geometric_median),
        Kind(batch, batch_top_k.BatchTopKSAE, batch.geometric_median),
        Kind(nested, matryoshka_batch_top_k.MatryoshkaBatchTopKSAE, nested.geometric_median),
    )
    for kind in kinds:
        installation.patches.replace(kind.trainer, "update", _replacement(kind, installation))


def _replacement(kind: Kind, installation: Installation) -> Callable[..., Any]:
    steps: weakref.WeakKeyDictionary[Any, AdoptedStep] = weakref.WeakKeyDictionary()
    what = f"{kind.trainer.__name__}.update"

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def update(self: Any, step: int, x: torch.Tensor) -> float:
            if not installation.covers(self.ae):
                result: float = original(self, step, x)
                return result
            why = _why_not(self, kind, x) or _why_not_laid(self.ae, installation)
            if not installation.ledger.takes(what, why):
                result = original(self, step, x)
                return result
            if step == 0:
                self.ae.b_dec.data = kind.median(x).to(self.ae.b_dec.dtype)
            adopted = steps.get(self)
            if adopted is None or not adopted.serves(self.optimizer):
                adopted = steps[self] = _adopt(self, installation)
            return _updated(self, adopted, step, x.to(self.device))

        return update

    return make


def _why_not(trainer: Any, kind: Kind, x: torch.Tensor) -> str | None:
    """Why a step runs as shipped (its SAE at module level), or None."""
    ae = trainer.ae
    if type(trainer) is not kind.trainer:
        return f"a trainer of class {type(trainer).__name__}"
    if type(ae) is not kind.dictionary:
        return f"an SAE of class {type(ae).__name__}"
    own = [name for name in _OWN if name in vars(trainer) or not _is_theirs(kind.trainer, name)]
    own += [name for name in ("encode", "decode") if name in vars(ae)]
    if own:
        return f"another {own[0]}"
    if any(module._forward_hooks or module._forward_pre_hooks for module in ae.modules()):
        return "hooks on the SAE"
    if x.dim() != 2:
        return f"a batch of {x.dim()} dimensions"
    if x.dtype not in (torch.float32, *_HALVES):
        return f"activations in {x.dtype}"
    if getattr(ae, "active_groups", 0) != len(getattr(ae, "group_sizes", ())):
        return "groups that are not active"
    if not all(weight > 0 for weight in getattr(trainer, "group_weights", ())):
        return "group weights that are not positive"
    why = why_not_adam(trainer.optimizer, ae) or why_not_autocast(ae.b_dec)
    return why or _why_not_unit(ae)


def _is_theirs(kind: type, name: str) -> bool:
    return str(getattr(kind, name).__module__).startswith("dictionary_learning.")


def _why_not_unit(ae: Any) -> str | None:
    # Theirs projects the gradient by a row over its norm, ours by a row that has norm 1 already.
    # Every update leaves such rows, so a look at some of them tells of weights from elsewhere.
    some = _rows_of_decoder(ae)[:: max(1, ae.dict_size // 64)]
    off = (some.detach().norm(dim=1) - 1).abs().max()
    return None if off < 1e-5 else "decoder rows that are not of unit norm"


def _why_not_laid(ae: Any, installation: Installation) -> str | None:
    return installation.rows.why_not(ae.decoder.weight if hasattr(ae, "decoder") else ae.W_enc)


def _rows_of_decoder(ae: Any) -> torch.Tensor:
    rows: torch.Tensor = ae.decoder.weight.T if hasattr(ae, "decoder") else ae.W_dec
    return rows


def _adopt(trainer: Any, installation: Installation) -> AdoptedStep:
    """FusedStep on a trainer's dictionary and optimizer."""
    ae = trainer.ae
    shape: tuple[int, int] = ae.activation_dim, ae.dict_size
    k, nested = int(ae.k), hasattr(ae, "group_sizes")
    sae: SparseAutoencoder
    with torch.device("meta"):
        if nested:
            groups = tuple(ae.group_sizes.tolist())
            sae = _Weighted(BatchTopKConfig(*shape, k=k, groups=groups))
            sae.weights = [weight / len(groups) for weight in trainer.group_weights]
        elif type(trainer).__name__ == "TopKTrainer":
            sae = TopKSAE(TopKConfig(*shape, k=k))
        else:
            sae = BatchTopKSAE(BatchTopKConfig(*shape, k=k))
    if nested:
        weights = {"W_enc": ae.W_enc, "b_enc": ae.b_enc, "W_dec": ae.W_dec}
    else:
        linear = ae.encoder, ae.decoder
        weights = {"W_enc": linear[0].weight, "b_enc": linear[0].bias, "W_dec": linear[1].weight}
    return AdoptedStep(
        sae,
        sae.objective_class(loss="mse", auxk_alpha=0.0),
        weights={**weights, "b_dec": ae.b_dec},
        turned=frozenset({"W_enc" if nested else "W_dec"}),
        optimizer=trainer.optimizer,
        rows=installation.rows,
        clip_norm=1.0,
        who=type(trainer).__name__,
    )


def _updated(trainer: Any, adopted: AdoptedStep, step: int, x: torch.Tensor) -> float:
    """What a trainer's ``update`` does after b_dec was set; returns the loss."""
    done = adopted.differentiate(x, k=int(trainer.ae.k))
    assert done.preacts is not None
    values = done.preacts.values.relu()
    if step > trainer.threshold_start_step:
        trainer.update_threshold(values)  # looks for the smallest positive ones alone
    per_token = values.dim() == 2
    trainer.effective_l0 = values.shape[1] if per_token else trainer.k
    # Among a token's k largest theirs counts zeros as well; in a batch's, values above 0 alone.
    trainer.num_tokens_since_fired += len(x)
    if per_token:
        _, latents = winners(trainer.ae, x, done.preacts.with_values(values))
        trainer.num_tokens_since_fired[latents.flatten()] = 0
    else:
        trainer.num_tokens_since_fired[done.fired > 0] = 0
    # TopKTrainer alone leaves its figures as they are where the loss is off.
    outside = (
        _auxiliary(trainer, adopted, done) if trainer.auxk_alpha > 0 or not per_token else None
    )
    result = adopted.update(done, outside)
    trainer.scheduler.step()
    return float(result.loss)


def _auxiliary(trainer: Any, adopted: AdoptedStep, done: Differentiated) -> OutsideGradient | None:
    """dictionary_learning's auxiliary loss: no factor for few dead latents; counts are new ones."""
    dead = (trainer.num_tokens_since_fired >= trainer.dead_feature_threshold).nonzero()[:, 0]
    trainer.dead_features, trainer.pre_norm_auxk_loss = dead.numel(), -1
    if not dead.numel():
        return None
    residual = -done.residual
    away = (residual - residual.mean(0)).pow(2).sum(-1).mean()

    def loss_of(e: torch.Tensor) -> torch.Tensor:
        l2 = (residual - e).pow(2).sum(-1).mean()
        trainer.pre_norm_auxk_loss = l2.detach()
        loss: torch.Tensor = trainer.auxk_alpha * (l2 / away).nan_to_num(0.0)
        return loss

    k = min(trainer.top_k_aux, dead.numel())
    return of_dead_latents(adopted.step, done, dead, k, loss_of, relu=True)
