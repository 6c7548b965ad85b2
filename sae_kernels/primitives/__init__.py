"""The primitives: operators ``torch.ops.sae_kernels.*`` on plain tensors, one folder each.

They check their arguments and do not differentiate; users want :mod:`sae_kernels.functional`.
"""
