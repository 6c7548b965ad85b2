"""Cheap sparse autoencoders: fused encode, decode, backward and optimizer kernels.

Legend of every shape in this package: B tokens, D d_in, F n_latents, K kept per token.
"""

import logging

from sae_kernels._version import __version__
from sae_kernels.backends import use as use_backend
from sae_kernels.codes import SparseCodes
from sae_kernels.functional import decode, encode_topk

__all__ = ["SparseCodes", "__version__", "decode", "encode_topk", "use_backend"]

logging.getLogger(__name__).addHandler(logging.NullHandler())
