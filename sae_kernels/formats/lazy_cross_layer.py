"""LazyCrossLayer: a cross-layer transcoder whose decoder rows stay in circuit-tracer's files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.formats.circuit_tracer_clt import read_cross_layer, stored_decoders
from sae_kernels.nn import CrossLayerJumpReLU, from_weights

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.objective import Prefixes


class LazyCrossLayer(CrossLayerJumpReLU):
    """A frozen cross-layer transcoder that reads decoder rows from circuit-tracer's files.

    Files are mapped into memory, so only pages with rows of active features are read, and the
    system may drop them again: encode, decode and the calls of
    :class:`~sae_kernels.nn.layer_features.LayerFeatures` fit where W_dec, most of the weights, does
    not. ``W_dec``, and what copies or saves the module, reads all.

    Args:
        folder: of the format circuit_tracer_clt, or any of its files. They must stay as they are.

    Attributes:
        decoders: W_dec of each layer that is read, [features, layers from this one on, d_in].

    Raises:
        DataError: as :func:`~sae_kernels.formats.read_cross_layer`; but rows of W_dec may hold
            numbers that are not finite, as they are not read.

    Example:
        >>> import tempfile
        >>> from sae_kernels.formats import write_cross_layer
        >>> clt = CrossLayerJumpReLU(2, 6, n_layers=2, d_out=2, log_threshold=False).eval()
        >>> hooks = {"hook_name": "hook_resid_mid", "hook_name_out": "hook_mlp_out"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_cross_layer(folder, clt.config, clt.state_dict(), {"activations": hooks})
        ...     lazy, x = LazyCrossLayer(folder), torch.randn(3, 4)
        ...     torch.allclose(lazy(x).x_hat, clt(x).x_hat)
        True
    """

    def __init__(self, folder: str | Path) -> None:
        config, tensors, metadata = read_cross_layer(folder, decoders=False)
        with torch.device("meta"):
            super().__init__(config)
        del self._parameters["W_dec"]
        self.load_state_dict(tensors, assign=True)
        self.decoders = stored_decoders(folder)
        self.metadata = metadata
        self.requires_grad_(False).eval()

    @property
    def W_dec(self) -> torch.Tensor:  # type: ignore[override]
        """All decoder rows, read now, [rows, d_in]."""
        each = [self.layer_decoders(layer) for layer in range(self.config.n_layers)]
        return torch.cat(
            [each[i][:, layer - i] for layer in range(len(each)) for i in range(layer + 1)]
        )

    def layer_decoders(self, layer: int, numbers: torch.Tensor | None = None) -> torch.Tensor:
        """The decoder rows of a layer's features, on the device and in the dtype of W_enc."""
        rows = self.decoders[layer]
        return (rows if numbers is None else rows[numbers.cpu()]).to(self.W_enc)

    def decode_scaled(
        self,
        codes: SparseCodes,
        x: torch.Tensor | None = None,
        *,
        prefixes: Prefixes | None = None,
        frozen: bool = False,
    ) -> torch.Tensor:
        """Reconstructs all layers, [..., output width], from the rows of active latents."""
        layers = self.decode_sparse(self.layer_features(codes))
        return layers.transpose(0, 1).reshape(*codes.batch_shape, self.config.output_width)

    def _copied(self) -> Any:
        """A copy with all rows in memory, which is lazy no more."""
        weights = {name: tensor.clone() for name, tensor in self.state_dict().items()}
        copy = from_weights(self.config, {**weights, "W_dec": self.W_dec})
        copy.metadata = dict(self.metadata)
        return copy
