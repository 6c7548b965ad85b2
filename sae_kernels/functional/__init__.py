"""Differentiable functions: encoders, the decoder, and functions of codes.

Gradients are of first order: a backward pass that is itself recorded (``create_graph=True``)
raises. Shapes: B tokens (any leading dimensions), D d_in, F n_latents, K kept per token.
"""

from sae_kernels.functional.decode import decode
from sae_kernels.functional.encode import (
    encode_batch_topk,
    encode_jumprelu,
    encode_threshold,
    encode_topk,
)
from sae_kernels.functional.entries import gather_by_latent, heaviside_ste, jumprelu
from sae_kernels.functional.latents import preactivations
from sae_kernels.functional.route import RoutedCodes, Routing, load_balance, route_top1

__all__ = [
    "RoutedCodes",
    "Routing",
    "decode",
    "encode_batch_topk",
    "encode_jumprelu",
    "encode_threshold",
    "encode_topk",
    "gather_by_latent",
    "heaviside_ste",
    "jumprelu",
    "load_balance",
    "preactivations",
    "route_top1",
]
