"""How to train: every setting with its default and where the default comes from."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

_CHOICES = {
    "loss": ("fvu", "mse"),
    "sparsity": ("none", "l1", "lp", "l0", "target_l0", "tanh"),
    "matryoshka": ("mean", "sum"),
    "compute": ("auto", "float32", "bfloat16", "float16"),
    "master": ("float32", "split"),
    "states": ("float32", "bfloat16"),
    "copies": ("both", "encoder"),
    "route": ("fused", "composable"),
    "adam": ("dense", "lazy"),
    "activation_scale": ("none", "sqrt_d"),
    "init_b_dec": ("geometric_median", "mean", "zeros"),
    "on_nonfinite": ("stop", "skip"),
}
_INTEGERS = {
    "steps": 1,
    "batch_size": 1,
    "warmup_steps": 0,
    "k_aux": 1,
    "auxk_latents": 1,
    "dead_after_tokens": 1,
    "k_start": 1,
    "k_anneal_steps": 0,
    "sparsity_warmup_steps": 0,
    "p_steps": 1,
    "random_prefixes": 0,
    "seed": 0,
    "data_seed": 0,
    "log_every": 1,
}
_OPTIONAL = (
    "lr",
    "warmup_steps",
    "clip_norm",
    "k_aux",
    "k_start",
    "sparsity_warmup_steps",
    "target_l0",
    "data_seed",
)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    Attributes:
        steps: optimizer steps.
        batch_size: tokens per step.
        lr: peak learning rate; None is 2e-4 / sqrt(n_latents / 2^14) (sparsify,
            dictionary_learning; scaling law of arXiv 2406.04093).
        beta1, beta2, eps: of Adam (torch's and the peers' defaults).
        adam: "dense", as torch.optim.Adam, or "lazy": latents that did not fire keep their row and
            its moments untouched, as torch.optim.SparseAdam.
        warmup_steps: linear warm-up; None is 1000 (sparsify, dictionary_learning) but at most a
            twentieth of the run.
        decay_fraction: the learning rate falls linearly to 0 over this last part of the run
            (dictionary_learning: the last 20 %).
        clip_norm: global gradient norm, after projection (dictionary_learning: 1.0); None is off
            (sparsify, OpenAI).
        loss: "fvu", squared error over the batch's variance (sparsify), or "mse", squared error
            per token (dictionary_learning, SAELens).
        sparsity: the penalty added to the loss, per token (docs/architectures.md): "none"; "l1",
            the sum of the codes; "lp", the sum of their p-th powers, p falling from 1 (p-annealing,
            arXiv 2408.00113); "l0", how many fire, and "target_l0", (L0 / target_l0 - 1)^2, through
            JumpReLU's estimator; "tanh", the sum of tanh(tanh_scale * code).
        sparsity_coefficient: multiplies the penalty.
        sparsity_warmup_steps: the coefficient rises linearly from 0; None is 2000
            (dictionary_learning) but at most a fifth of the run.
        sparsity_norm_weighted: weigh codes by the norm of their decoder row in "l1", "lp" and
            "tanh" (Conerly et al., April 2024; Anthropic, January 2025).
        target_l0: what "target_l0" aims at. With another penalty the coefficient follows it: each
            step it grows or shrinks by 10 / steps of itself (noanabeshima). None: it stays.
        tanh_scale: 4 (Anthropic, January 2025; SAELens).
        preact_coefficient: weight of the loss that raises dead latents of a JumpReLU SAE,
            relu(threshold - h) weighed by the decoder norm (SAELens: 3e-6); 0 is off.
        p_end, p_steps, p_start: p takes p_steps values from 1 to p_end, the first change after
            this part of the run; at each the coefficient is scaled so that the penalty stays what
            it was (dictionary_learning).
        fix_shrinkage: once a ReLU SAE is trained, fit a scale per latent and fold it into the
            encoder (Wright and Sharkey 2024): L1 makes codes too small.
        matryoshka: squared errors of the prefixes are weighed equally and add up to one ("mean",
            dictionary_learning up to its second 1 / G) or count in full each ("sum", SAELens).
        random_prefixes: a Matryoshka SAE's prefixes are drawn anew each step, so many and the
            whole, sizes by a Pareto law (noanabeshima); 0: the SAE's own groups.
        balance_coefficient: weight of a Switch SAE's load-balance loss, E sum_i F_i P_i (times d_in
            with loss "mse": amudide/switch_sae's lb_alpha).
        multi_topk: adds FVU of the 4k reconstruction / 8 (arXiv 2406.04093, A.5; sparsify).
        auxk_alpha: weight of AuxK, 1/32 (OpenAI, dictionary_learning); 0 is off.
        k_aux: dead latents per token in AuxK; None is d_in / 2 (sparsify, dictionary_learning).
        auxk_latents: at most this many dead latents take part, the longest dead first.
        dead_after_tokens: a latent is dead after so many tokens without firing (10M: OpenAI,
            sparsify, dictionary_learning).
        k_start, k_anneal_steps: k falls linearly from k_start to k over these steps (sparsify's
            k_decay_steps); None and 0 are off.
        device: where to train; "auto" is a GPU that the kernels can use, else the CPU.
        compute: dtype of the kernels' operands. "auto" is bfloat16 where the device multiplies it
            natively (a GPU, a CPU with AMX), else float32.
        master: W_enc and W_dec in "float32", or "split": the bf16 matrices that the kernels read
            and the 16 bits that they lack, which together are the same fp32 numbers in 4 bytes a
            weight instead of 6. Needs compute bfloat16 and route fused.
        states: Adam's moments of W_enc and W_dec in "float32" or, with stochastic rounding, in
            "bfloat16" (route fused).
        copies: with fp32 masters and compute in 16 bits, of which matrices there is a copy in the
            compute dtype: "both", or "encoder" alone, W_dec being read in fp32.
        route: "fused" (FusedStep) or "composable" (autograd and torch.optim.Adam).
        activation_scale: "none", or "sqrt_d": activations are scaled to mean norm sqrt(d_in),
            estimated on the first ones (SAELens' expected_average_only_in).
        init_b_dec: "geometric_median" of a first sample (OpenAI, dictionary_learning), "mean"
            (sparsify) or "zeros".
        seed: of the weights, and of the order of the data unless that has its own.
        data_seed: of the order of the data; None is seed. Runs that share one stream of data share
            it too.
        on_nonfinite: "stop" with an error at a loss that is NaN or infinite, or "skip" the step
            and count it.
        log_every: steps between metric lines.
    """

    steps: int = 1000
    batch_size: int = 2048
    lr: float | None = None
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    adam: Literal["dense", "lazy"] = "dense"
    warmup_steps: int | None = None
    decay_fraction: float = 0.2
    clip_norm: float | None = None
    loss: Literal["fvu", "mse"] = "fvu"
    sparsity: Literal["none", "l1", "lp", "l0", "target_l0", "tanh"] = "none"
    sparsity_coefficient: float = 0.0
    sparsity_warmup_steps: int | None = None
    sparsity_norm_weighted: bool = False
    target_l0: float | None = None
    tanh_scale: float = 4.0
    preact_coefficient: float = 0.0
    p_end: float = 0.2
    p_steps: int = 10
    p_start: float = 0.25
    fix_shrinkage: bool = False
    matryoshka: Literal["mean", "sum"] = "mean"
    random_prefixes: int = 0
    balance_coefficient: float = 0.0
    multi_topk: bool = False
    auxk_alpha: float = 1 / 32
    k_aux: int | None = None
    auxk_latents: int = 4096
    dead_after_tokens: int = 10_000_000
    k_start: int | None = None
    k_anneal_steps: int = 0
    device: str = "auto"
    compute: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    master: Literal["float32", "split"] = "float32"
    states: Literal["float32", "bfloat16"] = "float32"
    copies: Literal["both", "encoder"] = "both"
    route: Literal["fused", "composable"] = "fused"
    activation_scale: Literal["none", "sqrt_d"] = "sqrt_d"
    init_b_dec: Literal["geometric_median", "mean", "zeros"] = "geometric_median"
    seed: int = 0
    data_seed: int | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    log_every: int = 10

    def __post_init__(self) -> None:
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            self._expect(name, whole and value >= least, f"an integer of at least {least}")
        for name in ("lr", "clip_norm", "eps", "target_l0", "tanh_scale"):
            self._expect(name, self._number(name) > 0, "a positive number")
        for name in ("beta1", "beta2"):
            self._expect(name, 0 <= self._number(name) < 1, "a number in [0, 1)")
        self._expect(
            "decay_fraction", 0 <= self._number("decay_fraction") <= 1, "a number in [0, 1]"
        )
        for name in (
            "auxk_alpha",
            "sparsity_coefficient",
            "preact_coefficient",
            "balance_coefficient",
        ):
            self._expect(name, self._number(name) >= 0, "a number of at least 0")
        for name in ("p_end", "p_start"):
            self._expect(name, 0 <= self._number(name) <= 1, "a number in [0, 1]")
        for name in ("multi_topk", "sparsity_norm_weighted", "fix_shrinkage"):
            self._expect(name, isinstance(getattr(self, name), bool), "true or false")
        for name, choices in _CHOICES.items():
            self._expect(name, getattr(self, name) in choices, "one of " + ", ".join(choices))
        self._expect("device", isinstance(self.device, str), "auto or a device such as cuda:0")
        if self.route == "composable":
            for name, needed in (("adam", "dense"), ("master", "float32"), ("states", "float32")):
                fits = getattr(self, name) == needed
                self._expect(name, fits, f"{needed!r} with route 'composable' (torch's Adam)")

    def _number(self, name: str) -> float:
        """The setting, or NaN (which is in no range) for what is no finite number."""
        value = getattr(self, name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return value if number and math.isfinite(value) else math.nan

    def _expect(self, name: str, fits: bool, expected: str) -> None:
        value = getattr(self, name)
        if not fits and not (value is None and name in _OPTIONAL):
            raise ValueError(f"{name}: expected {expected}, got {value!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they go into the run's config."""
        return dataclasses.asdict(self)

    @property
    def order_seed(self) -> int:
        """The seed of the order of the data."""
        return self.seed if self.data_seed is None else self.data_seed

    def learning_rate(self, step: int, n_latents: int) -> float:
        """The learning rate of a step (from 0): warm-up, plateau, linear decay to 0.

        Example:
            >>> config = TrainConfig(steps=100, lr=1.0, warmup_steps=10, decay_fraction=0.2)
            >>> [round(config.learning_rate(s, 1), 2) for s in (0, 9, 50, 90, 99)]
            [0.1, 1.0, 1.0, 0.5, 0.05]
        """
        peak = 2e-4 / math.sqrt(n_latents / 2**14) if self.lr is None else self.lr
        warmup = self.warmup_steps
        if warmup is None:
            warmup = min(1000, self.steps // 20)
        decay = max(1.0, self.decay_fraction * self.steps)
        rising = (step + 1) / warmup if warmup else 1.0
        return peak * max(0.0, min(1.0, rising, (self.steps - step) / decay))

    def k_at(self, step: int, k: float) -> float:
        """How many latents are kept at a step (from 0); whole where k is.

        Example:
            >>> [TrainConfig(k_start=8, k_anneal_steps=4).k_at(s, 4) for s in range(6)]
            [8, 7, 6, 5, 4, 4]
        """
        if self.k_start is None or step >= self.k_anneal_steps:
            return k
        now = self.k_start + (k - self.k_start) * step / self.k_anneal_steps
        return round(now) if isinstance(k, int) else now
