"""sparsify (eai-sparsify 1.3): its SparseCoder, and its trainer's passes over whole weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sae_kernels.integrations.adapters import Adapter, fingerprint
from sae_kernels.integrations.sparsify import module, upkeep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from sae_kernels.integrations.adapters import Installation


def _install(installation: Installation) -> None:
    replace = installation.patches.replace
    coder = importlib.import_module("sparsify.sparse_coder")
    trainer = importlib.import_module("sparsify.trainer")
    replace(coder, "fused_encoder", module.fused_encoder(installation))
    replace(coder, "decoder_impl", module.decoder_impl(installation))
    replace(trainer.Trainer, "__init__", _fused_adam(installation))
    if installation.level == "trainer":
        if fingerprint(_FREE_STEP) == _FREE_CODE:
            free = importlib.import_module("schedulefree").ScheduleFreeWrapper
            replace(free, "step", upkeep.schedule_free_step(installation, trainer.SignSGD))
        else:
            installation.ledger.left("optimizer step", "another schedulefree than the tested 1.4.1")
        name = "remove_gradient_parallel_to_decoder_directions"
        replace(coder.SparseCoder, name, upkeep.remove_radial_part(installation))


def _fused_adam(installation: Installation) -> Callable[..., Any]:
    def make(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if None in installation.holders.values():  # a trainer made now is the library's
                for optimizer in self.optimizers:
                    installation.fuse(optimizer)

        return __init__

    return make


def _modules_of(target: Any) -> Iterable[torch.nn.Module]:
    coder = importlib.import_module("sparsify").SparseCoder
    saes = [target] if isinstance(target, coder) else getattr(target, "saes", {}).values()
    return [sae for sae in saes if isinstance(sae, coder)]


# What is replaced or relied on, and its code in the tested versions.
_CODE = {
    "fused_encoder:fused_encoder": "15ad3cba04b9",
    "fused_encoder:FusedEncoder.forward": "56cede06ba55",
    "fused_encoder:FusedEncoder.backward": "472e64151aed",
    "utils:eager_decode": "ef1bf0230d19",
    "utils:triton_decode": "9537aa54f541",
    "sparse_coder:SparseCoder.encode": "a3bbd4539473",
    "sparse_coder:SparseCoder.decode": "26e3fcc7e5f5",
    "sparse_coder:SparseCoder.forward": "d3e527b32103",
    "sparse_coder:SparseCoder.remove_gradient_parallel_to_decoder_directions": "2a536dd7403f",
    "sign_sgd:SignSGD.step": "8b4ce9aee20c",
}
_FREE_STEP, _FREE_CODE = "schedulefree:ScheduleFreeWrapper.step", "75d719f7772c"

ADAPTER = Adapter(
    distribution="eai-sparsify",
    tested=("1.3.3",),
    oldest="1.3",
    below="1.4",
    levels=("module", "trainer"),
    seams={f"sparsify.{seam}": code for seam, code in _CODE.items()},
    install=_install,
    modules_of=_modules_of,
    optimizers_of=lambda target: getattr(target, "optimizers", ()),
)
