"""Attribution with circuit-tracer's cross-layer transcoders without a decoder vector per entry.

circuit-tracer holds a_s W_dec of every active feature, position and layer that it writes to: [n, D]
of nnz (L + 1) / 2 rows; in a backward pass it copies the gradient of every position as often as
features fire there, for all of a batch. Here rows are read a few positions at a time. And a batch
is one prompt repeated, whose attention is held as often; here once.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sae_kernels import functional
from sae_kernels.integrations.patching import unfit
from sae_kernels.nn.layer_features import Decoders, LayerDecoders, active_entries, sparse_features

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.integrations.adapters import Installation


class Encoders:
    """Encoder vectors of active features, read when they are asked for: ``[entries]`` is [n, D]."""

    def __init__(self, W_enc: torch.Tensor, features: torch.Tensor) -> None:
        self._W_enc, (self._layers, _, self._numbers) = W_enc, features.indices()

    def __getitem__(self, entries: torch.Tensor) -> torch.Tensor:
        return self._W_enc[self._layers[entries], self._numbers[entries]]


def _rows(clt: Any, layer: int, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Decoders of a layer's features and the row of each entry in them."""
    if clt.lazy_decoder:
        some, index = numbers.unique(return_inverse=True)
        return clt._get_decoder_vectors(layer, some), index
    return clt.W_dec[layer].detach().to(clt.dtype), numbers


def encode_sparse(installation: Installation) -> Callable[..., Any]:
    """Makes ``CrossLayerTranscoder.encode_sparse(x, zero_positions)``."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def encode(self: Any, x: torch.Tensor, zero_positions: slice = slice(0, 1)) -> Any:
            if not _takes(installation, self, "encode", x):
                return original(self, x, zero_positions)
            features, vectors = [], []
            for layer in range(self.n_layers):
                W_enc = self._get_encoder_weights(layer)
                features.append(_features(self, x, layer, W_enc, zero_positions))
                vectors.append(W_enc[features[-1][1]])
            return _stacked(self, features, x), torch.cat(vectors)

        return encode

    return make


def components(installation: Installation) -> Callable[..., Any]:
    """Makes ``CrossLayerTranscoder.compute_attribution_components(inputs, zero_positions)``."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def compute(self: Any, inputs: torch.Tensor, zero_positions: slice = slice(0, 1)) -> Any:
            if not _takes(installation, self, "attribution", inputs):
                return original(self, inputs, zero_positions)
            if self.lazy_encoder:
                features, encoders = self.encode_sparse(inputs, zero_positions)
            else:
                W_enc = self.W_enc.detach()
                parts = [
                    _features(self, inputs, layer, W_enc[layer], zero_positions)
                    for layer in range(self.n_layers)
                ]
                features = _stacked(self, parts, inputs)
                encoders = Encoders(W_enc, features)
            rows = functools.partial(_rows, self)
            decoders = Decoders(features, rows, range(self.n_layers))
            reconstruction = decoders.reconstruction(self.b_dec.detach())
            if self.W_skip is not None:
                reconstruction = reconstruction + inputs @ self.W_skip
            return {
                "activation_matrix": features,
                "reconstruction": reconstruction,
                "encoder_vecs": encoders,
                "decoder_vecs": decoders,
                "encoder_to_decoder_map": decoders.features,
                "decoder_locations": decoders.locations,
            }

        return torch.no_grad()(compute)

    return make


def forward_pass(installation: Installation) -> Callable[..., Any]:
    """Makes TransformerLens' ``run_forward_pass(input_ids, batch_size, ctx)``.

    The batch is one prompt repeated and attention is frozen, so one pattern [1, H, n_pos, n_pos]
    serves all of it: it reads the values of the batch side by side, as if heads were wider.
    """

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: Any, input_ids: torch.Tensor, batch_size: int, ctx: Any) -> None:
            if not installation.covers(self.transcoders):
                original(self, input_ids, batch_size, ctx)
                return

            def first(x: torch.Tensor, hook: Any) -> torch.Tensor:
                return x[:1]

            def side_by_side(v: torch.Tensor, hook: Any) -> torch.Tensor:
                return v.movedim(0, 2).flatten(2)[None]  # [1, n_pos, H, B d_head]

            def apart(z: torch.Tensor, hook: Any) -> torch.Tensor:
                each: torch.Tensor = z[0].unflatten(2, (batch_size, -1)).movedim(2, 0)
                return each.contiguous()

            made = {"q": first, "k": first, "pattern": first, "v": side_by_side, "z": apart}
            hooks = [
                (f"blocks.{layer}.attn.hook_{name}", hook)
                for layer in range(self.cfg.n_layers)
                for name, hook in made.items()
            ]
            with self.hooks(fwd_hooks=hooks):
                original(self, input_ids, batch_size, ctx)

        return run

    return make


def score_hook(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes TransformerLens' ``AttributionContext._compute_score_hook``."""

    def make_hook(
        self: Any, hook_name: str, output_vecs: Any, write_index: Any, read_index: Any = np.s_[:]
    ) -> tuple[str, Callable[..., None]]:
        if not isinstance(output_vecs, LayerDecoders):
            made: tuple[str, Callable[..., None]] = original(
                self, hook_name, output_vecs, write_index, read_index
            )
            return made
        context = weakref.proxy(self)

        def add(grads: torch.Tensor, hook: Any) -> None:
            context._batch_buffer[write_index] += output_vecs.scores(grads)

        return hook_name, add

    return make_hook


def score(original: Callable[..., Any]) -> Callable[..., Any]:
    """Makes nnsight's ``AttributionContext.compute_score``."""

    def compute_score(
        self: Any,
        grads: torch.Tensor,
        output_vecs: Any,
        write_index: Any,
        read_index: Any = np.s_[:],
    ) -> None:
        if not isinstance(output_vecs, LayerDecoders):
            original(self, grads, output_vecs, write_index, read_index)
            return
        self._batch_buffer[write_index] += output_vecs.scores(grads)

    return compute_score


def _takes(installation: Installation, clt: Any, what: str, x: torch.Tensor) -> bool:
    """Whether a call runs here; counted."""
    if not installation.covers(clt):
        return False
    why = unfit(x, clt.b_enc)
    if why is None and x.dtype != clt.dtype:
        why = f"activations of {x.dtype} for weights of {clt.dtype}"
    return installation.ledger.takes(what, why)


def _features(
    clt: Any, x: torch.Tensor, layer: int, W_enc: torch.Tensor, zero_positions: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, numbers and activations of a layer's active features."""
    jump = getattr(clt.activation_function, "threshold", None)
    threshold = 0.0 if jump is None else jump[layer].flatten()
    codes = functional.encode_threshold(
        x[layer].detach(), W_enc.detach(), clt.b_enc[layer].detach(), threshold
    )
    return active_entries(codes.with_values(codes.values.to(clt.dtype)), zero_positions)


def _stacked(
    clt: Any, parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], x: torch.Tensor
) -> torch.Tensor:
    """The features of all layers as a coalesced sparse tensor [L, n_pos, F]."""
    positions, numbers, values = (torch.cat(each) for each in zip(*parts, strict=True))
    counts = torch.tensor([len(part[0]) for part in parts], device=x.device)
    layers = torch.arange(len(parts), device=x.device).repeat_interleave(counts)
    size = (len(parts), x.shape[1], clt.b_enc.shape[1])
    return sparse_features(layers, positions, numbers, values, size)
