"""What training asks of an architecture, with the answers of a plain one.

An architecture overrides what is different for it; nothing outside asks which class it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sae_kernels.config.objective import ObjectiveConfig
from sae_kernels.nn.objective import Reconstruction, sparsity_penalty

if TYPE_CHECKING:
    import torch

    from sae_kernels.codes import SparseCodes
    from sae_kernels.nn.objective import Context, Prefixes
    from sae_kernels.primitives.terms import Gradient


class TrainingHooks:
    """Base of :class:`~sae_kernels.nn.SparseAutoencoder`; see there for the weights."""

    objective_class: ClassVar[type[ObjectiveConfig]] = ObjectiveConfig

    def activate(self, pre: SparseCodes) -> SparseCodes:
        """The codes from kept pre-activations."""
        raise NotImplementedError

    @property
    def drops_zeros(self) -> bool:
        """Whether a code of 0 is a dropped entry: no gradient, not fired."""
        return True

    def check_objective(self, objective: ObjectiveConfig) -> None:
        """Raises for an objective of another architecture, or one that these settings rule out."""
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
        """How many latents :meth:`select` is to keep in training for this k."""
        return k

    def reconstructions(self, pre: SparseCodes, context: Context) -> list[Reconstruction]:
        """What training reconstructs from the kept pre-activations, the main one first."""
        return [Reconstruction(self.activate(pre).values, drops_zeros=self.drops_zeros)]

    def penalties(
        self, pre: SparseCodes, parts: list[Reconstruction], context: Context
    ) -> list[torch.Tensor]:
        """Scalars that training adds to the loss, differentiable in entries and vectors."""
        objective = context.objective
        if objective.sparsity == "none" or not objective.sparsity_coefficient:
            return []
        return [context.coefficient * self.sparsity(pre, parts, context)]

    def sparsity(
        self, pre: SparseCodes, parts: list[Reconstruction], context: Context
    ) -> torch.Tensor:
        """The penalty that the settings name, mean over the tokens, without its coefficient."""
        return sparsity_penalty(pre.with_values(parts[0].values), context)

    def main_codes(
        self, pre: SparseCodes, values: torch.Tensor, k: float, objective: Any
    ) -> SparseCodes:
        """The codes of the main reconstruction alone, out of the entries of all."""
        return pre.with_values(values)

    def sums_over_entries(self, objective: Any) -> bool:
        """Whether the objective of a batch is a sum over tokens and latents.

        Such an architecture can be trained by dense products over tiles of latents.
        """
        return False

    def prefixes(self, objective: Any, step: int, seed: int) -> Prefixes | None:
        """A Matryoshka SAE's prefixes of latents at a 0-based step."""
        return None

    def entry_leaves(self, pre: SparseCodes) -> dict[str, torch.Tensor]:
        """What the objective depends on besides entries and vectors of latents, by name."""
        return {}

    def with_leaves(self, pre: SparseCodes, leaves: dict[str, torch.Tensor]) -> SparseCodes:
        """The entries with these in the place of what :meth:`entry_leaves` gave."""
        return pre

    def leaf_gradients(
        self, pre: SparseCodes, grads: dict[str, torch.Tensor], x_centred: torch.Tensor
    ) -> dict[str, Gradient]:
        """Gradients of parameters from those of :meth:`entry_leaves`."""
        return {}

    def after_step_(self, finite: torch.Tensor) -> None:
        """Changes what follows training's batches; nothing where the step was not finite."""

    def step_figures(self, fired: torch.Tensor) -> dict[str, float]:
        """Figures for the metric line, from how often each latent fired in a step, int [F]."""
        return {}

    def rows_to_finish(self, objective: Any) -> int:
        """How many raw rows :meth:`finish_training_` wants to see; 0: it does nothing."""
        return 0

    def finish_training_(self, x: torch.Tensor, objective: Any) -> None:
        """What is fitted once all steps are made, on rows [n, input width] in training's scale."""
