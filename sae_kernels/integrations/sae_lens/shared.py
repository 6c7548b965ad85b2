"""What the SAELens adapter's files share: whom they serve, how codes are handed over."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.integrations.late import LateTensor
from sae_kernels.integrations.lazy_codes import LazyCodes
from sae_kernels.integrations.patching import hooked, unfit

if TYPE_CHECKING:
    from collections.abc import Callable, Container

    import torch

    from sae_kernels.codes import SparseCodes
    from sae_kernels.integrations.adapters import Installation


def install(installation: Installation) -> None:
    """What concerns all of SAELens: files must not notice how W_enc lies; the optimizer option."""
    from sae_lens.saes import sae
    from sae_lens.training import sae_trainer

    def contiguous(original: Any) -> Any:
        def state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(self, *args, **kwargs)
            name = kwargs.get("prefix", "") + "W_enc"
            if name in found and not kwargs.get("keep_vars"):
                found[name] = found[name].contiguous()
            return found

        return state_dict

    def fusing(original: Any) -> Any:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if installation.covers(self.sae):
                installation.fuse(self.optimizer)

        return __init__

    installation.patches.replace(sae.SAE, "state_dict", contiguous)
    if installation.optimizer is not None:
        installation.patches.replace(sae_trainer.SAETrainer, "__init__", fusing)


def why_not(
    installation: Installation, sae: Any, served: Container[type], x: torch.Tensor
) -> str | None:
    """Why an SAE's encoder is left to SAELens, or None."""
    if type(sae) not in served:
        return f"class {type(sae).__name__}"
    if hooked(sae.hook_sae_acts_pre):
        return "hooks on hook_sae_acts_pre"
    return unfit(x, *sae.parameters()) or installation.rows.why_not(sae.W_enc)


def hand_over(
    installation: Installation,
    sae: Any,
    sae_in: torch.Tensor,
    codes: SparseCodes,
    columns: Callable[[torch.Tensor], torch.Tensor],
    compute: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
) -> tuple[LazyCodes, LateTensor]:
    """Codes and pre-activations as an encoder of SAELens returns them, before its last hook.

    Args:
        codes: in the accumulator's dtype; handed over in the dtype of the SAE.
        columns: pre-activations of some latents, for :class:`LateTensor`.
        compute: pre-activations of ``(sae_in, W_enc, *inputs)``.
    """
    dtype = sae_in.dtype
    acts = LazyCodes.of(codes.with_values(codes.values.to(dtype)), installation.ledger)
    shape = (*sae_in.shape[:-1], codes.n_latents)
    late = LateTensor.of(
        shape, compute, sae_in, sae.W_enc, *inputs, dtype=dtype, ledger=installation.ledger
    )
    late.columns = columns
    return acts, late
