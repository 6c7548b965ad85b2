"""Base class of all sparse autoencoders: weights, scales, encode and decode, saving and loading.

Each architecture is a subclass in its own file. It selects the latents of a token
(:meth:`SparseAutoencoder.select`) and turns their pre-activations into codes
(:meth:`SparseAutoencoder.activate`); the other methods that training calls have defaults here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import nn

from sae_kernels import functional
from sae_kernels.config.objective import ObjectiveConfig
from sae_kernels.config.sae import SAEConfig
from sae_kernels.nn.initialise import initial_weights
from sae_kernels.nn.latents import SingleLatents
from sae_kernels.nn.objective import Reconstruction, sparsity_penalty

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sae_kernels.codes import LatentOrder, SparseCodes
    from sae_kernels.nn.objective import Context, Prefixes, SurveyContext
    from sae_kernels.nn.registry import Preset
    from sae_kernels.primitives.terms import Gradient, Term


class SAEOutput(NamedTuple):
    """Reconstruction and codes of a forward pass.

    Attributes:
        x_hat: [..., output width], the reconstruction, in the dtype of the input.
        codes: the sparse codes of every token.
    """

    x_hat: torch.Tensor
    codes: SparseCodes


class SparseAutoencoder(SingleLatents):
    """Base class of all sparse autoencoders.

    Weights are latents-first: W_enc [F, input width], W_dec [F, output width], b_enc [F], b_dec
    [output width] and, with a skip connection, W_skip [output width, input width].

    Args:
        config: shape and variant; or d_in, with n_latents next and other settings by name.
        n_latents: number of latents F, if ``config`` is d_in.
        seed: seed of the initial weights.
        compute_dtype: dtype of the kernels' operands (bf16 is fastest where the CPU has AMX);
            default: the autocast dtype inside autocast, else the dtype of the weights.
        backend: which kernels run, see :mod:`sae_kernels.backends`; default: the best available.
        device: where the weights are created.
        latents: the consecutive latents whose rows this module has, where an SAE is spread over
            processes; default: all. They are the same rows that the whole SAE would have.
        settings: fields of the configuration's class by name, if ``config`` is d_in.

    Attributes:
        config: the configuration, of the whole SAE.
        latents: the latents whose rows are here.
        metadata: provenance as plain JSON values (model, layer, tokens, figures, the tool that
            wrote it); saved and loaded with the SAE.
        is_fresh: whether the weights are still the initial ones: neither loaded nor trained.

    Raises:
        TypeError: a configuration of another architecture, or settings beside a configuration.
        ValueError: a setting that is unknown or out of range.
    """

    config_class: ClassVar[type[SAEConfig]] = SAEConfig
    objective_class: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig
    # Names for --arch; see sae_kernels.nn.registry.
    presets: ClassVar[dict[str, Preset]] = {}
    # Tensors that keep their dtype when the module is cast: a bf16 threshold stops learning.
    keeps_dtype: ClassVar[tuple[str, ...]] = ()
    # Vectors as wide as an activation; all others have one number per latent.
    non_latent_vectors: ClassVar[frozenset[str]] = frozenset({"b_dec"})
    # Whether x_hat is b_dec plus the codes times rows of W_dec, which FusedStep differentiates.
    decodes_by_rows: ClassVar[bool] = True
    # Whether pre-activations are one product with W_enc, which FusedStep differentiates.
    encodes_once: ClassVar[bool] = True
    # Whether select_in() selects among latents that are spread over ranks.
    spreads: ClassVar[bool] = False
    keeps_fixed_number: ClassVar[bool] = False  # entries for each token; if not, the host waits

    config: Any
    narrow: torch.Tensor | None
    kept_rank_scale: torch.Tensor | None

    def __init__(
        self,
        config: SAEConfig | int,
        n_latents: int | None = None,
        *,
        seed: int = 0,
        compute_dtype: torch.dtype | None = None,
        backend: str | None = None,
        device: torch.device | str | None = None,
        latents: range | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        config = self._configured(config, n_latents, settings)
        self.config = config
        self.latents = range(config.n_latents) if latents is None else latents
        self.compute_dtype = compute_dtype
        self.backend = backend
        self.metadata: dict[str, Any] = {}
        self.is_fresh = True
        W_enc, W_dec = initial_weights(config, seed, device, self.latents)
        self.W_enc = nn.Parameter(W_enc)
        self.b_enc = nn.Parameter(torch.zeros(len(self.latents), device=device))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(config.output_width, device=device))
        if config.skip:
            skip = torch.zeros(config.output_width, config.input_width, device=device)
            self.W_skip = nn.Parameter(skip)
        # Of weights that stay as they are, see InferenceSAE.
        # No buffers while they are None: torch.export counts those among its inputs.
        self.narrow = self.kept_rank_scale = None

    # -- what an architecture defines ----------------------------------------------------------

    def select(
        self, x_centred: torch.Tensor, *, W_enc: torch.Tensor | None = None, k: float | None = None
    ) -> SparseCodes:
        """Selects each token's latents and returns them with their pre-activations.

        By default those above their :meth:`bounds`.

        Args:
            x_centred: [..., input width], in the scale of training, from :meth:`centred`.
            W_enc: read instead of the parameter (the optimizer's compute copy), [F, input width].
            k: replaces the configuration's k, in architectures that have one.
        """
        bounds = self.bounds()
        if bounds is None:
            raise NotImplementedError(f"{type(self).__name__}: expected select() or bounds()")
        return self._above(x_centred, W_enc, bounds)

    def _above(
        self, x_centred: torch.Tensor, W_enc: torch.Tensor | None, bounds: torch.Tensor | float
    ) -> SparseCodes:
        """The latents whose pre-activation exceeds a bound, a scalar or [F]."""
        return functional.encode_threshold(
            x_centred,
            self.W_enc if W_enc is None else W_enc,
            self.b_enc,
            bounds,
            narrow=self.narrow,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )

    def activate(self, preacts: SparseCodes) -> SparseCodes:
        """Codes from selected pre-activations; differentiable in values and thresholds."""
        return preacts.with_values(preacts.values.relu())

    def fold_vectors_(self, scale: float, target_scale: float) -> None:
        """Divides vectors in units of pre-activations (targets) by ``scale`` (``target_scale``)."""
        self.b_enc.div_(scale)

    @property
    def drops_zeros(self) -> bool:
        """Whether an entry of value 0 counts as dropped: no gradient, did not fire."""
        return True

    # -- called by training; defaults of a plain SAE ------------------------------------------

    def check_objective(self, objective: ObjectiveConfig) -> None:
        """Checks that an objective fits this SAE.

        Raises:
            TypeError: the objective of another architecture.
            ValueError: settings that do not go together.
        """
        if not isinstance(objective, self.objective_class):
            raise TypeError(
                f"objective: expected a {self.objective_class.__name__} for a "
                f"{type(self).__name__}, got a {type(objective).__name__}"
            )
        if objective.sparsity != "none" and not self.drops_zeros:
            raise ValueError(
                f"sparsity: expected none where codes may be negative, got {objective.sparsity!r}"
            )

    def kept_per_token(self, k: float, objective: Any) -> float:
        """Latents per token that :meth:`select` keeps in training, given k."""
        return k

    def select_in(self, context: Context, W_enc: torch.Tensor | None = None) -> SparseCodes:
        """:meth:`select` for a training step, of a batch or one of its micro-batches."""
        k = self.kept_per_token(context.k, context.objective)
        return self.select(context.x, W_enc=W_enc, k=k)

    def reconstructions(self, preacts: SparseCodes, context: Context) -> list[Reconstruction]:
        """Reconstructions that the loss compares with the target, the main one first."""
        return [Reconstruction(self.activate(preacts).values, drops_zeros=self.drops_zeros)]

    def penalties(
        self, preacts: SparseCodes, parts: list[Reconstruction], context: Context
    ) -> list[torch.Tensor]:
        """Scalar penalties added to the loss, differentiable in entries and per-latent vectors."""
        objective = context.objective
        if objective.sparsity == "none" or not objective.sparsity_coefficient:
            return []
        return [context.coefficient * self.sparsity(preacts, parts, context)]

    def sparsity(
        self, preacts: SparseCodes, parts: list[Reconstruction], context: Context
    ) -> torch.Tensor:
        """The configured sparsity penalty, averaged over tokens, before its coefficient."""
        return sparsity_penalty(preacts.with_values(parts[0].values), context)

    def main_codes(
        self, preacts: SparseCodes, values: torch.Tensor, k: float, objective: Any
    ) -> SparseCodes:
        """Codes of the main reconstruction, from the entries of all reconstructions."""
        return preacts.with_values(values)

    def survey(self, micro_batches: Iterable[torch.Tensor], context: SurveyContext) -> Any:
        """What the objective needs to know of a whole batch before its first micro-batch.

        Called for a batch in several micro-batches only, without gradient; becomes
        ``Context.survey``. An architecture whose tokens do not see each other needs None.

        Args:
            micro_batches: encoder inputs [b, input width], which may be iterated over again; each
                is valid until the next.
            context: the settings and the size of the batch.
        """
        return None

    def sums_over_entries(self, objective: Any) -> bool:
        """Whether a batch's objective is a sum over its (token, latent) entries.

        If so it can be trained by dense products over tiles of latents.
        """
        return False

    def prefixes(self, objective: Any, step: int, seed: int) -> Prefixes | None:
        """Prefixes of the latents of a Matryoshka SAE at a 0-based step; else None."""
        return None

    def entry_leaves(self, preacts: SparseCodes) -> dict[str, torch.Tensor]:
        """Further tensors that the objective is differentiated by (a router's output), by name."""
        return {}

    def with_leaves(self, preacts: SparseCodes, leaves: dict[str, torch.Tensor]) -> SparseCodes:
        """The entries with the tensors of :meth:`entry_leaves` replaced by ``leaves``."""
        return preacts

    def leaf_gradients(
        self, preacts: SparseCodes, grads: dict[str, torch.Tensor], context: Context
    ) -> dict[str, Gradient]:
        """Parameter gradients from the gradients of the :meth:`entry_leaves`, by name."""
        return {}

    def encoder_term(
        self, order: LatentOrder, indices: torch.Tensor, coef: torch.Tensor, x: torch.Tensor
    ) -> Term:
        """W_enc's gradient: ``coef`` of entries times what their latents ``indices`` read of x."""
        return order.term(coef, x)

    def decoder_codes(self, codes: SparseCodes) -> SparseCodes:
        """Codes of W_dec's rows, which may be of other tokens; differentiable in the values."""
        return codes

    def decoder_target(self, target: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The bias and the targets of the tokens of :meth:`decoder_codes`."""
        return self.b_dec.detach(), target

    def by_token(self, decoded: torch.Tensor) -> torch.Tensor:
        """Rows of the tokens of :meth:`decoder_codes` as [B, output width]."""
        return decoded

    def after_step_(self, finite: torch.Tensor) -> None:
        """Updates running statistics after a step, unless it was not ``finite``."""

    def step_figures(self, fired: torch.Tensor) -> dict[str, float]:
        """Extra metrics of a step, from how often each latent fired in it, int [F]."""
        return {}

    def rows_to_finish(self, objective: Any) -> int:
        """Tokens that :meth:`finish_training_` needs; 0: it does nothing."""
        return 0

    def finish_training_(self, x: torch.Tensor, objective: Any) -> None:
        """Fits what is fitted after the last step, on scaled tokens [n, input width]."""

    # -- encoding and decoding ----------------------------------------------------------------

    def encode(self, x: torch.Tensor, *, k: float | None = None) -> SparseCodes:
        """Encodes raw activations into sparse codes.

        Args:
            x: [..., input width], any floating dtype.
            k: replaces the configuration's k, in architectures that have one.

        Raises:
            ValueError: x of another width.

        Example:
            >>> from sae_kernels.nn import TopKSAE
            >>> TopKSAE(8, 32, k=4).encode(torch.randn(5, 8)).values.shape
            torch.Size([5, 4])
        """
        return self.encode_scaled(self.scaled(x), k=k)

    def encode_scaled(self, x: torch.Tensor, *, k: float | None = None) -> SparseCodes:
        """:meth:`encode` for activations that already carry the activation scale."""
        return self.activate(self.select(self.centred(x), k=k))

    def centred(self, x: torch.Tensor) -> torch.Tensor:
        """The encoder's input: ``x - b_dec`` if the configuration subtracts it, else x."""
        width = self.config.input_width
        if x.dim() < 1 or x.shape[-1] != width:
            raise ValueError(
                f"x: expected shape [..., {width}] (a row per token), got {list(x.shape)}"
            )
        return x - self.b_dec if self.config.subtract_b_dec else x

    def decode(self, codes: SparseCodes, x: torch.Tensor | None = None) -> torch.Tensor:
        """Reconstructs raw activations from codes, [..., output width] in fp32.

        Args:
            codes: as :meth:`encode` gives them.
            x: [..., input width], the raw input; needed by a skip connection alone.

        Raises:
            ValueError: no x where there is a skip connection.

        Example:
            >>> from sae_kernels.nn import TopKSAE
            >>> sae = TopKSAE(8, 32, k=4)
            >>> sae.decode(sae.encode(torch.randn(5, 8))).shape
            torch.Size([5, 8])
        """
        return self.decode_scaled(codes, None if x is None else self.scaled(x)) / self.target_scale

    def decode_scaled(
        self,
        codes: SparseCodes,
        x: torch.Tensor | None = None,
        *,
        prefixes: Prefixes | None = None,
        frozen: bool = False,
    ) -> torch.Tensor:
        """:meth:`decode` in the scale in which the SAE is trained.

        Args:
            codes: of the tokens.
            x: the scaled input, for a skip connection.
            prefixes: reconstruct from each prefix of the latents: [G, ..., output width].
            frozen: no gradient reaches the decoder.
        """

        def stop(weight: torch.Tensor) -> torch.Tensor:
            return weight.detach() if frozen else weight

        x_hat = functional.decode(
            codes,
            stop(self.W_dec),
            stop(self.b_dec),
            group_ends=None if prefixes is None else prefixes.ends,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )
        if not self.config.skip:
            return x_hat
        if x is None:
            raise ValueError(
                "x: expected the input of the SAE (it has a skip connection), got None"
            )
        return x_hat + x.to(self.W_skip.dtype) @ stop(self.W_skip).T

    def forward(self, x: torch.Tensor) -> SAEOutput:
        """Encodes and decodes activations [..., input width]; codes and reconstruction."""
        codes = self.encode(x)
        return SAEOutput(self.decode(codes, x if self.config.skip else None).to(x.dtype), codes)

    def rank_scale(self) -> torch.Tensor | None:
        """The factor of values when latents are ranked: decoder norms [F], or None."""
        kept = self.kept_rank_scale
        if kept is not None or not getattr(self.config, "rank_by_decoder_norm", False):
            return kept
        return self.latent_norms(self.decoder_norms().detach())
