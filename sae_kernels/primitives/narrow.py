"""Rows of an encoder in 8 bits, by which few tokens' scores are bounded before any is computed."""

from __future__ import annotations

import torch

from sae_kernels.primitives.checks import narrow_shape

_ROWS_AT_ONCE = 4096
_LEAST, _MOST = 2.0**-30, 2.0**40  # of a row's largest element, as in csrc: narrow.h
_UP = 1 + 2.0**-20  # above the rounding to fp32 of a length in fp64


def narrowed(W: torch.Tensor) -> torch.Tensor:
    """Rounds an encoder's rows to 8 bits, with the lengths that bound scores (docs/numerics.md).

    A row w becomes integers q of -127 to 127 and a scale, ``w ~ scale * q``. At its end are the
    scale, no less than ``|scale * q|`` and no less than ``|w - scale * q|``, in fp32. Rows that
    cannot be bounded (an element is NaN, infinite or huge, or all are tiny) have the error NaN.

    Args:
        W: [F, D], any floating dtype.

    Returns:
        int8 of :func:`~sae_kernels.primitives.checks.narrow_shape`, on the device of W: a quarter
        of the bytes of W in fp32.

    Example:
        >>> rows = narrowed(torch.tensor([[1.0, -2.0]]))
        >>> rows.shape, rows[0, :2].tolist()
        (torch.Size([1, 48]), [64, -127])
    """
    F, D = W.shape
    out = torch.zeros(narrow_shape(F, D), dtype=torch.int8, device=W.device)
    for rows, into in zip(W.split(_ROWS_AT_ONCE), out.split(_ROWS_AT_ONCE), strict=True):
        wide = rows.double()
        largest = wide.abs().amax(1)
        fits = ((largest >= _LEAST) & (largest <= _MOST)) | (largest == 0)
        scale = torch.where(fits & (largest > 0), largest / 127, 1).float()
        wide = torch.where(fits[:, None], wide, 0)
        q = (wide / scale.double()[:, None]).round().clamp(-127, 127)
        kept = q * scale.double()[:, None]
        length = kept.norm(dim=1) * _UP
        error = torch.where(fits, (wide - kept).norm(dim=1) * _UP, torch.nan)
        fields = torch.stack([scale, length, error, torch.zeros_like(length)], 1).float()
        into[:, :D] = q.to(torch.int8)
        into[:, -16:] = fields.view(torch.int8)
    return out
