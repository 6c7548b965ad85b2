"""BatchTopK SAEs: the k B largest latents of a training batch, a threshold at inference."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.nn.functional import pad

from sae_kernels import functional
from sae_kernels.config.base import POSITIVE, setting
from sae_kernels.config.objective import PrefixObjective
from sae_kernels.config.sae import SAEConfig, Size
from sae_kernels.nn.base import SparseAutoencoder
from sae_kernels.nn.initialise import bounds_at, scale_encoder_
from sae_kernels.nn.objective import NESTED, check_groups, prefixes_of
from sae_kernels.nn.registry import FREE_NORMS, Preset, register
from sae_kernels.primitives.tensors import rounded_down

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.objective import Context, Prefixes, SurveyContext
    from sae_kernels.step.ranks import Ranks


@dataclasses.dataclass(frozen=True)
class BatchTopKConfig(SAEConfig):
    """Settings of a BatchTopK SAE (Bussmann et al., arXiv 2412.06410).

    Example:
        >>> BatchTopKConfig(768, 24576, k=31.5).threshold_rule
        'sae_lens'
    """

    architecture: ClassVar[str] = "batchtopk"

    k: float = setting(
        32,
        "latents kept per token on average; may be a fraction (a batch of B tokens keeps int(k B))",
        POSITIVE,
    )
    rank_by_decoder_norm: bool = setting(
        False, "rank latents by pre-activation times decoder norm (BatchTopK crosscoders)"
    )
    groups: tuple[int, ...] | None = setting(
        None,
        "sizes of the latent groups of a Matryoshka SAE (arXiv 2503.17547); None: not Matryoshka",
    )
    threshold_rule: Literal["dictionary_learning", "sae_lens"] = setting(
        "sae_lens",
        "moving average of each batch's smallest kept value that becomes the inference threshold: "
        "sae_lens (decay 0.99, from 0) or dictionary_learning (decay 0.999, from the first "
        "batch's value, which takes thousands of steps to forget)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_at_most_n_latents("k")
        check_groups(self.groups, self.n_latents)

    def shapes(self) -> dict[str, Size]:
        """Shapes of the weights and of the inference threshold."""
        return {**super().shapes(), "threshold": ()}


_SLACK = 1e-6  # a product of key and norm is off by less


@dataclasses.dataclass
class KeyCut:
    """The smallest kept key of a batch that is taken in micro-batches.

    Attributes:
        key: scalar; 0: all positive entries are kept.
        ties: entries equal to it that are still to be kept, the first ones of those to come.
        found: entries of each micro-batch, among them all that are kept.
    """

    key: torch.Tensor
    ties: torch.Tensor | int
    found: list[SparseCodes]

    def keep(self, keys: torch.Tensor) -> torch.Tensor:
        """Whether entries are kept, bool [N], from the keys of the next micro-batch; once each."""
        tied = keys == self.key
        kept = ~(keys < self.key) & (~tied | (tied.cumsum(0) <= self.ties))
        self.ties = self.ties - tied.sum()
        return kept

    def cut(self, preacts: SparseCodes, scale: torch.Tensor | None) -> SparseCodes:
        """The entries of the next micro-batch, with 0 for those that are not kept."""
        kept = self.keep(_keys(preacts, scale))
        return preacts.with_values(torch.where(kept, preacts.values, 0))


def _keys(preacts: SparseCodes, scale: torch.Tensor | None) -> torch.Tensor:
    """What ranks the entries [N], without gradient."""
    values = preacts.values.detach()
    return values if scale is None else values * scale[preacts.indices.long()]


def _where(codes: SparseCodes, kept: torch.Tensor) -> SparseCodes:
    """Some of the entries of ragged codes."""
    assert codes.offsets is not None
    before = pad(kept.cumsum(0), (1, 0)).to(torch.int32)
    codes = dataclasses.replace(codes, offsets=before[codes.offsets.long()])
    return codes.with_values(codes.values[kept], codes.indices[kept])


def _bounds(key: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Lower bounds of pre-activations, scalar or [F], from one of ranking keys in fp64."""
    bound = key.clamp(min=0)
    if scale is None:
        return rounded_down(bound)
    return torch.where(scale > 0, rounded_down(bound / scale.double()), torch.inf)


@register
class BatchTopKSAE(SparseAutoencoder):
    """BatchTopK SAE: the int(k B) largest pre-activations of a batch (arXiv 2412.06410).

    ``x_hat = b_dec + W_dec^T batchtopk(W_enc (x - b_dec) + b_enc)``: in training mode the largest
    positive pre-activations of the batch, in evaluation mode all above :attr:`threshold`, so that a
    token's codes do not depend on those around it.

    Attributes:
        threshold: fp64 scalar, moving average of the training batches' smallest kept keys (see
            ``config.threshold_rule``); not positive while unset.

    Example:
        >>> from sae_kernels.nn import BatchTopKSAE
        >>> sae = BatchTopKSAE(8, 32, k=2.5)
        >>> sae.encode(torch.randn(100, 8)).values.shape
        torch.Size([250])
    """

    config: BatchTopKConfig
    config_class = BatchTopKConfig
    objective_class = PrefixObjective
    presets: ClassVar[dict[str, Preset]] = {
        "batchtopk": Preset("the k B largest latents of a batch of B tokens"),
        "matryoshka": Preset(
            "BatchTopK, prefixes of the latents reconstruct alone", sae={"groups": NESTED}
        ),
        "crosscoder": Preset(
            "BatchTopK over several layers or models together",
            sae={**FREE_NORMS, "rank_by_decoder_norm": True, "decoder_norm": "sum"},
            data="layers",
        ),
    }
    keeps_dtype = ("threshold", "last_key")
    spreads: ClassVar[bool] = True

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        unset = -1.0 if self.config.threshold_rule == "dictionary_learning" else 0.0
        device = self.b_enc.device
        threshold = torch.full((), unset, dtype=torch.float64, device=device)
        self.register_buffer("threshold", threshold)
        # The next batch's is near it: a guess that saves work.
        last_key = torch.full((), torch.nan, dtype=torch.float64, device=device)
        self.register_buffer("last_key", last_key, persistent=False)

    threshold: torch.Tensor
    last_key: torch.Tensor

    def thresholds(self) -> torch.Tensor:
        """:attr:`threshold` as one for all latents, or one each [F]."""
        return self.threshold

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.last_key.is_meta:  # it is not saved, so nothing has taken its place
            self.last_key = torch.full_like(self.threshold, torch.nan)

    def bounds(self) -> torch.Tensor | None:
        """The least pre-activation above the threshold in evaluation; None in training."""
        return None if self.training else _bounds(self.thresholds(), self.rank_scale())

    def start_training_(self, x: torch.Tensor, objective: Any, ranks: Ranks | None = None) -> None:
        """Scales W_enc by the one factor with which k latents a token reconstruct a sample best."""
        scale_encoder_(self, x, bounds_at(self, x, self.config.k), ranks)

    def select(
        self, x_centred: torch.Tensor, *, W_enc: torch.Tensor | None = None, k: float | None = None
    ) -> SparseCodes:
        """The batch's int(k B) largest pre-activations; in evaluation those above the threshold."""
        if not self.training:
            return super().select(x_centred, W_enc=W_enc)
        scale = self.rank_scale()
        preacts = functional.encode_batch_topk(
            x_centred,
            self.W_enc if W_enc is None else W_enc,
            self.b_enc,
            self.config.k if k is None else k,
            rank_scale=scale,
            start=self.last_key,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )
        self._note(preacts, scale, self.last_key)
        return preacts

    def survey(self, micro_batches: Iterable[torch.Tensor], context: SurveyContext) -> KeyCut:
        """Finds the smallest key that the whole batch keeps, by encoding every token."""
        count, scale = int(context.k * context.n_tokens), self.rank_scale()
        if not 0 < float(self.last_key) < torch.inf:  # no batch before: the first micro-batch alone
            self._select_alone(next(iter(micro_batches)), context.W_enc, context.k)
        for bound in self._guesses(count):
            found, largest = [], self.b_enc.new_empty(0)
            for x in micro_batches:
                bounds = _bounds(self.last_key.new_tensor(bound), scale)
                codes = self._above(x, context.W_enc, bounds)
                keys = _keys(codes, scale)
                largest = torch.cat([largest, keys[~(keys <= bound * (1 + _SLACK))]])
                if largest.numel() > count:
                    largest = largest.topk(count, sorted=False).values
                # Only what can still be among the count largest: few more than are kept in the end.
                full = largest.numel() == count > 0
                found.append(_where(codes, ~(keys < largest.min())) if full else codes)
            if largest.numel() == count:
                break
        cut = pad(largest, (0, 1), value=torch.inf).amin()
        _set_(self.last_key, cut)
        key = self.last_key.clone() if largest.numel() == count else torch.zeros_like(self.last_key)
        return KeyCut(key, (largest == cut).sum(), found)

    def select_in(self, context: Context, W_enc: torch.Tensor | None = None) -> SparseCodes:
        """The batch's int(k B) largest pre-activations, those that lie in these rows."""
        if context.ranks is not None:
            return self._select_among(context.ranks, context, W_enc)
        if context.survey is None:
            return super().select_in(context, W_enc)
        cut: KeyCut = context.survey
        scale = self.rank_scale()
        preacts = cut.found.pop(0)
        if context.leaves is None:  # autograd is to see how they come from the weights
            preacts = self._above(context.x, W_enc, _bounds(cut.key * (1 - _SLACK), scale))
        return cut.cut(preacts, scale)

    def _select_alone(
        self, x_centred: torch.Tensor, W_enc: torch.Tensor | None, k: float
    ) -> SparseCodes:
        """A first micro-batch's entries; its smallest key, as :attr:`last_key`, is a guess."""
        return self.select(x_centred, W_enc=W_enc, k=k)

    def _guesses(self, count: int) -> tuple[float, ...]:
        """Bounds to try in turn, above which ``count`` keys of a batch may lie; 0 is the last."""
        guess = float(self.last_key)
        guess = guess if 0 < guess < torch.inf else 0.0
        return (0.9 * guess, guess / 2, guess / 4, 0.0) if count else (torch.inf,)

    def _select_among(
        self, ranks: Ranks, context: Context, W_enc: torch.Tensor | None
    ) -> SparseCodes:
        """The batch's int(k B) largest pre-activations of all ranks, those of these latents."""
        count, scale = int(context.k * context.n_tokens), self.rank_scale()
        if not 0 < float(self.last_key) < torch.inf:  # the same on all ranks
            self.select(context.x, W_enc=W_enc, k=min(context.k / ranks.size, len(self.latents)))
            _set_(self.last_key, ranks.least(self.last_key))
        for bound in self._guesses(count):
            bounds = _bounds(self.last_key.new_tensor(bound), scale)
            codes = self._above(context.x, W_enc, bounds)
            codes = _where(codes, ~(_keys(codes, scale) <= bound * (1 + _SLACK)))
            keys = _keys(codes, scale)
            kept, found = ranks.largest_of_batch(codes, keys, count)
            if int(found) >= count:
                break
        _set_(self.last_key, ranks.least(pad(keys[kept], (0, 1), value=torch.inf).amin().double()))
        return _where(codes, kept)

    @torch.no_grad()
    def _note(
        self, preacts: SparseCodes, scale: torch.Tensor | None, last_key: torch.Tensor
    ) -> None:
        # +inf where nothing is kept. To ask how many are would break a compiled graph.
        _set_(last_key, pad(_keys(preacts, scale), (0, 1), value=torch.inf).amin())

    @torch.no_grad()
    def after_step_(self, finite: torch.Tensor) -> None:
        """Moves :attr:`threshold` towards the last batch's smallest kept key.

        A step that was not ``finite`` was skipped and moves nothing.
        """
        key, threshold = self.last_key, self.threshold
        keep = 0.999 if self.config.threshold_rule == "dictionary_learning" else 0.99
        moved = keep * threshold + (1 - keep) * key
        moved = torch.where(threshold < 0, key, moved)
        _set_(threshold, torch.where(key.isfinite() & finite, moved, threshold))

    def fold_vectors_(self, scale: float, target_scale: float) -> None:
        """Rescales the threshold too: in pre-activations, or in targets if norms rank latents."""
        super().fold_vectors_(scale, target_scale)
        divisor = target_scale if self.config.rank_by_decoder_norm else scale
        self.threshold.copy_(
            torch.where(self.threshold > 0, self.threshold / divisor, self.threshold)
        )

    def prefixes(self, objective: PrefixObjective, step: int, seed: int) -> Prefixes | None:
        """The prefixes of the configured groups, or random ones drawn for this step."""
        return prefixes_of(self, objective, step, seed)


def _set_(scalar: torch.Tensor, value: torch.Tensor) -> None:
    """Writes a scalar, or a vector, in place."""
    # Through a view: torch.compile (2.13) takes an fp64 scalar on the CPU for a Python number and
    # drops what is written to it.
    scalar.view(-1).copy_(value.view(-1))
