"""ReLU SAEs: every positive latent, sparse by a penalty; and the shrinkage fix."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from sae_kernels import functional
from sae_kernels.config.base import setting
from sae_kernels.config.objective import PenalisedObjective
from sae_kernels.config.sae import SAEConfig
from sae_kernels.nn.base import SparseAutoencoder
from sae_kernels.nn.initialise import bounds_at
from sae_kernels.nn.registry import FREE_NORMS, Preset, register
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.row_grad import row_grad

if TYPE_CHECKING:
    from sae_kernels.codes import LatentOrder, SparseCodes
    from sae_kernels.step.ranks import Ranks

_LEAST = 0.1  # smallest scale: one that is not positive would turn a latent off
_FITTED = 32768  # tokens from which the shrinkage fix is fitted


@dataclasses.dataclass(frozen=True)
class ReLUConfig(SAEConfig):
    """Settings of a ReLU SAE (Bricken et al. 2023; April update of Conerly et al. 2024).

    Example:
        >>> ReLUConfig(768, 24576).unit_norm_decoder
        True
    """

    architecture: ClassVar[str] = "relu"


@dataclasses.dataclass(frozen=True)
class ReLUObjective(PenalisedObjective):
    """Training objective of a ReLU SAE; by default squared error and L1, with L0 held at 32.

    Example:
        >>> ReLUObjective(sparsity="lp").target_l0
        32.0
    """

    fix_shrinkage: bool = setting(
        False,
        "after training, fit one scale per latent and fold it into the encoder (Wright and "
        "Sharkey 2024), as L1 makes codes too small",
    )


@register
class ReLUSAE(SparseAutoencoder):
    """ReLU SAE, ``x_hat = b_dec + W_dec^T relu(W_enc (x - b_dec) + b_enc)``.

    Sparse by its penalty: L1 (Bricken et al. 2023), L1 weighted by the decoder norm (Conerly et
    al., April 2024) or L_p with p falling from 1 (Karvonen et al., arXiv 2408.00113).

    Example:
        >>> import torch
        >>> from sae_kernels.nn import ReLUSAE
        >>> sae = ReLUSAE(8, 32)
        >>> bool((sae.encode(torch.randn(5, 8)).values > 0).all())
        True
    """

    config: ReLUConfig
    config_class = ReLUConfig
    objective_class = ReLUObjective
    spreads: ClassVar[bool] = True
    presets: ClassVar[dict[str, Preset]] = {
        "relu": Preset("ReLU and an L1 penalty"),
        "relu_april": Preset(
            "ReLU and L1 weighted by free decoder norms",
            sae=FREE_NORMS,
            objective={"sparsity_norm_weighted": True},
            optimizer={"clip_norm": 1.0},
        ),
        "p_anneal": Preset(
            "ReLU and an L_p penalty, p falling from 1", objective={"sparsity": "lp"}
        ),
        "crosscoder_relu": Preset(
            "ReLU over several layers or models, L1 weighted by the sum of norms",
            sae={**FREE_NORMS, "decoder_norm": "sum"},
            objective={"sparsity_norm_weighted": True},
            data="layers",
        ),
    }

    def bounds(self) -> float:
        """0: positive latents are kept."""
        return 0.0

    def sums_over_entries(self, objective: ReLUObjective) -> bool:
        """True: a latent's code depends on its own pre-activation only."""
        return True

    def start_training_(
        self, x: torch.Tensor, objective: ReLUObjective, ranks: Ranks | None = None
    ) -> None:
        """Sets b_enc so that ``target_l0`` latents per token are positive.

        Codes are what lies above the bounds, as small as an L1 penalty wants them: measured, a
        larger or smaller encoder learns more slowly.
        """
        if objective.target_l0 is not None:
            self.b_enc.data.sub_(bounds_at(self, x, objective.target_l0))

    def rows_to_finish(self, objective: ReLUObjective) -> int:
        """The sample size of the shrinkage fix; 0 if it is off."""
        return _FITTED if objective.fix_shrinkage else 0

    def finish_training_(self, x: torch.Tensor, objective: Any) -> None:
        """Fits one scale per latent and folds it into the encoder, on tokens [n, input width]."""
        scale_latents_(self, fit_scales(self, x))


class _ScaleProblem:
    """The linear map from per-latent scales to reconstructions, and its transpose.

    An L1 penalty makes all codes smaller than reconstruction wants them (Wright and Sharkey 2024,
    "Addressing feature suppression in SAEs"). With selection and directions fixed, the best scales
    are a least-squares problem, solved by conjugate gradients over the kept entries.
    """

    def __init__(self, sae: SparseAutoencoder, codes: SparseCodes) -> None:
        self.sae, self.codes = sae, codes
        self.order: LatentOrder = codes.latent_order(backend=sae.backend)

    def reconstruct(self, scales: torch.Tensor) -> torch.Tensor:
        values = self.codes.values * scales[self.codes.indices.long()]
        return functional.decode(
            self.codes.with_values(values), self.sae.W_dec, backend=self.sae.backend
        )

    def transposed(self, residual: torch.Tensor) -> torch.Tensor:
        codes = self.codes
        grads = code_grad(
            residual, codes.indices, self.sae.W_dec, None, codes.offsets, backend=self.sae.backend
        )
        return self.by_latent(grads * codes.values)

    def by_latent(self, entries: torch.Tensor) -> torch.Tensor:
        term = self.order.term(entries, None)
        return row_grad([term], self.codes.n_latents, 1, backend=self.sae.backend)[0].flatten()


@torch.no_grad()
def fit_scales(sae: SparseAutoencoder, x: torch.Tensor, *, iterations: int = 30) -> torch.Tensor:
    """Per-latent scales s that minimise ``sum |x - b_dec - sum_f s_f code_f W_dec[f]|^2``.

    Args:
        sae: trained, with ReLU codes.
        x: fp32 [n, input width], activations in the scale of training.
        iterations: of conjugate gradients on the normal equations, scaled by their diagonal.

    Returns:
        fp32 [F]; 1 for a latent that fired on none of them, and never below a tenth.

    Example:
        >>> from sae_kernels.nn import ReLUSAE
        >>> fit_scales(ReLUSAE(8, 32), torch.randn(512, 8)).shape
        torch.Size([32])
    """
    codes = sae.encode_scaled(x)
    problem = _ScaleProblem(sae, codes)
    residual = x - sae.decode_scaled(codes)
    norms = sae.W_dec.square().sum(1)
    diagonal = problem.by_latent(codes.values.square()) * norms
    inverse = torch.where(diagonal > 0, 1 / diagonal, 0)
    gradient = problem.transposed(residual)
    direction = inverse * gradient
    scales = torch.ones_like(gradient)
    gamma = (gradient * direction).sum()
    for _ in range(iterations):
        change = problem.reconstruct(direction)
        length = change.square().sum()
        if not (gamma > 0 and length > 0):
            break
        step = gamma / length
        scales += step * direction
        residual -= step * change
        gradient = problem.transposed(residual)
        conditioned = inverse * gradient
        before, gamma = gamma, (gradient * conditioned).sum()
        direction = conditioned + gamma / before * direction
    return scales.clamp(min=_LEAST)


@torch.no_grad()
def scale_latents_(sae: SparseAutoencoder, scales: torch.Tensor) -> None:
    """Folds positive per-latent scales into the encoder: ``s relu(h) = relu(s h)``."""
    sae.W_enc.mul_(scales[:, None])
    sae.b_enc.mul_(scales)
