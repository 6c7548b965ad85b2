"""End-to-end training of an SAE through a language model."""

from __future__ import annotations

import dataclasses
import math
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from sae_kernels.config.output import OutputConfig
from sae_kernels.errors import NonFiniteError
from sae_kernels.harvest.splice import check_fits
from sae_kernels.harvest.tokens import TokenBatch
from sae_kernels.nn import pretrained
from sae_kernels.training.end_to_end.layer import layer_width
from sae_kernels.training.end_to_end.loss import EndToEnd, check_end_to_end, measured_loss
from sae_kernels.training.end_to_end.spliced import SplicedSAE
from sae_kernels.training.origin import placed
from sae_kernels.training.run import TrainingRun, drive
from sae_kernels.training.start import Planned, RunLocation, make_step
from sae_kernels.training.trainable import Trainable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor, nn

    from sae_kernels.config.train import TrainConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step import AutogradStep
    from sae_kernels.training.end_to_end.loss import EndToEndLoss
    from sae_kernels.training.run import OnStep, TrainingResult

    Batches = Iterable[TokenBatch | Tensor | Mapping[str, Tensor]]


def train_end_to_end(
    model: nn.Module,
    batches: Batches,
    layer: str,
    sae: SparseAutoencoder,
    config: TrainConfig,
    weights: EndToEnd | None = None,
    *,
    folder: str | Path | None = None,
    output: OutputConfig | None = None,
    metadata: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Trains an SAE in place through a language model, with torch's Adam.

    The loss is :func:`~sae_kernels.training.end_to_end.end_to_end_loss`.

    Args:
        model: frozen, in evaluation mode; left as it was.
        batches: token ids or :class:`~sae_kernels.harvest.TokenBatch`, one per step; iterated over
            again if they end before the steps do, which an iterator does not allow. Batches of
            fewer than two tokens to replace, which have no variance, are skipped.
        layer: the dotted path of the layer that the SAE reconstructs.
        sae: fresh (:func:`~sae_kernels.training.end_to_end.prepare_end_to_end`), or trained on the
            layer's activations before; on the layer's device.
        config: the settings, as of the autograd route; batch_size is not used.
        weights: see :func:`~sae_kernels.training.end_to_end.end_to_end_loss`.
        folder: folder for the settings, metric lines, checkpoints and the SAE (docs/runs.md); None
            keeps everything in memory.
        metadata: added to the model, layer and weights in run.toml.
        output, resume, overwrite: as of :func:`~sae_kernels.training.train`. To resume, the batches
            must come in the same order again.
        on_step: called after every step with the 0-based step and its metric line or None.

    Raises:
        NonFiniteError: a loss or gradient norm was not finite and ``on_nonfinite`` is "stop".
        ValueError: fewer batches than steps; otherwise as ``end_to_end_loss``. The SAE keeps the
            weights from before either error, and is saved.
    """
    objective = config.objective or sae.objective_class()
    config = dataclasses.replace(config, route="autograd", objective=objective)
    weights = weights or EndToEnd()
    check_fits(sae, layer_width(model, layer, weights), layer)
    check_end_to_end(sae, objective, weights)
    if config.micro_batch_size is not None:
        raise ValueError(
            "micro_batch_size: expected none end to end, where a step's sequences go through the "
            f"model together, got {config.micro_batch_size}; take fewer sequences per step"
        )
    if config.resample_every is not None:
        raise ValueError(
            "resample_every: expected none end to end, where a token's squared error is not its "
            f"loss, got {config.resample_every}"
        )
    name = str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    about = {"model": name, "layer": layer, **dataclasses.asdict(weights), **(metadata or {})}
    place = {key: about.get(key) for key in ("model", "context_length")}
    location = RunLocation(folder, output or OutputConfig(), resume, overwrite)
    training = sae.training
    stream = TokenStream(batches)
    try:
        with ExitStack() as stack:
            kept = location.open(stack, "", Planned(sae, config, fitted=True), end_to_end=about)
            checkpoint = None if kept is None else kept.checkpoint
            if checkpoint is not None:
                sae.load_state_dict(pretrained.load(checkpoint).state_dict())
            through = _ThroughModel(model, layer, sae, config, weights)
            run = TrainingRun(through, kept, on_step, placed(place, [layer], [], location.output))
            if checkpoint is not None:
                run.load()
                stream.load_state_dict(run.cursor or {})
            stack.enter_context(run)
            drive([run], stream)
            result = run.result()
    finally:
        sae.train(training)
    if result.error is not None:
        raise result.error
    return result


class TokenStream:
    """Repeats the usable batches of tokens; ends if an iteration gives none.

    Args:
        batches: iterated over again at their end, which an iterator does not allow.

    Attributes:
        position: number of batches returned so far.
    """

    def __init__(self, batches: Batches) -> None:
        self._batches = self._repeated(batches)
        self.position = 0

    def __iter__(self) -> TokenStream:
        return self

    def __next__(self) -> TokenBatch:
        batch = next(self._batches)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position, for a checkpoint."""
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Skips the batches before the saved position, without running the model."""
        for i in range(int(state["position"])):
            if next(self, None) is None:
                raise ValueError(
                    f"batches: expected those that the run began with, {state['position']} up to "
                    f"its checkpoint, got {i}; give the same text and options"
                )

    @staticmethod
    def _repeated(batches: Batches) -> Iterator[TokenBatch]:
        found = True
        while found:
            found = False
            for inputs in batches:
                batch = TokenBatch.of(inputs)
                if batch.replaced.sum() > 1:
                    found = True
                    yield batch


class _ThroughModel(Trainable[TokenBatch]):
    """Trains an SAE in place on how its reconstruction changes a model's predictions."""

    training_step: AutogradStep

    def __init__(
        self,
        model: nn.Module,
        layer: str,
        sae: SparseAutoencoder,
        config: TrainConfig,
        weights: EndToEnd,
    ) -> None:
        super().__init__(make_step(sae, config), config)
        self.model, self.layer, self.weights = model, layer, weights
        self._skipped = 0
        self._last: EndToEndLoss | None = None

    @property
    def skipped(self) -> int:
        """Number of skipped steps."""
        return self._skipped

    def set_skipped(self, count: int) -> None:
        """Sets the number of skipped steps, from a checkpoint."""
        self._skipped = count

    def step(self, batch: TokenBatch) -> None:
        """One step on a batch of tokens."""
        self.sae.train()
        step, config, lr = self.training_step, self.config, self.learning_rate(self.made)
        spliced = SplicedSAE(step, self.layer, self.weights, self.k(self.made))
        result = measured_loss(self.model, batch, spliced)
        assert spliced.measured is not None
        # Gradients through a whole model overflow more easily, so their norm is always checked.
        clip_norm = config.optimizer.clip_norm
        finite = step.update(result.loss, lr, math.inf if clip_norm is None else clip_norm)
        if not finite and config.on_nonfinite == "stop":
            raise NonFiniteError.in_step(self.made)
        n_tokens = int(batch.attention_mask.sum())
        step.advance(spliced.measured.fired, n_tokens, finite, l0=result.l0)
        self.made += 1
        self.tokens += n_tokens
        self._skipped += not finite
        self._last = result

    def measured(self) -> dict[str, float]:
        """The parts of the last step's loss."""
        assert self._last is not None
        return {name: float(value.detach()) for name, value in self._last._asdict().items()}
