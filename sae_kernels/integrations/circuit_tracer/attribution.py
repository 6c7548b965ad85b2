"""Attribution with circuit-tracer's cross-layer transcoders without a decoder vector per entry.

circuit-tracer holds a_s W_dec of every active feature, position and layer that it writes to: [n, D]
of nnz (L + 1) / 2 rows; in a backward pass it copies the gradient of every position as often as
features fire there, for all of a batch. Here rows are read a few positions at a time.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from sae_kernels import functional
from sae_kernels.codes import SparseCodes
from sae_kernels.integrations.patching import unfit

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.integrations.adapters import Installation

_AT_ONCE = 1 << 12  # decoder rows


class _Source(NamedTuple):
    """The active features of a layer: by position, then by number.

    Attributes:
        rows: [m, layers from this one on, D], decoders of some features.
        row: int64 [n], the row of each entry.
        positions: int64 [n].
        values: [n], activations.
        first: entries of the layers before.
    """

    rows: torch.Tensor
    row: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor
    first: int


class Decoders:
    """The decoder vectors of active features times their activations, [n, D], by output layer.

    In the place of circuit-tracer's tensor: an entry of ``[mask]`` for each feature and layer that
    it writes to, where the mask is that of one output layer.

    Args:
        clt: circuit-tracer's ``CrossLayerTranscoder``.
        features: its activations, coalesced sparse [L, n_pos, F].

    Attributes:
        locations: int64 [2, n], output layer and position of every vector.
        features: int64 [n], the entry of ``features`` that it belongs to.
    """

    def __init__(self, clt: Any, features: torch.Tensor) -> None:
        L, self.n_positions, _ = features.shape
        layers, positions, numbers = features.indices()
        ends = torch.bincount(layers, minlength=L).cumsum(0).tolist()
        self.sources, found = [], []
        for layer, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            entries = slice(first, end)
            rows, index = _rows(clt, layer, numbers[entries])
            values = features.values()[entries]
            self.sources.append(_Source(rows, index, positions[entries], values, first))
            targets = torch.arange(layer, L, device=layers.device)
            entry = torch.arange(first, end, device=layers.device).repeat_interleave(L - layer)
            where = positions[entries].repeat_interleave(L - layer)
            found.append(torch.stack([targets.repeat(end - first), where, entry]))
        self.locations, self.features = torch.cat(found, 1).split([2, 1])
        self.features = self.features[0]

    def __getitem__(self, mask: torch.Tensor) -> LayerDecoders:
        layer = int(self.locations[0][mask][0])
        return LayerDecoders(self.sources[: layer + 1], layer)

    def reconstruction(self, b_dec: torch.Tensor) -> torch.Tensor:
        """The outputs of all layers, [L, n_pos, D], in the dtype of b_dec."""
        total = b_dec.float()[:, None].repeat(1, self.n_positions, 1)
        for layer, source in enumerate(self.sources):
            counts = torch.bincount(source.positions, minlength=self.n_positions)
            offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
            index = source.row.to(torch.int32)
            codes = SparseCodes(source.values.float(), index, len(source.rows), offsets)
            if len(index):
                out = functional.decode(codes, source.rows.flatten(1))
                total[layer:] += out.view(self.n_positions, -1, b_dec.shape[1]).transpose(0, 1)
        return total.to(b_dec.dtype)


class LayerDecoders:
    """The decoder vectors of one output layer, source layer by source layer.

    Attributes:
        dtype: of the vectors.
    """

    def __init__(self, sources: list[_Source], layer: int) -> None:
        self.sources, self.layer = sources, layer
        self.dtype = sources[0].rows.dtype
        positions = torch.cat([source.positions for source in sources])
        self._order = positions.argsort(stable=True)
        self._positions = positions[self._order]
        self._values = torch.cat([source.values for source in sources])[self._order]

    def scores(self, grads: torch.Tensor) -> torch.Tensor:
        """The products of every vector with the gradients at its position.

        Args:
            grads: [batch, n_pos, D].

        Returns:
            [n, batch].
        """
        grads = grads.to(self.dtype)
        out = grads.new_empty(len(self._order), grads.shape[0])
        firsts = torch.searchsorted(
            self._positions, torch.arange(grads.shape[1] + 1, device=grads.device)
        ).tolist()
        position = 0
        while position < grads.shape[1]:
            first, end = firsts[position], position + 1
            while end < grads.shape[1] and firsts[end + 1] - first <= _AT_ONCE:
                end += 1
            vectors = self._vectors(slice(first, firsts[end]))
            for at in range(position, end):
                own = slice(firsts[at] - first, firsts[at + 1] - first)
                out[self._order[firsts[at] : firsts[at + 1]]] = vectors[own] @ grads[:, at].T
            position = end
        return out

    def _vectors(self, some: slice) -> torch.Tensor:
        """Vectors of entries in the order of positions."""
        entries = self._order[some]
        vectors = torch.empty(
            len(entries), self.sources[0].rows.shape[2], dtype=self.dtype, device=entries.device
        )
        for layer, source in enumerate(self.sources):
            own = (entries >= source.first) & (entries < source.first + len(source.row))
            rows = source.rows[source.row[entries[own] - source.first], self.layer - layer]
            vectors[own] = rows
        return vectors.mul_(self._values[some, None].to(self.dtype))


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
            decoders = Decoders(self, features)
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
    positions, values = codes.tokens.long(), codes.values.to(clt.dtype)
    silent = torch.zeros(x.shape[1], dtype=torch.bool, device=x.device)
    silent[zero_positions] = True
    kept = (values != 0) & ~silent[positions]
    return positions[kept], codes.indices[kept].long(), values[kept]


def _stacked(
    clt: Any, parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], x: torch.Tensor
) -> torch.Tensor:
    """The features of all layers as a coalesced sparse tensor [L, n_pos, F]."""
    positions, numbers, values = (torch.cat(each) for each in zip(*parts, strict=True))
    counts = torch.tensor([len(part[0]) for part in parts], device=x.device)
    layers = torch.arange(len(parts), device=x.device).repeat_interleave(counts)
    size = (len(parts), x.shape[1], clt.b_enc.shape[1])
    where = torch.stack([layers, positions, numbers])
    return torch.sparse_coo_tensor(where, values, size, check_invariants=False, is_coalesced=True)
