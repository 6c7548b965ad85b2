"""Base of the training steps: settings, dead-latent counters, schedules and saved state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from sae_kernels.backends import cpu
from sae_kernels.config.optimizer import OptimizerConfig
from sae_kernels.nn.objective import Context, SurveyContext
from sae_kernels.step.state import DeadLatents, SparsitySchedule, State, restore_

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sae_kernels.config.objective import ObjectiveConfig
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step.ranks import Ranks

    Pair = tuple[torch.Tensor, torch.Tensor]


class MicroBatches:
    """The micro-batches of a batch, each checked and scaled when its turn comes.

    Args:
        x: [B, input width], or micro-batches [b, input width].
        target: of a transcoder, like ``x``; else None.
        check: checks and scales the tokens and targets of one of them.

    Attributes:
        n_tokens: tokens of all together.

    Raises:
        ValueError: no micro-batch, or another number of them for the target than for x.
    """

    def __init__(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        target: torch.Tensor | Sequence[torch.Tensor] | None,
        check: Callable[[torch.Tensor, torch.Tensor | None], Pair],
    ) -> None:
        xs = [x] if isinstance(x, torch.Tensor) else list(x)
        if isinstance(target, torch.Tensor):
            targets: list[torch.Tensor | None] = [target]
        else:
            targets = [None] * len(xs) if target is None else list(target)
        if not xs or len(targets) != len(xs):
            came = f"{len(xs)} of x" + ("" if target is None else f" and {len(targets)} of target")
            raise ValueError(f"x, target: expected as many micro-batches, at least one, got {came}")
        self._check, self._given = check, list(zip(xs, targets, strict=True))
        self._whole = check(xs[0], targets[0]) if len(xs) == 1 else None
        self.n_tokens = sum(len(each) for each in xs)

    def __len__(self) -> int:
        return len(self._given)

    def __iter__(self) -> Iterator[Pair]:
        if self._whole is not None:
            yield self._whole
            return
        for x, target in self._given:
            yield self._check(x, target)

    def loss_scale(
        self,
        loss: str,
        scratch_like: Callable[[torch.Tensor], torch.Tensor | None] = lambda _: None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor of the squared error, and the summed squared distance from the mean.

        Args:
            loss: the setting.
            scratch_like: memory to work in, as large as some targets; None: fresh.
        """
        variance = Variance()
        for _, target in self:
            variance.add(target, scratch_like(target))
        return variance.loss_scale(loss)

    def inputs(self, centre: Callable[[torch.Tensor], torch.Tensor]) -> Inputs:
        """The encoder's inputs, to be iterated over any number of times."""
        return Inputs(self, centre)


class Inputs:
    """The encoder's inputs of micro-batches; ``centre`` makes them of tokens."""

    def __init__(
        self, micro_batches: MicroBatches, centre: Callable[[torch.Tensor], torch.Tensor]
    ) -> None:
        self.micro_batches, self.centre = micro_batches, centre

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.centre(x) for x, _ in self.micro_batches)


class Variance:
    """The summed squared distance of rows from their mean, over micro-batches in turn.

    Sums run over each token first, so that they do not depend on the number of threads. Parts are
    joined by Chan, Golub and LeVeque's formula.

    Attributes:
        total: scalar, the sum so far.
        n_rows: rows so far.
    """

    total: torch.Tensor
    _mean: torch.Tensor

    def __init__(self) -> None:
        self.n_rows = 0

    def add(self, rows: torch.Tensor, scratch: torch.Tensor | None = None) -> None:
        """Takes in fp32 rows [b, width]; ``scratch`` is overwritten."""
        mean = rows.mean(0)
        total = torch.sub(rows, mean, out=scratch).square_().sum(1).sum()
        if self.n_rows:
            share, away = len(rows) / (self.n_rows + len(rows)), mean - self._mean
            total = self.total + total + self.n_rows * share * away.square().sum()
            mean = self._mean + share * away
        self.n_rows, self._mean, self.total = self.n_rows + len(rows), mean, total

    def loss_scale(self, loss: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor of the rows' squared errors in a loss by this name, and the variance."""
        total = self.total
        return (1 / total if loss == "fvu" else torch.ones_like(total) / self.n_rows), total


class StepResult(NamedTuple):
    """Figures of one training step: scalar tensors, left on the device; ``fired`` is [F].

    Attributes:
        loss: the whole loss.
        fvu: squared error over the batch's variance.
        l0: latents per token that fired.
        aux_loss: AuxK's part of the loss.
        skipped: whether the loss or the gradient norm was not finite and nothing was changed.
        fired: int32 [F], how often each latent fired.
    """

    loss: torch.Tensor
    fvu: torch.Tensor
    l0: torch.Tensor
    aux_loss: torch.Tensor
    skipped: torch.Tensor
    fired: torch.Tensor


class TrainingStep(Protocol):
    """Protocol of a training step: the trainer takes any object that follows it.

    Attributes:
        sae: the module in training, with ``config``, ``W_enc`` (for its device) and
            ``save_pretrained``.
        dead: the dead-latent counters, or another object with ``mask()``.
    """

    sae: SparseAutoencoder
    dead: DeadLatents

    def __call__(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        *,
        lr: float,
        k: float | None = None,
        target: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> StepResult:
        """One update from raw activations [B, input width].

        With ``micro_batch_size`` x, and a transcoder's target, come as sequences of micro-batches
        [b, width]; together they are the batch.
        """

    def state(self) -> State:
        """All that the next step depends on, without the weights."""

    def load_state(self, state: State) -> None:
        """Restores what :meth:`state` returned; the SAE has its weights already."""

    def weights(self) -> dict[str, torch.Tensor]:
        """The SAE's state dict with its master weights in fp32."""

    def restore_(self) -> None:
        """Leaves the SAE ready for use outside training; no step can follow."""


class StepBase:
    """Base class of FusedStep and AutogradStep.

    Args:
        sae: the module, trained in place.
        objective: loss and penalties, of the architecture's ``objective_class``; None: its
            defaults.
        optimizer: Adam's settings and precisions; None: the defaults.
        steps: length of the run, over which the sparsity schedule unfolds.
        seed: seed of a Matryoshka SAE's random prefixes.
        ranks: the processes that train the SAE together, which has some of its latents here; None:
            this one has all.

    Attributes:
        sae, objective, optimizer, ranks: as given, or the defaults.
        dtype: dtype of the kernels' operands.
        dead: the dead-latent counters.
        schedule: coefficient and exponent of the sparsity penalty.
        k_aux: dead latents per token in AuxK.
    """

    def __init__(
        self,
        sae: SparseAutoencoder,
        objective: ObjectiveConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        *,
        steps: int = 1000,
        seed: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        objective = sae.objective_class() if objective is None else objective
        sae.check_objective(objective)
        self.sae, self.objective, self.seed, self.ranks = sae, objective, seed, ranks
        self._reads, self._writes = sae.config.input_width, sae.config.output_width
        self._transcodes = sae.config.transcodes
        self.optimizer = OptimizerConfig() if optimizer is None else optimizer
        device = sae.W_enc.device
        self.dtype = compute_dtype(self.optimizer.compute, device)
        self._check_settings()
        if ranks is not None:
            ranks.check(self)
        self._dtype_before, sae.compute_dtype = sae.compute_dtype, self.dtype
        self.dead = DeadLatents(len(sae.latents), objective.dead_after_tokens, device)
        self.schedule = SparsitySchedule(objective, steps)
        self.k_aux = objective.k_aux or max(1, sae.config.input_width // 2)

    def _check_settings(self) -> None:
        """Raises for what a step cannot train; the SAE has not been touched yet."""

    def checked(
        self, x: torch.Tensor, target: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Checks and scales a batch: tokens and targets, fp32, in the scale of training.

        Raises:
            ValueError: shapes other than [B, input width] and [B, output width] with B > 0; a
                target for an SAE of its input, or none for a transcoder.
        """
        config = self.sae.config
        if x.dim() != 2 or x.shape[1] != self._reads or x.shape[0] == 0:
            raise ValueError(
                f"x: expected shape [B, {self._reads}] with B > 0 (tokens by "
                f"{_widths('d_in', config.d_in, config.n_layers)}), got {list(x.shape)}"
            )
        x = _scaled(x.float(), config.activation_scale)
        if not self._transcodes:
            if target is not None:
                raise ValueError("target: expected none, the SAE reconstructs its input; got one")
            return x, x
        if target is None:
            raise ValueError("target: expected what the transcoder is to reconstruct, got None")
        if target.shape != (x.shape[0], self._writes):
            raise ValueError(
                f"target: expected shape [{x.shape[0]}, {self._writes}] (a row per token), got "
                f"{list(target.shape)}"
            )
        return x, _scaled(target.float(), config.target_scale)

    def survey(self, inputs: Inputs, k: float | None, W_enc: torch.Tensor | None = None) -> Any:
        """What the objective needs to know of all micro-batches before the first; else None."""
        sae, n_tokens = self.sae, inputs.micro_batches.n_tokens
        if len(inputs.micro_batches) == 1:
            return None
        if self.ranks is not None:
            raise ValueError("x: expected whole batches with latents over ranks, got micro-batches")
        kept = sae.kept_per_token(self._k(k), self.objective)
        with torch.no_grad():
            return sae.survey(inputs, SurveyContext(self.objective, n_tokens, kept, W_enc))

    def _k(self, k: float | None) -> float:
        return getattr(self.sae.config, "k", 0) if k is None else k

    def context(
        self,
        x_centred: torch.Tensor,
        target: torch.Tensor,
        scale: torch.Tensor,
        k: float | None = None,
        *,
        total_tokens: int | None = None,
        survey: Any = None,
        skip_input: torch.Tensor | None = None,
        leaves: dict[str, torch.Tensor] | None = None,
    ) -> Context:
        """The objective's context of a batch at this step; :class:`Context` has the arguments."""
        sae, schedule, ranks = self.sae, self.schedule, self.ranks
        prefixes = sae.prefixes(self.objective, schedule.step, self.seed)
        if prefixes is not None and ranks is not None:
            prefixes = ranks.prefixes(prefixes, sae.latents)
        return Context(
            sae=sae,
            objective=self.objective,
            x=x_centred,
            target=target,
            scale=scale,
            k=self._k(k),
            coefficient=schedule.coefficient(),
            p=schedule.p,
            observe=schedule.observe,
            dead_mask=self.dead.mask,
            total_tokens=total_tokens,
            survey=survey,
            prefixes=prefixes,
            skip_input=skip_input,
            leaves=leaves,
            ranks=ranks,
        )

    def advance(
        self,
        fired: torch.Tensor,
        n_tokens: int,
        finite: torch.Tensor,
        l0: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Updates counters and schedules after a step and returns its L0.

        A step that was not ``finite`` only moves the schedule on.
        """
        self.sae.is_fresh = False
        if l0 is None:
            kept = fired.sum()
            l0 = (kept if self.ranks is None else self.ranks.total(kept)) / n_tokens
        self.dead.update(fired, n_tokens, ~finite)
        self.schedule.advance(l0)
        self.sae.after_step_(finite)
        return l0

    def _live_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors outside the SAE's state dict that every step changes in place, by name."""
        saved = self.sae.state_dict().keys()
        buffers = {f"sae.{n}": b for n, b in self.sae.named_buffers() if n not in saved}
        return {"dead.since_fired": self.dead.since_fired, **buffers}

    def state(self) -> State:
        """All that the next step depends on, without the weights; nothing is copied."""
        return State(self._live_tensors(), {}) | self.schedule.state()

    def load_state(self, state: State) -> None:
        """Restores what :meth:`state` returned; the SAE has its weights already.

        Raises:
            DataError: the state of another SAE or configuration.
        """
        restore_(self._live_tensors(), state)
        device = self.dead.since_fired.device
        mine = {n: t.to(device) for n, t in state.tensors.items() if n.startswith("schedule.")}
        self.schedule.load_state(state._replace(tensors=mine))

    def weights(self) -> dict[str, torch.Tensor]:
        """The SAE's state dict with its master weights in fp32."""
        return dict(self.sae.state_dict())

    def restore_(self) -> None:
        """Gives the SAE its own compute dtype back; no step can follow."""
        self.sae.compute_dtype = self._dtype_before


def _widths(name: str, width: int, n_layers: int) -> str:
    return name if n_layers == 1 else f"{n_layers} layers of {name} = {width}"


def _scaled(x: torch.Tensor, scale: float) -> torch.Tensor:
    return x if scale == 1 else x * scale


def loss_scale(x: torch.Tensor, loss: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The factor of the squared error, and the batch's summed squared distance from its mean."""
    variance = Variance()
    variance.add(x)
    return variance.loss_scale(loss)


def compute_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype of a ``compute`` setting on a device.

    "auto" is bfloat16 where the device multiplies it natively (a GPU, a CPU with AMX) and float32
    elsewhere: without such a unit bf16 operands are widened first and only cost accuracy.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    native = cpu.reason(torch.device("cpu"), torch.bfloat16) is None and cpu.isa() == "amx"
    return torch.bfloat16 if native else torch.float32
