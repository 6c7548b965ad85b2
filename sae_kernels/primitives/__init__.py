"""The primitives: operators ``torch.ops.sae_kernels.*`` on plain tensors, one folder each.

They check their arguments and do not differentiate; users want :mod:`sae_kernels.functional`.
"""

import pkgutil

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.ispkg))
"""The names of all primitives: of the folders beside this file."""
