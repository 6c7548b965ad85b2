"""What is trained, and what a weight of it costs."""

from __future__ import annotations

from dataclasses import dataclass, field

from sae_kernels.config import OptimizerConfig


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Attributes:
        d_in, n_latents, k: D, F and K of a TopK SAE.
        batch: tokens of a step on all GPUs together.
        dtype: of the products, "bfloat16", "float16" or "float32".
        config: master_weights, moment_dtype, compute_copies and adam count here.

    Raises:
        ValueError: k > n_latents, or a split master without bf16.
    """

    d_in: int
    n_latents: int
    k: int
    batch: int
    dtype: str = "bfloat16"
    config: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.n_latents:
            raise ValueError(f"k: expected 1 <= k <= n_latents = {self.n_latents}, got {self.k}")
        if self.config.master_weights == "split" and self.dtype != "bfloat16":
            raise ValueError(
                f"compute: expected 'bfloat16' with master_weights 'split', got {self.dtype!r}"
            )

    @property
    def element_bytes(self) -> int:
        """Of an operand of the encoder."""
        return 4 if self.dtype == "float32" else 2

    @property
    def decoder_bytes(self) -> int:
        """Of an element of W_dec as the kernels read it."""
        reads_master = (
            self.config.master_weights == "float32" and self.config.compute_copies == "encoder"
        )
        return 4 if reads_master else self.element_bytes

    @property
    def copy_bytes(self) -> int:
        """Of the compute copies of a latent's two weights; a split master is its own copy."""
        if self.dtype == "float32" or self.config.master_weights == "split":
            return 0
        return 4 if self.config.compute_copies == "both" else 2

    @property
    def state_bytes(self) -> int:
        """Held for a latent's two weights: masters, moments and copies (docs/training.md)."""
        return 2 * (4 + 2 * self._moment_bytes) + self.copy_bytes

    @property
    def update_bytes(self) -> int:
        """Read and written by an update of a latent's two weights; copies are only written."""
        return 2 * 2 * (4 + 2 * self._moment_bytes) + self.copy_bytes

    @property
    def _moment_bytes(self) -> int:
        return 4 if self.config.moment_dtype == "float32" else 2
