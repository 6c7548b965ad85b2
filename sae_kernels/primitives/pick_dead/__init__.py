"""The longest dead latents, chosen without the host knowing how many there are."""

import torch

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import primitive, result


@primitive()
def pick_dead(
    since_fired: torch.Tensor, after: int, at_most: int, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists the latents that are dead, those dead for longest if there are too many.

    Args:
        since_fired: int64 [F], tokens since each latent fired; dead are those >= ``after``.
        after: tokens, at least 1.
        at_most: latents to list; of equally long dead ones the lower are taken.
        backend: see :mod:`sae_kernels.backends`.

    Returns:
        Latents int32 [min(at_most, F)], ascending and then padded with -1, and their number int32
        [].
    """
    checks.shape("since_fired", since_fired, ["F"], "one counter per latent")
    checks.dtype("since_fired", since_fired, (torch.int64,))
    if after < 1 or at_most < 0:
        raise ValueError(
            f"after and at_most: expected at least 1 and at least 0, got {after} and {at_most}"
        )
    room = min(at_most, since_fired.shape[0])
    return result([room], torch.int32), result([], torch.int32)
