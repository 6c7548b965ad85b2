"""The primitives: one folder each, registered as ``torch.ops.sae_kernels.*``.

They take and give plain tensors, do not differentiate and check their arguments; users want
:mod:`sae_kernels.functional`.
"""
