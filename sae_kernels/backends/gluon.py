"""Backend gluon: warp-specialised kernels in Gluon, Triton's lower-level language.

Gluon is experimental and changes between versions of Triton, so its kernels run only with those
they were checked with; the Triton kernels do the same work with all others.
"""

from __future__ import annotations

import torch

from sae_kernels import gpu

_CHECKED = ((3, 6),)
_HOPPER = (9, 0)


def reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why the Gluon kernels cannot run a call, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"no kernel for {dtype}, only for bfloat16 and float16"
    if gpu.interpreted():
        return "Triton's interpreter runs no Gluon"
    reason = gpu.triton_reason(device)
    if reason is not None:
        return reason
    version = gpu.triton_version()
    if version not in _CHECKED:
        came, known = (".".join(map(str, v)) for v in (version or (), _CHECKED[-1]))
        return f"Gluon differs between versions of Triton: checked with {known}, found {came}"
    if torch.cuda.get_device_capability(device) != _HOPPER:
        return f"{torch.cuda.get_device_name(device)} is no Hopper GPU (capability 9.0)"
    return None
