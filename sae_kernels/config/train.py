"""Settings of a training run: steps, batches, schedules and seeds."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import field
from typing import Any, Literal

from sae_kernels.config.base import FRACTION, NATURAL, POSITIVE, POSITIVE_INTEGER, Settings, setting
from sae_kernels.config.objective import ObjectiveConfig  # noqa: TC001  # read by get_type_hints
from sae_kernels.config.optimizer import OptimizerConfig
from sae_kernels.errors import name_hint

# Measured: the best rate falls with the root of the number of steps (docs/training.md).
_USUAL_STEPS, _LARGEST_LR = 30_000, 0.01


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """Settings of a training run.

    ``objective`` is of the architecture's ``objective_class`` (None: its defaults) and
    ``optimizer`` an :class:`OptimizerConfig`; everything else is the run's own.

    Example:
        >>> TrainConfig(steps=2000, batch_size=1024).optimizer.adam
        'dense'
    """

    table = "train"

    steps: int = setting(1000, "optimizer steps", POSITIVE_INTEGER)
    batch_size: int = setting(2048, "tokens per step", POSITIVE_INTEGER)
    micro_batch_size: int | None = setting(
        None,
        "tokens that go through a step at once, for batches beyond memory; None is all of them "
        "(docs/training.md)",
        POSITIVE_INTEGER,
    )
    lr: float | None = setting(
        None,
        "peak learning rate; None is 2e-4 / sqrt(n_latents / 2^14) (sparsify, dictionary_learning; "
        "scaling law of arXiv 2406.04093), in a run of fewer than 30,000 steps times sqrt(30,000 / "
        "steps), up to 0.01",
        POSITIVE,
    )
    warmup_steps: int | None = setting(
        None,
        "steps of linear learning-rate warm-up; None is 1000 (sparsify, dictionary_learning) but "
        "at most a twentieth of the run",
        NATURAL,
    )
    decay_fraction: float = setting(
        0.2,
        "last fraction of the run over which the learning rate falls linearly to 0 "
        "(dictionary_learning: 0.2)",
        FRACTION,
    )
    k_start: int | None = setting(
        None,
        "value of k at the first step, from which it changes linearly to the SAE's k; None is off",
        POSITIVE_INTEGER,
    )
    k_anneal_steps: int = setting(
        0, "steps from k_start to k (sparsify's k_decay_steps); 0 is off", NATURAL
    )
    resample_every: int | None = setting(
        None,
        "steps after which dead latents start anew as directions of badly reconstructed tokens "
        "(Bricken et al., 2023), while the learning rate does not fall; None is never",
        POSITIVE_INTEGER,
    )
    route: Literal["fused", "autograd"] = setting(
        "fused",
        "training step: fused (FusedStep) or autograd (AutogradStep, with torch.optim.Adam)",
    )
    device: str = setting(
        "auto", "device to train on; auto is a GPU that the kernels support, else the CPU"
    )
    normalize_activations: Literal["none", "sqrt_d"] = setting(
        "sqrt_d",
        "scaling of the activations: none, or sqrt_d, to a mean norm of sqrt(d_in), estimated on "
        "a sample (SAELens' expected_average_only_in)",
    )
    init_b_dec: Literal["geometric_median", "mean", "zeros"] = setting(
        "geometric_median",
        "initial b_dec: geometric_median of a sample (OpenAI, dictionary_learning), its mean "
        "(sparsify) or zeros",
    )
    seed: int = setting(
        0, "seed of the weights, and of the order of the data unless data_seed is given", NATURAL
    )
    data_seed: int | None = setting(
        None,
        "seed of the order of the data, the same in runs that share one stream; None is seed",
        NATURAL,
    )
    on_nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "at a loss that is NaN or infinite: stop with an error, or skip the step and count it",
    )
    log_every: int = setting(10, "steps between metric lines", POSITIVE_INTEGER)
    cuda_graph: bool = setting(
        True,
        "on a GPU, replay steps as a CUDA graph where the host decides nothing in them "
        "(docs/training.md); false launches kernel by kernel",
    )
    objective: ObjectiveConfig | None = None
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.route == "autograd":
            self.optimizer.expect_torch_adam()

    @classmethod
    def of(cls, objective: type[ObjectiveConfig], **settings: Any) -> TrainConfig:
        """Settings of objective, optimizer and run from one list of names.

        Args:
            objective: the architecture's ``objective_class``.
            settings: by name; each name belongs to one of the three.

        Raises:
            ValueError: an unknown name; the message suggests the nearest.

        Example:
            >>> config = TrainConfig.of(ObjectiveConfig, steps=10, clip_norm=1.0, loss="mse")
            >>> config.steps, config.optimizer.clip_norm, config.objective.loss
            (10, 1.0, 'mse')
        """
        parts: dict[str, type[Settings]] = {
            "objective": objective,
            "optimizer": OptimizerConfig,
            "train": cls,
        }
        given: dict[str, dict[str, Any]] = {name: {} for name in parts}
        names = {part: [f.name for f in dataclasses.fields(c)] for part, c in parts.items()}
        for name, value in settings.items():
            owner = next((part for part, known in names.items() if name in known), None)
            if owner is None:
                known = [each for part in names.values() for each in part]
                raise ValueError(f"unknown setting {name!r}; {name_hint(name, known)}")
            given[owner][name] = value
        return cls(
            objective=objective(**given["objective"]),
            optimizer=OptimizerConfig(**given["optimizer"]),
            **given["train"],
        )

    def to_dict(self) -> dict[str, Any]:
        """The run's own settings by name; objective and optimizer have their own tables."""
        values = super().to_dict()
        del values["objective"], values["optimizer"]
        return values

    @property
    def order_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    def learning_rate(self, step: int, n_latents: int) -> float:
        """Learning rate at a 0-based step: warm-up, plateau, linear decay to 0.

        Example:
            >>> config = TrainConfig(steps=100, lr=1.0, warmup_steps=10, decay_fraction=0.2)
            >>> [round(config.learning_rate(s, 1), 2) for s in (0, 9, 50, 90, 99)]
            [0.1, 1.0, 1.0, 0.5, 0.05]
        """
        peak = self._default_lr(n_latents) if self.lr is None else self.lr
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(1000, self.steps // 20)
        rising = (step + 1) / warmup if warmup else 1.0
        return peak * max(0.0, min(1.0, rising, self._left(step)))

    def _left(self, step: int) -> float:
        """Steps from a 0-based one to the last in units of the decay, which begins at 1."""
        return (self.steps - step) / max(1.0, self.decay_fraction * self.steps)

    def resamples(self, made: int) -> bool:
        """Whether dead latents start anew after so many steps.

        Example:
            >>> config = TrainConfig(steps=100, resample_every=30, decay_fraction=0.2)
            >>> [made for made in range(101) if config.resamples(made)]
            [30, 60]
        """
        every = self.resample_every
        return every is not None and made > 0 and made % every == 0 and self._left(made) >= 1

    def _default_lr(self, n_latents: int) -> float:
        usual = 2e-4 / math.sqrt(n_latents / 2**14)
        if self.steps >= _USUAL_STEPS:
            return usual
        return max(usual, min(_LARGEST_LR, usual * math.sqrt(_USUAL_STEPS / self.steps)))

    def k_at(self, step: int, k: float) -> float:
        """The annealed k at a 0-based step, an integer if k is one.

        Example:
            >>> [TrainConfig(k_start=8, k_anneal_steps=4).k_at(s, 4) for s in range(6)]
            [8, 7, 6, 5, 4, 4]
        """
        if self.k_start is None or step >= self.k_anneal_steps:
            return k
        now = self.k_start + (k - self.k_start) * step / self.k_anneal_steps
        return round(now) if isinstance(k, int) else now
