"""dictionary_learning's ReLU, gated and JumpReLU dictionaries on the kernels.

While many latents fire (:class:`~sae_kernels.integrations.density.Density`) they run as shipped.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_kernels import functional
from sae_kernels.functional.recording import autocast_dtype
from sae_kernels.integrations.density import Density
from sae_kernels.integrations.dictionary_learning.module import why_not
from sae_kernels.integrations.lazy_codes import LazyCodes
from sae_kernels.integrations.lazy_rules import by_token

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from sae_kernels.codes import SparseCodes
    from sae_kernels.integrations.adapters import Installation

# What is replaced or relied on, and its code in the tested versions.
_CODE = {
    "dictionary:AutoEncoder.encode": "7d1ac5efc8a5",
    "dictionary:AutoEncoder.decode": "d2fe6912e047",
    "dictionary:AutoEncoderNew.encode": "d2767a752c0b",
    "dictionary:GatedAutoEncoder.encode": "979b5a147703",
    "dictionary:GatedAutoEncoder.decode": "d8a7291cd552",
    "dictionary:JumpReluAutoEncoder.encode": "055aeb0052ae",
    "dictionary:JumpReluAutoEncoder.decode": "6c0178c5de82",
    "trainers.jumprelu:JumpReluTrainer.loss": "17ab1061c2b3",
    "trainers.jumprelu:JumpReLUFunction": "d96d72683e46",
    "trainers.jumprelu:StepFunction": "059c07b76981",
    "trainers.jumprelu:RectangleFunction": "57ace048d1a2",
}
SEAMS = {f"dictionary_learning.{seam}": code for seam, code in _CODE.items()}


def install(installation: Installation) -> None:
    """Replaces the encoders, and the loss of JumpReLU, whose penalty reads all latents."""
    kinds = importlib.import_module("dictionary_learning.dictionary")
    jump = importlib.import_module("dictionary_learning.trainers.jumprelu").JumpReluTrainer
    one = _Threshold(installation, Density())
    replace = installation.patches.replace
    replace(kinds.AutoEncoder, "encode", one.relu(kinds.AutoEncoder))
    replace(kinds.AutoEncoderNew, "encode", one.relu(kinds.AutoEncoderNew))
    replace(kinds.GatedAutoEncoder, "encode", one.gated(kinds.GatedAutoEncoder))
    replace(kinds.JumpReluAutoEncoder, "encode", one.jump(kinds.JumpReluAutoEncoder))
    replace(kinds.JumpReluAutoEncoder, "decode", one.watched)
    replace(jump, "loss", one.jump_loss(kinds.JumpReluAutoEncoder))


class JumpLog(NamedTuple):
    """What JumpReluTrainer's ``loss`` returns for its log."""

    x: torch.Tensor
    recon: torch.Tensor
    f: torch.Tensor
    losses: dict[str, float]


class _Threshold:
    """Makers of the replacements."""

    def __init__(self, installation: Installation, density: Density) -> None:
        self.installation, self.density = installation, density
        self.rows, self.ledger = installation.rows, installation.ledger

    def takes(self, what: str, ae: Any, served: type, x: torch.Tensor, why: str | None) -> bool:
        """Whether a call runs on the kernels; counts it either way."""
        why = why or why_not(self.installation, ae, served, x)
        if why:
            self.ledger.left(what, why)
            return False
        dense = self.density.why_dense(ae)
        if dense:
            self.ledger.left(what, dense, by_rule=True)
            return False
        self.ledger.took(what)
        return True

    def handed(self, ae: Any, codes: SparseCodes, x: torch.Tensor) -> LazyCodes:
        """Codes as ``encode`` returns them, in its dtype."""
        values = codes.values.to(autocast_dtype(x) or x.dtype)
        acts = LazyCodes.of(codes.with_values(values), self.ledger)
        self.density.saw(ae, acts)
        if hasattr(ae, "decoder"):
            self.rows.of(ae.decoder.weight)  # as the decoder's product will read it
        return acts

    def relu(self, served: type) -> Callable[..., Any]:
        """``AutoEncoder.encode`` and ``AutoEncoderNew.encode``."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def encode(ae: Any, x: torch.Tensor) -> torch.Tensor:
                acts: torch.Tensor
                if not self.installation.covers(ae):
                    acts = original(ae, x)
                elif self.takes(f"{served.__name__}.encode", ae, served, x, None):
                    W, b = self.rows.straight(ae.encoder.weight), ae.encoder.bias
                    b_dec = getattr(ae, "bias", None)
                    codes = functional.encode_threshold(x, W, b, 0.0, b_dec=b_dec)
                    acts = self.handed(ae, codes, x)
                else:
                    acts = original(ae, x)
                    self.density.saw(ae, acts)
                return acts

            return encode

        return make

    def gated(self, served: type) -> Callable[..., Any]:
        """``GatedAutoEncoder.encode``: kept is what the gate opens for."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def encode(
                ae: Any,
                x: torch.Tensor,
                return_gate: bool = False,
                normalize_decoder: bool = False,
            ) -> Any:
                if not self.installation.covers(ae):
                    return original(ae, x, return_gate, normalize_decoder)
                why = "normalize_decoder" if normalize_decoder else None
                if not self.takes("GatedAutoEncoder.encode", ae, served, x, why):
                    found = original(ae, x, return_gate, normalize_decoder)
                    self.density.saw(ae, found[1] if return_gate else found)
                    return found
                bound = -ae.gate_bias.detach()
                W, b_dec = self.rows.straight(ae.encoder.weight), ae.decoder_bias
                product = functional.encode_threshold(x, W, None, bound, b_dec=b_dec)
                by, bias, gate_bias = (
                    functional.gather_by_latent(each, product)
                    for each in (ae.r_mag.exp(), ae.mag_bias, ae.gate_bias)
                )
                codes = product.with_values((product.values * by + bias).relu())
                acts = self.handed(ae, codes, x)
                if not return_gate:
                    return acts
                gates = product.with_values(product.values + gate_bias)
                return acts, self.handed(ae, gates, x)

            return encode

        return make

    def jump(self, served: type) -> Callable[..., Any]:
        """``JumpReluAutoEncoder.encode``."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def encode(ae: Any, x: torch.Tensor, output_pre_jump: bool = False) -> Any:
                if not self.installation.covers(ae):
                    return original(ae, x, output_pre_jump)
                why = "all pre-activations are asked for" if output_pre_jump else None
                if not self.takes("JumpReluAutoEncoder.encode", ae, served, x, why):
                    found = original(ae, x, output_pre_jump)
                    self.density.saw(ae, found[0] if output_pre_jump else found)
                    return found
                b_dec = ae.b_dec if ae.apply_b_dec_to_input else None
                bound = ae.threshold.detach().clamp(min=0)
                W = self.rows.of(ae.W_enc)
                codes = functional.encode_threshold(x, W, ae.b_enc, bound, b_dec=b_dec)
                return self.handed(ae, codes, x)

            return encode

        return make

    def watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """``JumpReluAutoEncoder.decode``, which tells how many latents of a dense loss fired."""

        def decode(ae: Any, f: torch.Tensor) -> torch.Tensor:
            if self.installation.covers(ae):
                self.density.saw(ae, f)
            found: torch.Tensor = original(ae, f)
            return found

        return decode

    def jump_loss(self, served: type) -> Callable[..., Any]:
        """``JumpReluTrainer.loss``; the step of its penalty is taken of what the jump left."""

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def loss(
                trainer: Any, x: torch.Tensor, step: int, logging: bool = False, **rest: Any
            ) -> Any:
                ae, width = trainer.ae, trainer.bandwidth
                if not self.installation.covers(ae):
                    return original(trainer, x, step, logging, **rest)
                why = f"a batch of {x.dim()} dimensions" if x.dim() != 2 else None
                lower = ae.threshold.detach() - width / 2
                if not bool((lower > 0).all()):  # latents of value 0 would be in its window
                    why = "thresholds below half of the bandwidth"
                if not self.takes("JumpReluTrainer.loss", ae, served, x, why):
                    return original(trainer, x, step, logging, **rest)
                x = x.to(ae.W_enc.dtype)
                W = self.rows.of(ae.W_enc)
                pre = functional.encode_threshold(x, W, ae.b_enc, lower)
                codes = functional.jumprelu(pre, ae.threshold, width)
                f = self.handed(ae, codes, x)
                trainer.num_tokens_since_fired += x.size(0)
                trainer.num_tokens_since_fired[f.sum(0) > 0] = 0
                silent = trainer.num_tokens_since_fired > trainer.dead_feature_threshold
                trainer.dead_features = int(silent.sum())
                recon = ae.decode(f)
                error = (x - recon).pow(2).sum(dim=-1).mean()
                l0 = by_token(codes, functional.heaviside_ste(codes, ae.threshold, width)).mean()
                away = (l0 / trainer.target_l0 - 1).pow(2)
                scale = trainer.sparsity_coefficient * trainer.sparsity_warmup_fn(step)
                total = error + scale * away
                if not logging:
                    return total
                return JumpLog(x, recon, f, {"l2_loss": error.item(), "loss": total.item()})

            return loss

        return make
