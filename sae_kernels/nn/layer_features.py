"""Active features of cross-layer transcoders as attribution graphs read them, layer by layer.

A feature is a latent by the layer that it reads and its number there. Its decoder vectors, one for
each layer that it writes to, are read a few positions at a time: [entries, layers, width] is never
made. The calls are those that circuit-tracer's attribution makes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels import functional
from sae_kernels.codes import SparseCodes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Rows = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]

_AT_ONCE = 1 << 12  # decoder rows


class LayerFeatures:
    """Methods of a cross-layer architecture about the active features of a prompt.

    Activations are [n_layers, n_pos, width], raw, of one prompt.
    """

    def layer_decoders(self: Any, layer: int, numbers: torch.Tensor | None = None) -> torch.Tensor:
        """The decoder rows of a layer's features, [n, layers they write to, width].

        Args:
            layer: that they read.
            numbers: int64 [n], which of them; None is all.
        """
        config = self.config
        own = slice(layer * config.layer_latents, (layer + 1) * config.layer_latents)
        some = slice(None) if numbers is None else numbers
        parts = self.W_dec.split(config.writers)[_first_written(config, layer) :]
        rows: torch.Tensor = torch.stack([part[own][some] for part in parts], 1)
        return rows if self.target_scale == 1 else rows / self.target_scale

    @torch.no_grad()
    def encode_sparse(
        self: Any, x: torch.Tensor, zero_positions: slice = slice(0, 1)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The active features of a prompt, and their encoder rows.

        Args:
            x: [n_layers, n_pos, d_in].
            zero_positions: positions whose features count as silent.

        Returns:
            Coalesced sparse [n_layers, n_pos, features of a layer], and [nnz, d_in].

        Raises:
            ValueError: x of another shape.

        Example:
            >>> from sae_kernels.nn import CrossLayerTopK
            >>> clt = CrossLayerTopK(8, 3 * 32, n_layers=3, d_out=8, k=4)
            >>> features, encoders = clt.encode_sparse(torch.randn(3, 5, 8))
            >>> features.shape, encoders.shape[1]
            (torch.Size([3, 5, 32]), 8)
        """
        config = self.config
        if x.dim() != 3 or (x.shape[0], x.shape[2]) != (config.n_layers, config.d_in):
            raise ValueError(
                f"x: expected shape [{config.n_layers}, n_pos, {config.d_in}] (the layers of a "
                f"prompt), got {list(x.shape)}"
            )
        features = self.layer_features(self.encode(x.transpose(0, 1).flatten(1)), zero_positions)
        layers, _, numbers = features.indices()
        encoders = self.W_enc[layers * config.layer_latents + numbers] * config.activation_scale
        return features, encoders

    def layer_features(
        self: Any, codes: SparseCodes, zero_positions: slice = slice(0)
    ) -> torch.Tensor:
        """Codes of a prompt's tokens as sparse [n_layers, n_pos, features of a layer]."""
        config, codes = self.config, codes.flat()
        positions, latents, values = active_entries(codes, zero_positions)
        layers, numbers = latents // config.layer_latents, latents % config.layer_latents
        size = (config.n_layers, codes.batch_shape[0], config.layer_latents)
        return sparse_features(layers, positions, numbers, values, size)

    @torch.no_grad()
    def select_decoder_vectors(
        self: Any, features: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Decoders, torch.Tensor]:
        """The decoder vectors of active features times their values, one for each layer written.

        Args:
            features: of :meth:`encode_sparse`.

        Returns:
            Positions, written layers and numbers of the n vectors, int64 [n]; the vectors; and the
            entry of ``features`` that each belongs to.
        """

        def rows(layer: int, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            some, index = numbers.unique(return_inverse=True)
            return self.layer_decoders(layer, some), index

        starts = [_first_written(self.config, layer) for layer in range(self.config.n_layers)]
        found = Decoders(features.coalesce(), rows, starts)
        layers, positions = found.locations
        return positions, layers, found.numbers, found, found.features

    @torch.no_grad()
    def compute_reconstruction(
        self: Any, positions: torch.Tensor, layers: torch.Tensor, decoders: Decoders
    ) -> torch.Tensor:
        """The outputs of all layers, [n_layers, n_pos, width], of :meth:`select_decoder_vectors`.

        Positions and layers are not read, as the vectors know theirs; circuit-tracer gives them.
        """
        b_dec = self.b_dec.view(self.config.n_layers, -1) / self.target_scale
        return decoders.reconstruction(b_dec)

    def decode_sparse(self, features: torch.Tensor) -> torch.Tensor:
        """The outputs of all layers, [n_layers, n_pos, width], of active features.

        Example:
            >>> from sae_kernels.nn import CrossLayerTopK
            >>> clt = CrossLayerTopK(8, 3 * 32, n_layers=3, d_out=8, k=4)
            >>> x = torch.randn(3, 5, 8)
            >>> features, _ = clt.encode_sparse(x, slice(0))
            >>> whole = clt(x.transpose(0, 1).flatten(1)).x_hat
            >>> torch.allclose(clt.decode_sparse(features).transpose(0, 1).flatten(1), whole)
            True
        """
        positions, layers, _, decoders, _ = self.select_decoder_vectors(features)
        return self.compute_reconstruction(positions, layers, decoders)


class _Source(NamedTuple):
    """The active features of a layer: by position, then by number.

    Attributes:
        rows: [m, layers they write to, D], decoders of some features.
        start: the first of these layers.
        row: int64 [n], the row of each entry.
        positions: int64 [n].
        values: [n], activations.
        first: entries of the layers before.
    """

    rows: torch.Tensor
    start: int
    row: torch.Tensor
    positions: torch.Tensor
    values: torch.Tensor
    first: int


class Decoders:
    """The decoder vectors of active features times their activations, [n, D], by output layer.

    In the place of circuit-tracer's tensor: an entry of ``[mask]`` for each feature and layer that
    it writes to, where the mask is that of one output layer.

    Args:
        features: activations, coalesced sparse [L, n_pos, F].
        rows: of a layer and its active features, one for each entry: decoders [m, layers they write
            to, D] of some features, and the row of each entry in them.
        starts: the first layer that each layer's features write to.

    Attributes:
        locations: int64 [2, n], output layer and position of every vector.
        features: int64 [n], the entry of ``features`` that it belongs to.
        numbers: int64 [n], the number of its feature.
    """

    def __init__(self, features: torch.Tensor, rows: Rows, starts: Sequence[int]) -> None:
        L, self.n_positions, _ = features.shape
        layers, positions, numbers = features.indices()
        ends = torch.bincount(layers, minlength=L).cumsum(0).tolist()
        self.sources, found = [], [layers.new_empty(3, 0)]
        for layer, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if first == end:
                continue
            entries, start = slice(first, end), starts[layer]
            read, index = rows(layer, numbers[entries])
            values = features.values()[entries]
            self.sources.append(_Source(read, start, index, positions[entries], values, first))
            targets = torch.arange(start, L, device=layers.device)
            entry = torch.arange(first, end, device=layers.device).repeat_interleave(L - start)
            where = positions[entries].repeat_interleave(L - start)
            found.append(torch.stack([targets.repeat(end - first), where, entry]))
        self.locations, (self.features,) = torch.cat(found, 1).split([2, 1])
        self.numbers = numbers[self.features]

    def __getitem__(self, mask: torch.Tensor) -> LayerDecoders:
        layer = int(self.locations[0][mask][0])
        return LayerDecoders([source for source in self.sources if source.start <= layer], layer)

    def reconstruction(self, b_dec: torch.Tensor) -> torch.Tensor:
        """The outputs of all layers, [L, n_pos, D], in the dtype of b_dec."""
        total = b_dec.float()[:, None].repeat(1, self.n_positions, 1)
        for source in self.sources:
            counts = torch.bincount(source.positions, minlength=self.n_positions)
            offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
            index = source.row.to(torch.int32)
            codes = SparseCodes(source.values.float(), index, len(source.rows), offsets)
            out = functional.decode(codes, source.rows.flatten(1))
            out = out.view(self.n_positions, -1, b_dec.shape[1])
            total[source.start :] += out.transpose(0, 1)
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
        for source in self.sources:
            own = (entries >= source.first) & (entries < source.first + len(source.row))
            row = source.row[entries[own] - source.first]
            vectors[own] = source.rows[row, self.layer - source.start]
        return vectors.mul_(self._values[some, None].to(self.dtype))


def active_entries(
    codes: SparseCodes, zero_positions: slice
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Positions, latents and values of the entries that are not 0, but for some positions'.

    Codes are flat.
    """
    positions, latents = codes.tokens.flatten().long(), codes.indices.flatten().long()
    values = codes.values.flatten()
    silent = torch.zeros(codes.batch_shape[0], dtype=torch.bool, device=values.device)
    silent[zero_positions] = True
    kept = (values != 0) & ~silent[positions]
    return positions[kept], latents[kept], values[kept]


def sparse_features(
    layers: torch.Tensor,
    positions: torch.Tensor,
    numbers: torch.Tensor,
    values: torch.Tensor,
    size: tuple[int, ...],
) -> torch.Tensor:
    """Active features, each once, as a coalesced sparse tensor [L, n_pos, F] of this size."""
    order = ((layers * size[1] + positions) * size[2] + numbers).argsort()
    where = torch.stack([layers, positions, numbers])[:, order]
    return torch.sparse_coo_tensor(
        where, values[order], size, check_invariants=False, is_coalesced=True
    )


def _first_written(config: Any, layer: int) -> int:
    """The first layer that the latents of a layer write to."""
    return sum(n <= layer * config.layer_latents for n in config.writers)
