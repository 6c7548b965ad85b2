"""ReLU, JumpReLU and gated SAEs of SAELens and its transcoders, in training and at inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels import functional
from sae_kernels.integrations.density import Density
from sae_kernels.integrations.late import LateTensor
from sae_kernels.integrations.lazy_rules import by_token
from sae_kernels.integrations.patching import hooked
from sae_kernels.integrations.sae_lens.shared import hand_over, why_not

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes
    from sae_kernels.integrations.adapters import Installation

_UNMOVED = ("none", "expected_average_only_in", "covariance_whitening")
_MODES = ("step", "quadratic", "tanh")
Encoded = tuple[Any, LateTensor]


def install(installation: Installation) -> None:
    """Replaces encoders and losses of the architectures whose latents fire above a threshold.

    Their decoders are left alone: products with the codes are computed from the entries.
    """
    from sae_lens.saes import gated_sae, jumprelu_sae, standard_sae, transcoder

    ledger, rows, density = installation.ledger, installation.rows, Density()

    def relu(sae: Any, x: torch.Tensor) -> Encoded:
        sae_in = sae.process_sae_in(x)
        codes = functional.encode_threshold(sae_in, rows.of(sae.W_enc), sae.b_enc, 0.0)
        return _handed(installation, sae, sae_in, codes)

    def jumped(sae: Any, x: torch.Tensor) -> Encoded:
        sae_in = sae.process_sae_in(x)
        bounds = sae.threshold.detach().clamp(min=0)
        codes = functional.encode_threshold(sae_in, rows.of(sae.W_enc), sae.b_enc, bounds)
        return _handed(installation, sae, sae_in, codes)

    def jumping(sae: Any, x: torch.Tensor) -> Encoded:
        sae_in = sae.process_sae_in(x)
        lower = sae.threshold.detach() - sae.bandwidth / 2
        pre = functional.encode_threshold(sae_in, rows.of(sae.W_enc), sae.b_enc, lower)
        codes = functional.jumprelu(pre, sae.threshold, sae.bandwidth)
        if sae.cfg.jumprelu_ste_to_input:
            slope = _window(sae, pre) * functional.gather_by_latent(sae.threshold.detach(), pre)
            codes = codes.with_values(codes.values + _gradient_of(pre.values, slope))
        acts, late = _handed(installation, sae, sae_in, codes)
        late.entries = pre
        return acts, late

    def gated(sae: Any, x: torch.Tensor) -> Encoded:
        sae_in = sae.process_sae_in(x)
        product = functional.encode_threshold(
            sae_in, rows.of(sae.W_enc), None, -sae.b_gate.detach()
        )
        per_latent = (
            functional.gather_by_latent(each, product)
            for each in (sae.r_mag.exp(), sae.b_mag, sae.b_gate)
        )
        by, magnitude_bias, gate_bias = per_latent
        codes = product.with_values((product.values * by + magnitude_bias).relu())

        def pre(sae_in: Any, W_enc: Any, r_mag: Any, b_mag: Any) -> Any:
            return sae_in @ (W_enc * r_mag.exp()) + b_mag

        acts, late = hand_over(
            installation, sae, sae_in, codes, _no_columns, pre, sae.r_mag, sae.b_mag
        )
        late.entries = product.with_values(product.values + gate_bias)
        return acts, late

    def refused(sae: Any, x: torch.Tensor, served: tuple[type, ...]) -> str | None:
        why = why_not(installation, sae, served, x)
        if why is None and type(getattr(sae, "activation_fn", None)) is not torch.nn.ReLU:
            return f"activation_fn {type(sae.activation_fn).__name__}"
        return why

    def encoder(served: tuple[type, ...], encode_sparse: Any, *, trains: bool) -> Any:
        def make(original: Any) -> Any:
            def encode(self: Any, x: torch.Tensor) -> Any:
                if not installation.covers(self):
                    return original(self, x)
                what = f"{type(self).__name__}.{original.__name__}"
                why = refused(self, x, served)
                if why:
                    ledger.left(what, why)
                    return original(self, x)
                dense = density.why_dense(self)
                if dense:
                    ledger.left(what, dense, by_rule=True)
                    found = original(self, x)
                    density.saw(self, found[0] if trains else found)
                    return found
                ledger.took(what)
                acts, late = encode_sparse(self, x)
                density.saw(self, acts)
                acts = self.hook_sae_acts_post(acts)
                return (acts, late) if trains else acts

            return encode

        return make

    def jump_losses(original: Any) -> Any:
        def calculate_aux_loss(
            self: Any, step_input: Any, feature_acts: Any, hidden_pre: Any, sae_out: Any
        ) -> Any:
            mode = self.cfg.jumprelu_sparsity_loss_mode
            pre = hidden_pre.entries if isinstance(hidden_pre, LateTensor) else None
            if pre is None or mode not in _MODES or getattr(feature_acts, "entries", None) is None:
                return original(self, step_input, feature_acts, hidden_pre, sae_out)
            ledger.took(f"{type(self).__name__}.calculate_aux_loss")
            if mode == "tanh":
                norms = self.W_dec.norm(dim=1)
                scaled = self.cfg.jumprelu_tanh_scale * feature_acts * norms
                per_token = torch.tanh(scaled).sum(dim=-1)
            else:
                per_token = by_token(pre, _fired(self, pre))
                if mode == "quadratic":
                    target = self.cfg.target_l0
                    per_token = 2 / target * (per_token - target) ** 2
            losses = {"l0_loss": (step_input.coefficients["l0"] * per_token).mean()}
            if self.cfg.pre_act_loss_coefficient is not None:
                each = _dead_below(self, hidden_pre, step_input.dead_neuron_mask)
                losses["pre_act_loss"] = self.cfg.pre_act_loss_coefficient * each
            return losses

        return calculate_aux_loss

    def gate_losses(original: Any) -> Any:
        def calculate_aux_loss(
            self: Any, step_input: Any, feature_acts: Any, hidden_pre: Any, sae_out: Any
        ) -> Any:
            gates = hidden_pre.entries if isinstance(hidden_pre, LateTensor) else None
            # The loss takes its pre-activations from the bare input.
            moved = self.cfg.normalize_activations not in _UNMOVED or hooked(self.hook_sae_input)
            if gates is None or moved:
                return original(self, step_input, feature_acts, hidden_pre, sae_out)
            ledger.took(f"{type(self).__name__}.calculate_aux_loss")
            norms = functional.gather_by_latent(self.W_dec.norm(dim=1), gates)
            penalty = by_token(gates, gates.values * norms).mean()
            recons = functional.decode(gates, self.W_dec, self.b_dec).to(sae_out.dtype)
            error = (recons - step_input.sae_in).pow(2).sum(dim=-1).mean()
            penalty = step_input.coefficients["l1"] * penalty
            return {"l1_loss": penalty, "auxiliary_reconstruction_loss": error}

        return calculate_aux_loss

    replace = installation.patches.replace
    jump, gate = jumprelu_sae.JumpReLUTrainingSAE, gated_sae.GatedTrainingSAE
    for kind, encode_sparse in (
        (standard_sae.StandardTrainingSAE, relu),
        (jump, jumping),
        (gate, gated),
    ):
        replace(kind, "encode_with_hidden_pre", encoder((kind,), encode_sparse, trains=True))
    replace(jump, "calculate_aux_loss", jump_losses)
    replace(gate, "calculate_aux_loss", gate_losses)
    coders = transcoder.Transcoder, transcoder.SkipTranscoder
    jump_coders = transcoder.JumpReLUTranscoder, transcoder.JumpReLUSkipTranscoder
    for kinds, encode_sparse in (
        ((standard_sae.StandardSAE,), relu),
        ((jumprelu_sae.JumpReLUSAE,), jumped),
        ((gated_sae.GatedSAE,), gated),
        (coders, relu),
        (jump_coders, jumped),
    ):
        replace(kinds[0], "encode", encoder(kinds, encode_sparse, trains=False))


def _handed(installation: Installation, sae: Any, sae_in: torch.Tensor, codes: Any) -> Encoded:
    """Codes with the plain pre-activations, ``sae_in W_enc + b_enc``."""

    def pre(sae_in: Any, W_enc: Any, b_enc: Any) -> Any:
        return sae_in @ W_enc + b_enc

    def columns(latents: torch.Tensor) -> Any:
        return sae_in @ sae.W_enc.T[latents].T + sae.b_enc[latents]

    return hand_over(installation, sae, sae_in, codes, columns, pre, sae.b_enc)


def _no_columns(latents: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError("gated SAEs have no loss of single pre-activations")


def _window(sae: Any, pre: SparseCodes) -> torch.Tensor:
    """1 / bandwidth at entries within half a bandwidth of their threshold, else 0."""
    thresholds = functional.gather_by_latent(sae.threshold.detach(), pre)
    u = (pre.values.detach() - thresholds) / sae.bandwidth
    window: torch.Tensor = ((u > -0.5) & (u < 0.5)).to(u.dtype) / sae.bandwidth
    return window


def _gradient_of(values: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Zeros whose gradient with respect to the values is the slope."""
    return slope * (values - values.detach())


def _fired(sae: Any, pre: SparseCodes) -> torch.Tensor:
    """1 at entries above their threshold, with SAELens' gradient for the threshold (and h)."""
    fired = functional.heaviside_ste(pre, sae.threshold, sae.bandwidth)
    if sae.cfg.jumprelu_ste_to_input:
        fired = fired + _gradient_of(pre.values, _window(sae, pre))
    return fired


def _dead_below(sae: Any, hidden_pre: LateTensor, mask: Any) -> Any:
    """Of dead latents, how far they are below their threshold, weighted by decoder norms."""
    if mask is None or not mask.any():
        return sae.threshold.new_zeros(())
    dead = mask.nonzero()[:, 0]
    assert hidden_pre.columns is not None
    below = (sae.threshold[dead] - hidden_pre.columns(dead)).relu()
    return (below * sae.W_dec[dead].norm(dim=1)).sum(dim=-1).mean()
