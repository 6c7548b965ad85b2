"""Layout of cross-layer transcoders and causal crosscoders: latents read a layer, write several.

The latents that read the first layer come first, then those of the second; all layers have as many.
W_dec is one decoder after another, one for each layer that is written, with a row for each latent
that writes to it: these are always the first latents. So nothing that causality forbids is stored,
and the kernels see a plain decoder: of L B tokens, whose codes are of the rows of W_dec
(:meth:`CrossLayer.decoder_codes`).
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.functional import pad

from sae_kernels import functional
from sae_kernels.codes import SparseCodes
from sae_kernels.config.base import setting
from sae_kernels.config.sae import SAEConfig, Size
from sae_kernels.nn.base import SparseAutoencoder
from sae_kernels.nn.layer_features import LayerFeatures
from sae_kernels.primitives import checks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sae_kernels.codes import LatentOrder
    from sae_kernels.config.objective import ObjectiveConfig
    from sae_kernels.nn.objective import Prefixes
    from sae_kernels.primitives.terms import Term
    from sae_kernels.step.ranks import Ranks


@dataclasses.dataclass(frozen=True)
class CrossLayerConfig(SAEConfig):
    """Settings of SAEs whose latents read one layer each; a base of the architectures' own."""

    _: dataclasses.KW_ONLY
    n_layers: int = 2
    subtract_b_dec: bool = False
    unit_norm_decoder: bool = False
    causality: Literal["weak", "strict", "none"] = setting(
        "weak",
        "layers that a latent writes to: weak, the one it reads and those after it (cross-layer "
        "transcoders, weakly causal crosscoders); strict, those after it, and none reads the last "
        "layer; none, all (Lindsey et al., October 2024)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect("n_layers", self.n_layers > 1, "at least 2 layers to read and write")
        self.expect(
            "subtract_b_dec", not self.subtract_b_dec, "false in a cross-layer architecture"
        )
        self.expect("skip", not self.skip, "false in a cross-layer architecture")
        if getattr(self, "groups", None) is not None:
            raise ValueError("groups: expected none in a cross-layer architecture")
        if self.n_latents % self.n_sources:
            raise ValueError(
                f"n_latents: expected as many for each of the {self.n_sources} layers that latents "
                f"read, so that each has a layer to write to; got {self.n_latents}"
            )

    @property
    def n_sources(self) -> int:
        """Layers that latents read: all, or all but the last, after which there is none."""
        return self.n_layers - (self.causality == "strict")

    @property
    def layer_latents(self) -> int:
        """Latents that read one layer."""
        return self.n_latents // self.n_sources

    @property
    def writers(self) -> tuple[int, ...]:
        """How many latents write to each layer; they are the first ones."""
        if self.causality == "none":
            return (self.n_latents,) * self.n_layers
        first = 1 if self.causality == "weak" else 0
        return tuple(self.layer_latents * (first + layer) for layer in range(self.n_layers))

    @property
    def n_encoded(self) -> int:
        """Latents that each layer of a token is multiplied with."""
        return self.layer_latents

    @property
    def row_parts(self) -> int:
        """1: a row of W_dec is of one layer."""
        return 1

    @property
    def largest_k(self) -> int:
        """The largest k: the latents that read one layer."""
        return self.layer_latents

    def expect_at_most_layer_latents(self, name: str) -> None:
        """Raises ValueError for a setting above the number of latents that read one layer."""
        most = self.layer_latents
        words = f"at most {most}, the latents of one of {self.n_sources} layers"
        self.expect(name, getattr(self, name) <= most, words)

    def shapes(self) -> dict[str, Size]:
        """Shapes of the weights: a row of W_enc per latent, one of W_dec per latent and layer."""
        width = self.output_width // self.n_layers
        own: dict[str, Size] = {
            "W_enc": (self.n_latents, self.d_in),
            "W_dec": (sum(self.writers), width),
        }
        return {**super().shapes(), **own}


class CrossLayer(LayerFeatures, SparseAutoencoder):
    """Base class of SAEs whose latents read one layer each and write to several.

    ``h[f] = W_enc[f] x[layer of f] + b_enc[f]``, and ``x_hat[l] = b_dec[l] + sum_f codes[f]
    W_dec[row of f at l]`` over the latents that write to layer l. Tokens are their layers side by
    side, [..., n_layers * d_in], as a crosscoder's; codes are of all layers' latents together.
    """

    config: Any

    def check_objective(self, objective: ObjectiveConfig) -> None:
        """Checks the objective's class; AuxK, prefixes and multi-TopK are of whole tokens."""
        super().check_objective(objective)
        for name in ("auxk_alpha", "random_prefixes", "multi_topk"):
            if getattr(objective, name, 0):
                raise ValueError(
                    f"{name}: expected {False if name == 'multi_topk' else 0} in a cross-layer "
                    f"architecture, got {getattr(objective, name)}"
                )

    def start_training_(self, x: torch.Tensor, objective: Any, ranks: Ranks | None = None) -> None:
        """Does nothing: W_enc does not start as a copy of W_dec, so no factor fits its codes."""

    def prefixes(self, objective: Any, step: int, seed: int) -> Prefixes | None:
        """None: a cross-layer architecture has no prefixes."""
        return None

    def sums_over_entries(self, objective: Any) -> bool:
        """False: dense products are of whole tokens."""
        return False

    # -- the encoder ---------------------------------------------------------------------------

    def by_layer(
        self,
        encode: Callable[..., SparseCodes],
        x: torch.Tensor,
        W_enc: torch.Tensor | None,
        *of_latents: torch.Tensor | None,
    ) -> SparseCodes:
        """Codes of all layers together from one layer's at a time.

        Args:
            encode: makes codes of one layer's tokens [..., d_in], rows of W_enc, b_enc, and a part
                of each of ``of_latents``.
            x: [..., input width].
            W_enc: read instead of the parameter.
            of_latents: vectors [F], or None.
        """
        n = self.config.n_sources
        W_enc = self.W_enc if W_enc is None else W_enc
        vectors = [
            None if v is None else v.view(n, -1).unbind(0) for v in (self.b_enc, *of_latents)
        ]
        layers = x.unflatten(-1, (self.config.n_layers, -1)).unbind(-2)[:n]
        parts = [
            encode(tokens, rows, *(None if v is None else v[i] for v in vectors))
            for i, (tokens, rows) in enumerate(
                zip(layers, W_enc.unflatten(0, (n, -1)).unbind(0), strict=True)
            )
        ]
        return side_by_side(parts)

    def _above(
        self, x_centred: torch.Tensor, W_enc: torch.Tensor | None, bounds: torch.Tensor | float
    ) -> SparseCodes:
        bounds = torch.as_tensor(bounds, device=x_centred.device).expand(self.config.n_latents)

        def encode(*arguments: torch.Tensor) -> SparseCodes:
            return functional.encode_threshold(
                *arguments, compute_dtype=self.compute_dtype, backend=self.backend
            )

        return self.by_layer(encode, x_centred, W_enc, bounds.contiguous())

    def preactivations(
        self, x: torch.Tensor, latents: Sequence[int] | torch.Tensor
    ) -> torch.Tensor:
        """Pre-activations [..., n] of some latents, in the scale of training."""
        rows = self.centred(self.scaled(x)).unflatten(-1, (self.config.n_layers, -1))
        chosen = checks.latents(latents, self.config.n_latents).to(self.W_enc.device)
        layers, h = chosen // self.config.layer_latents, []
        for layer in range(self.config.n_sources):
            own = chosen[layers == layer]
            h.append(
                functional.preactivations(
                    rows[..., layer, :],
                    self.W_enc,
                    self.b_enc,
                    own,
                    compute_dtype=self.compute_dtype,
                    backend=self.backend,
                )
            )
        back = layers.argsort(stable=True).argsort()
        return torch.cat(h, -1)[..., back]

    def products(self, x: torch.Tensor) -> torch.Tensor:
        """``W_enc x``, [F], of one row [input width]: each latent's with its own layer."""
        n = self.config.n_sources
        layers = x.view(self.config.n_layers, -1, 1)[:n]
        products: torch.Tensor = self.W_enc.float().unflatten(0, (n, -1)) @ layers
        return products.flatten()

    def encoder_term(
        self, order: LatentOrder, indices: torch.Tensor, coef: torch.Tensor, x: torch.Tensor
    ) -> Term:
        """W_enc's gradient from dL/dh: ``coef`` times the entry's token at the latent's layer."""
        ends = torch.arange(1, self.config.n_sources + 1, dtype=torch.int32, device=x.device)
        by_layer = order.by_group(indices, ends * self.config.layer_latents, len(x))
        return by_layer.term(coef, self._layers_first(x))

    # -- the decoder ---------------------------------------------------------------------------

    def decoder_codes(self, codes: SparseCodes) -> SparseCodes:
        """Codes of the rows of W_dec for L B tokens: those of the first layer, of the second, ...

        Ragged, and differentiable in the values.
        """
        config = self.config
        flat, device = codes.flat(), codes.indices.device
        writers = torch.tensor(config.writers, dtype=torch.int32, device=device)[:, None]
        starts = torch.tensor(
            [0, *itertools.accumulate(config.writers[:-1])], dtype=torch.int32, device=device
        )[:, None]
        indices, values = flat.indices.flatten(), flat.values.flatten()
        writes = indices < writers  # [L, N]
        before = pad(writes.flatten().cumsum(0, dtype=torch.int32), (1, 0))
        firsts = flat.offsets
        if firsts is None:
            firsts = torch.arange(len(flat.values) + 1, device=device) * flat.k
        layer = torch.arange(config.n_layers, device=device)[:, None] * len(indices)
        offsets = before[
            torch.cat([(layer + firsts[:-1]).flatten(), layer.new_tensor([len(before) - 1])])
        ]
        (kept,) = writes.flatten().nonzero(as_tuple=True)
        return SparseCodes(
            values.repeat(config.n_layers).index_select(0, kept),
            (indices + starts).flatten().index_select(0, kept),
            sum(config.writers),
            offsets,
        )

    def decoder_target(self, target: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The targets [L B, width] of the layers one after the other, less their bias."""
        return None, self._layers_first(target - self.b_dec)

    def by_token(self, decoded: torch.Tensor) -> torch.Tensor:
        """Rows [L B, width] as [B, output width]."""
        layers: torch.Tensor = decoded.unflatten(0, (self.config.n_layers, -1))
        return layers.transpose(0, 1).flatten(1)

    def decode_scaled(
        self,
        codes: SparseCodes,
        x: torch.Tensor | None = None,
        *,
        prefixes: Prefixes | None = None,
        frozen: bool = False,
    ) -> torch.Tensor:
        """Reconstructs all layers, [..., output width], in the scale of training."""
        W_dec, b_dec = (t.detach() if frozen else t for t in (self.W_dec, self.b_dec))
        decoded = functional.decode(
            self.decoder_codes(codes), W_dec, compute_dtype=self.compute_dtype, backend=self.backend
        )
        x_hat: torch.Tensor = self.by_token(decoded) + b_dec
        return x_hat.view(*codes.batch_shape, self.config.output_width)

    def decoder_norms(self) -> torch.Tensor:
        """The norm of each latent's row at each layer, fp32 [F, n_layers]; 0 where it has none."""
        dtype = torch.promote_types(self.W_dec.dtype, torch.float32)
        norms = torch.linalg.vector_norm(self.W_dec, dim=1, dtype=dtype)
        F = self.config.n_latents
        parts = norms.split(self.config.writers)
        return torch.stack([pad(part, (0, F - len(part))) for part in parts], 1)

    def decoder_rows(self) -> torch.Tensor:
        """What each latent adds to a token, [F, output width], 0 at layers it does not write to."""
        F = self.config.n_latents
        parts = self.W_dec.split(self.config.writers)
        return torch.cat([pad(part, (0, 0, 0, F - len(part))) for part in parts], 1)

    def row_coefficients(self, by_layer: torch.Tensor) -> torch.Tensor:
        """The entries of [F, n_layers] that have a row of W_dec, in its order."""
        return torch.cat([by_layer[:n, i] for i, n in enumerate(self.config.writers)])

    def _layers_first(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows [B, layers side by side] as [L B, width of one]."""
        layers: torch.Tensor = rows.unflatten(1, (self.config.n_layers, -1))
        return layers.transpose(0, 1).flatten(0, 1)


def side_by_side(parts: list[SparseCodes]) -> SparseCodes:
    """Joins codes of the same tokens and different latents, those of the first part first."""
    firsts = [0, *itertools.accumulate(part.n_latents for part in parts)]
    indices = [part.indices + first for part, first in zip(parts, firsts[:-1], strict=True)]
    values, total = [part.values for part in parts], firsts[-1]
    if parts[0].offsets is None:
        return SparseCodes(torch.cat(values, -1), torch.cat(indices, -1), total)
    offsets = torch.stack([part.offsets for part in parts if part.offsets is not None]).sum(0)
    tokens = torch.cat([part.tokens for part in parts])[:, None]
    # A stable sort by token, where empty batches count as one token without entries.
    by_token = SparseCodes(tokens, tokens, max(1, len(offsets) - 1)).latent_order(drop_zeros=False)
    source = by_token.entries.long()
    return SparseCodes(
        torch.cat(values)[source],
        torch.cat(indices)[source],
        total,
        offsets.to(torch.int32),
        parts[0].leading,
    )
