"""Contestant cusparse: decoding as a CSR matrix of codes times the decoder, through CuPy."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch.utils.dlpack import from_dlpack

from .contestant import Contestant, Task, Tensors, Unable

PACKAGE = "cupy-cuda13x"
DIFFERS = "decoding alone: the CSR matrix is built beforehand, and the product is cuSPARSE's SpMM"


class CuSparse(Contestant):
    """Decodes given codes by cuSPARSE's sparse product; has no other operation."""

    def __init__(self, task: Task, tensors: Tensors) -> None:
        super().__init__(task, tensors)
        if find_spec("cupy") is None:
            raise Unable("CuPy is not installed")
        import cupy
        from cupyx.scipy.sparse import csr_matrix

        tokens, k = tensors["values"].shape
        self.W_dec, self.b_dec = (cupy.from_dlpack(tensors[name]) for name in ("W_dec", "b_dec"))
        values = cupy.from_dlpack(tensors["values"].flatten())
        latents = cupy.from_dlpack(tensors["indices"].flatten().to(torch.int32))
        offsets = cupy.arange(0, tokens * k + 1, k, dtype=cupy.int32)
        shape = (tokens, tensors["W_dec"].shape[0])
        self.codes = csr_matrix((values, latents, offsets), shape=shape)

    def decode(self) -> torch.Tensor:
        """Reconstruction of the given codes."""
        x_hat: torch.Tensor = from_dlpack(self.codes @ self.W_dec + self.b_dec)
        return x_hat


contestant = CuSparse
