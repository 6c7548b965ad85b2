"""SAELens at trainer level: SAETrainer's inner step on FusedStep."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.integrations.adopted import (
    AdoptedStep,
    of_dead_latents,
    why_not_adam,
    why_not_autocast,
)
from sae_kernels.integrations.late import LateTensor
from sae_kernels.integrations.lazy_codes import LazyCodes
from sae_kernels.integrations.patching import hooked
from sae_kernels.nn import BatchTopKConfig, BatchTopKSAE, TopKConfig, TopKSAE

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.integrations.adapters import Installation
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step import Differentiated, OutsideGradient

# What is replaced or relied on, and its code in the tested versions.
SEAMS = {
    "sae_lens.training.sae_trainer:SAETrainer._train_step": "176662fcd43e",
    "sae_lens.saes.sae:TrainStepOutput": "25ccfa9dc6c0",
    "sae_lens.saes.sae:TrainingSAE.training_forward_pass": "2cd7eb1dbed7",
    "sae_lens.saes.sae:SAE.process_sae_in": "39b3de67b090",
    "sae_lens.saes.sae:mse_loss": "90f915fd2ebb",
    "sae_lens.saes.topk_sae:TopK": "ecb41c0dc194",
    "sae_lens.saes.topk_sae:act_times_W_dec": "230344f02645",
    "sae_lens.saes.topk_sae:calculate_topk_aux_acts": "021b5b44afba",
    "sae_lens.saes.topk_sae:TopKTrainingSAE": "f4bbb54c5920",
    "sae_lens.saes.batchtopk_sae:BatchTopK": "fd6bf7c0c2e8",
    "sae_lens.saes.batchtopk_sae:BatchTopKTrainingSAE": "2f13a1a24484",
    "sae_lens.saes.matryoshka_batchtopk_sae:MatryoshkaBatchTopKTrainingSAE": "3682989fcfb8",
}
WHAT = "SAETrainer._train_step"
# What the inner step would call; an object or a class with its own is left to the library.
_OWN = ("training_forward_pass", "encode_with_hidden_pre", "decode", "calculate_aux_loss")


def install(installation: Installation) -> None:
    """Replaces the inner step of all SAETrainers, MultiSAETrainer's among them."""
    from sae_lens.saes.sae import TrainStepOutput
    from sae_lens.training.sae_trainer import SAETrainer

    steps: weakref.WeakKeyDictionary[Any, AdoptedStep] = weakref.WeakKeyDictionary()
    ledger = installation.ledger

    def replaced(original: Callable[..., Any]) -> Callable[..., Any]:
        def _train_step(self: Any, sae: Any, sae_in: torch.Tensor) -> Any:
            if not installation.covers(sae):
                return original(self, sae, sae_in)
            with self.autocast_if_enabled:
                why = _why_not(self, sae, sae_in) or installation.rows.why_not(sae.W_enc)
            if not ledger.takes(WHAT, why):
                return original(self, sae, sae_in)
            step = steps.get(self)
            if step is None or not step.serves(self.optimizer):
                step = steps[self] = _adopt(self, installation)
            return TrainStepOutput(**_trained(self, step, sae_in, installation))

        return _train_step

    installation.patches.replace(SAETrainer, "_train_step", replaced)


def _why_not(trainer: Any, sae: Any, x: torch.Tensor) -> str | None:
    """Why a step runs as shipped (its SAE at module level), or None."""
    from sae_lens.saes import sae as base
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
    from sae_lens.saes.topk_sae import TopKTrainingSAE
    from sae_lens.training.sae_trainer import SAETrainer

    kinds = (TopKTrainingSAE, BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE)
    if type(trainer) is not SAETrainer:
        return f"a trainer of class {type(trainer).__name__}"
    if type(sae) not in kinds:
        return f"an SAE of class {type(sae).__name__}"
    if sae is not trainer.sae:
        return "an SAE that is not the trainer's"
    own = [name for name in _OWN if name in vars(sae) or not _is_theirs(type(sae), name)]
    if own:
        return f"another {own[0]}"
    if sae.mse_loss_fn is not base.mse_loss:
        return "another mse_loss_fn"
    if any(hooked(point) for point in sae.hook_dict.values()):
        return "hooks on the SAE"
    cfg = sae.cfg
    if cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
        return f"normalize_activations {cfg.normalize_activations!r}"
    if cfg.use_sparse_activations:
        return "use_sparse_activations"
    if getattr(cfg, "use_matryoshka_aux_loss", False):
        return "use_matryoshka_aux_loss"
    if x.dim() != 2:
        return f"a batch of {x.dim()} dimensions"
    return why_not_adam(trainer.optimizer, sae) or why_not_autocast(x)


def _is_theirs(kind: type, name: str) -> bool:
    return str(getattr(kind, name).__module__).startswith("sae_lens.")


def _adopt(trainer: Any, installation: Installation) -> AdoptedStep:
    """FusedStep on a trainer's SAE and optimizer."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE

    theirs, cfg = trainer.sae, trainer.sae.cfg
    shared: dict[str, Any] = {
        "subtract_b_dec": bool(cfg.apply_b_dec_to_input),
        "unit_norm_decoder": False,
        "rank_by_decoder_norm": cfg.rescale_acts_by_decoder_norm,
        "k": theirs.activation_fn.k,
    }
    ends = list(getattr(cfg, "matryoshka_widths", ()))
    if ends:
        shared["groups"] = tuple(b - a for a, b in zip([0, *ends], ends, strict=False))
    sae: SparseAutoencoder
    with torch.device("meta"):
        if isinstance(theirs, BatchTopKTrainingSAE):
            sae = BatchTopKSAE(BatchTopKConfig(cfg.d_in, cfg.d_sae, **shared))
        else:
            sae = TopKSAE(TopKConfig(cfg.d_in, cfg.d_sae, **shared))
    objective = sae.objective_class(loss="mse", auxk_alpha=0.0, matryoshka="sum")
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    return AdoptedStep(
        sae,
        objective,
        weights={name: getattr(theirs, name) for name in names},
        turned=frozenset({"W_enc"}),
        optimizer=trainer.optimizer,
        rows=installation.rows,
        clip_norm=1.0,
        who="SAETrainer",
    )


def _trained(
    trainer: Any, step: AdoptedStep, sae_in: torch.Tensor, installation: Installation
) -> dict[str, Any]:
    """One training step; the fields of a TrainStepOutput."""
    sae, cfg = trainer.sae, trainer.sae.cfg
    sae.train()
    with trainer.autocast_if_enabled:
        done = step.differentiate(sae_in.to(sae.dtype), k=sae.activation_fn.k)
    assert done.preacts is not None
    norms = step.sae.rank_scale()
    values = done.preacts.values.relu()
    if norms is not None:
        values = values * norms[done.preacts.indices.long()]
    sae_out = sae_in + done.residual
    dead = trainer.dead_neurons.nonzero()[:, 0]
    outside = _auxiliary(step, done, dead, cfg) if dead.numel() else None

    trainer.n_forward_passes_since_fired += 1
    trainer.n_forward_passes_since_fired[done.fired > 0] = 0
    trainer.act_freq_scores += done.fired
    trainer.n_frac_active_samples += trainer.cfg.train_batch_size_samples
    metrics = {}
    if hasattr(sae, "update_topk_threshold"):
        sae.update_topk_threshold(values)  # looks for the smallest positive one alone
        metrics["topk_threshold"] = sae.topk_threshold

    def hidden(
        x: torch.Tensor, W_enc: torch.Tensor, b_enc: torch.Tensor, *rest: torch.Tensor
    ) -> torch.Tensor:
        h = x @ W_enc + b_enc
        return h if norms is None else h * norms

    with torch.no_grad():
        hidden_pre = LateTensor.of(
            (len(sae_in), cfg.d_sae),
            hidden,
            sae_in,
            sae.W_enc,
            sae.b_enc,
            ledger=installation.ledger,
        )
    result = step.update(done, outside)
    trainer.lr_scheduler.step()
    for scheduler in trainer.coefficient_schedulers.values():
        scheduler.step()

    per_token = (done.errors / done.n_tokens).reshape(-1)
    losses = {"mse_loss": per_token[-1], "auxiliary_reconstruction_loss": result.aux_loss}
    for width, error in zip(getattr(cfg, "matryoshka_widths", ())[:-1], per_token, strict=False):
        losses[f"inner_mse_loss_{width}"] = error
    return {
        "sae_in": sae_in,
        "sae_out": sae_out,
        "feature_acts": LazyCodes.of(done.preacts.with_values(values), installation.ledger),
        "hidden_pre": hidden_pre,
        "loss": result.loss,
        "losses": losses,
        "metrics": metrics,
    }


def _auxiliary(
    step: AdoptedStep, done: Differentiated, dead: torch.Tensor, cfg: Any
) -> OutsideGradient:
    """SAELens' auxiliary loss: no ReLU, no division by the residual's variance."""
    k = cfg.d_in // 2
    scale = min(dead.numel() / k, 1.0)
    residual = -done.residual

    def loss_of(e: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = cfg.aux_loss_coefficient * scale * (e - residual).pow(2).sum(-1).mean()
        return loss

    return of_dead_latents(step.step, done, dead, min(k, dead.numel()), loss_of, relu=False)
