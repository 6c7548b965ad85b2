"""What training steps under autograd share, whatever their loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels import functional
from sae_kernels.step import auxk
from sae_kernels.step.objective import Facts, main_codes, needs_norms
from sae_kernels.step.state import State, matched

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step.dead import DeadLatents
    from sae_kernels.step.objective import Objective, Prefixes, Reconstruction


def facts(
    sae: SparseAutoencoder, config: TrainConfig, x: torch.Tensor, k: float, dead: DeadLatents
) -> Facts:
    """What the objective is told of tokens [B, input width], differentiable."""
    norms, sums, mask = None, None, None
    if needs_norms(config):
        norms = sae.W_dec.unflatten(1, (sae.config.n_layers, -1)).norm(dim=2)
    if config.preact_coefficient:
        mask = dead.mask()
        sums = sae.W_enc @ sae.centred(x).sum(0) + x.shape[0] * sae.b_enc
    return Facts(x.shape[0], k, norms, sums, mask)


def reconstruct(
    sae: SparseAutoencoder,
    pre: SparseCodes,
    part: Reconstruction,
    x: torch.Tensor,
    ends: Prefixes | None,
) -> torch.Tensor:
    """[B, output width] in the scale of training, or of each prefix [G, B, output width]."""
    stop = (lambda t: t) if part.trains_decoder else torch.Tensor.detach
    x_hat = functional.decode(
        pre.with_values(part.values),
        stop(sae.W_dec),
        stop(sae.b_dec),
        group_ends=None if ends is None else ends.ends,
        compute_dtype=sae.compute_dtype,
        backend=sae.backend,
    )
    return x_hat + x @ stop(sae.W_skip).T if sae.config.skip else x_hat


def squared_error(e: torch.Tensor, ends: Prefixes | None) -> torch.Tensor:
    """The sum over all tokens; those of prefixes by their weights."""
    squares = e.square().sum((-1, -2))
    return squares if ends is None else (ends.weights * squares).sum()


def aux_loss(
    sae: SparseAutoencoder,
    config: TrainConfig,
    dead: DeadLatents,
    x: torch.Tensor,
    residual: torch.Tensor,
) -> torch.Tensor:
    """AuxK: how the dead latents alone reconstruct the residual; 0 where there are none."""
    latents = dead.longest(config.auxk_latents if config.auxk_alpha else 0)
    if not latents.numel():
        return x.new_zeros(())
    rows = auxk.DeadRows(sae.W_enc[latents], sae.b_enc[latents], sae.W_dec[latents])
    k_aux = auxk.latents_per_token(sae, config)
    dtype = sae.compute_dtype or sae.W_enc.dtype
    return auxk.loss(sae.centred(x), residual, rows, k_aux, config.auxk_alpha, dtype, sae.backend)


def adam(sae: SparseAutoencoder, config: TrainConfig) -> torch.optim.Adam:
    """The optimizer of :func:`update`, which sets the learning rate."""
    betas = (config.beta1, config.beta2)
    return torch.optim.Adam(sae.parameters(), lr=1.0, betas=betas, eps=config.eps, fused=True)


def adam_state(optimizer: torch.optim.Optimizer) -> State:
    """The optimizer's moments; none before its first step."""
    saved = optimizer.state_dict()["state"]
    moments = {f"adam.{i}.{key}": t for i, each in saved.items() for key, t in each.items()}
    return State(moments, {})


def load_adam_state(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Takes up what :func:`adam_state` gave.

    Raises:
        DataError: moments of other shapes than the parameters.
    """
    saved: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in state.tensors.items():
        if name.startswith("adam."):
            _, number, key = name.split(".", 2)
            saved.setdefault(int(number), {})[key] = tensor.clone()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i in saved:
        for key in ("exp_avg", "exp_avg_sq"):
            matched(f"adam.{i}.{key}", parameters[i], state)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": saved, "param_groups": groups})


def update(
    sae: SparseAutoencoder,
    optimizer: torch.optim.Optimizer,
    loss: torch.Tensor,
    lr: float,
    clip_norm: float | None,
) -> torch.Tensor:
    """The optimizer's step, unless something is not finite; whether it is.

    The gradients' norm is looked at where ``clip_norm`` is given; infinity clips nothing.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if sae.config.unit_norm_decoder:
        sae.remove_parallel_gradient_()
    finite = loss.detach().isfinite()
    if clip_norm is not None:
        norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), clip_norm)
        finite = finite & norm.isfinite()
    if finite:
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        if sae.config.unit_norm_decoder:
            sae.normalize_decoder_()
    return finite


def fired(
    sae: SparseAutoencoder, config: TrainConfig, pre: SparseCodes, aim: Objective, k: float
) -> torch.Tensor:
    """How often each latent fired, int [F], by the main reconstruction's codes."""
    main = main_codes(pre, aim.reconstructions[0].values.detach(), k, config)
    return main.latent_order(drop_zeros=sae.drops_zeros, backend=sae.backend).counts()
