"""TopK, BatchTopK and Matryoshka BatchTopK of SAELens, in training and at inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels import functional
from sae_kernels.integrations.late import LateTensor, version_of
from sae_kernels.integrations.sae_lens.shared import hand_over, why_not

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sae_kernels.codes import SparseCodes
    from sae_kernels.integrations.adapters import Installation
    from sae_kernels.integrations.lazy_codes import LazyCodes

_SPACES = ("constant_norm_rescale", "layer_norm")  # where SAELens refuses AuxK


def install(installation: Installation) -> None:
    """Replaces encoders, decoders and the auxiliary loss of the TopK family."""
    from sae_lens.saes import batchtopk_sae, matryoshka_batchtopk_sae, topk_sae

    replace, ledger = installation.patches.replace, installation.ledger
    matryoshka = matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE
    selections: dict[type, Any] = {
        topk_sae.TopKSAE: topk_sae.TopK,
        topk_sae.TopKTrainingSAE: topk_sae.TopK,
        batchtopk_sae.BatchTopKTrainingSAE: batchtopk_sae.BatchTopK,
        matryoshka: batchtopk_sae.BatchTopK,
    }

    def refused(sae: Any, x: torch.Tensor) -> str | None:
        why = why_not(installation, sae, selections, x)
        if why:
            return why
        activation: Any = sae.activation_fn
        if type(activation) is not selections[type(sae)]:
            return f"activation_fn {type(activation).__name__}"
        if getattr(activation, "use_sparse_activations", False):
            return "use_sparse_activations"
        n_latents = sae.W_enc.shape[1]
        if not isinstance(activation.k, (int, float)) or not 0 < activation.k <= n_latents:
            return f"k = {activation.k} of {n_latents} latents"
        return None

    def encoded(sae: Any, x: torch.Tensor) -> tuple[LazyCodes, LateTensor]:
        sae_in = sae.process_sae_in(x)
        scaled = sae.cfg.rescale_acts_by_decoder_norm
        norms = sae.W_dec.norm(dim=-1) if scaled else None
        rows, k = installation.rows.of(sae.W_enc), sae.activation_fn.k
        batch = type(sae.activation_fn) is batchtopk_sae.BatchTopK
        encode: Any = functional.encode_batch_topk if batch else functional.encode_topk
        rank_scale = None if norms is None else norms.detach()
        unscaled = encode(sae_in, rows, sae.b_enc, k, rank_scale=rank_scale)
        codes = unscaled
        if norms is not None:
            # Through the norms too: a loss on the codes themselves has a gradient there.
            by_norm = functional.gather_by_latent(norms, unscaled)
            codes = unscaled.with_values(unscaled.values * by_norm)

        def pre(sae_in: Any, W_enc: Any, b_enc: Any, *W_dec: Any) -> Any:
            hidden = sae_in @ W_enc + b_enc
            return hidden * W_dec[0].norm(dim=-1) if W_dec else hidden

        def columns(latents: torch.Tensor) -> Any:
            hidden = sae_in @ rows[latents].T + sae.b_enc[latents]
            return hidden if norms is None else hidden * norms[latents]

        inputs = (sae.b_enc, sae.W_dec) if scaled else (sae.b_enc,)
        acts, late = hand_over(installation, sae, sae_in, codes, columns, pre, *inputs)
        acts.note = _Unscaled(unscaled, sae.W_dec)
        return sae.hook_sae_acts_post(acts), late

    def encoding(original: Any) -> Any:
        trains = original.__name__ == "encode_with_hidden_pre"  # it returns both

        def encode(self: Any, x: torch.Tensor) -> Any:
            if not installation.covers(self):
                return original(self, x)
            if not ledger.takes(f"{type(self).__name__}.{original.__name__}", refused(self, x)):
                return original(self, x)
            acts, late = encoded(self, x)
            return (acts, late) if trains else acts

        return encode

    def unscaled_of(sae: Any, acts: Any) -> _Unscaled | None:
        """What the decoder multiplies, of codes as the encoder of this SAE returned them."""
        note = getattr(acts, "note", None)
        if not isinstance(note, _Unscaled) or acts.entries is None or not note.of(sae.W_dec):
            return None
        acts._used = acts._used or acts.requires_grad
        return note

    def decoding(original: Any) -> Any:
        def decode(self: Any, feature_acts: torch.Tensor) -> Any:
            unscaled = unscaled_of(self, feature_acts)
            if unscaled is None:  # dense codes, or changed ones: products of entries where they are
                return original(self, feature_acts)
            ledger.took(f"{type(self).__name__}.decode")
            if type(self) is matryoshka and torch.is_grad_enabled():
                out = unscaled.decoded(self)[-1]  # the shorter prefixes have losses too
            else:
                out = functional.decode(unscaled.codes, self.W_dec, self.b_dec)
            out = out.to(feature_acts.dtype)
            out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(out))
            return self.reshape_fn_out(out, self.d_head)

        return decode

    def auxiliary(original: Any) -> Any:
        def calculate_topk_aux_loss(
            self: Any, sae_in: Any, sae_out: Any, hidden_pre: Any, dead_neuron_mask: Any
        ) -> Any:
            late = isinstance(hidden_pre, LateTensor) and hidden_pre.columns is not None
            if not late or dead_neuron_mask is None or self.cfg.normalize_activations in _SPACES:
                return original(self, sae_in, sae_out, hidden_pre, dead_neuron_mask)
            dead = dead_neuron_mask.nonzero()[:, 0]
            if dead.numel() == 0:
                return sae_out.new_tensor(0.0)
            ledger.took(f"{type(self).__name__}.calculate_topk_aux_loss")
            width = sae_in.shape[-1] // 2
            acts = _largest(hidden_pre.columns(dead), min(width, dead.numel()))
            W = self.W_dec[dead]
            if self.cfg.rescale_acts_by_decoder_norm:
                acts = acts * (1 / W.norm(dim=-1))
            recons = self.reshape_fn_out(acts @ W, self.d_head)
            loss = (recons - (sae_in - sae_out).detach()).pow(2).sum(dim=-1).mean()
            return self.cfg.aux_loss_coefficient * min(dead.numel() / width, 1.0) * loss

        return calculate_topk_aux_loss

    def prefixes(original: Any) -> Any:
        def _iterable_decode(
            self: Any, feature_acts: Any, include_outer_loss: bool = False
        ) -> Iterator[tuple[int, torch.Tensor]]:
            unscaled = unscaled_of(self, feature_acts)
            if unscaled is None or feature_acts.dim() != 2:
                yield from original(self, feature_acts, include_outer_loss)
                return
            ledger.took(f"{type(self).__name__}._iterable_decode")
            widths = self.cfg.matryoshka_widths
            wanted = widths if include_outer_loss else widths[:-1]
            for width, part in zip(wanted, unscaled.decoded(self), strict=False):
                yield width, self.run_time_activation_norm_fn_out(part.to(feature_acts.dtype))

        return _iterable_decode

    replace(topk_sae.TopKSAE, "encode", encoding)
    replace(topk_sae.TopKSAE, "decode", decoding)
    replace(topk_sae.TopKTrainingSAE, "encode_with_hidden_pre", encoding)
    replace(topk_sae.TopKTrainingSAE, "decode", decoding)
    replace(topk_sae.TopKTrainingSAE, "calculate_topk_aux_loss", auxiliary)
    replace(matryoshka, "_iterable_decode", prefixes)


class _Unscaled:
    """What a decoder multiplies in place of codes that are scaled by its norms: there they cancel.

    Only in that decoder, and as long as it is the same.
    """

    def __init__(self, codes: SparseCodes, W_dec: torch.Tensor) -> None:
        self.codes = codes
        self._W_dec, self._version = W_dec, version_of(W_dec)
        self._prefixes: tuple[bool, tuple[torch.Tensor, ...]] | None = None

    def of(self, W_dec: torch.Tensor) -> bool:
        """Whether this is the decoder that the codes were scaled by."""
        return W_dec is self._W_dec and version_of(W_dec) == self._version

    def decoded(self, sae: Any) -> tuple[torch.Tensor, ...]:
        """The reconstructions of all prefixes of a Matryoshka SAE, the whole last; made once."""
        grad = torch.is_grad_enabled()
        if self._prefixes is None or self._prefixes[0] != grad:
            ends = torch.tensor(sae.cfg.matryoshka_widths, dtype=torch.int32)
            ends = ends.to(sae.W_dec.device)
            parts = functional.decode(self.codes, sae.W_dec, sae.b_dec, group_ends=ends)
            self._prefixes = grad, parts.unbind(0)
        return self._prefixes[1]


def _largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row, zeros elsewhere."""
    top = values.topk(k, sorted=False)
    return torch.zeros_like(values).scatter(-1, top.indices, top.values)
