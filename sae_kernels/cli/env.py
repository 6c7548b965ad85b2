"""Command ``sae-kernels env``: versions, hardware and usable backends."""

import os
from typing import Any

import torch

from sae_kernels import backends, machine, primitives
from sae_kernels.backends import cpu, cuda
from sae_kernels.cli.options import Debug, Json
from sae_kernels.cli.output import Output

# Named one by one where a family of variables may hold a secret, such as HF_TOKEN.
_PREFIXES = ("SAE_KERNELS_", "OMP_", "KMP_", "MKL_", "CUDA_", "TRITON_")
_NAMES = ("NO_COLOR", "FORCE_COLOR", "HF_HOME", "HF_HUB_OFFLINE")


def env(as_json: Json = False, debug: Debug = False) -> None:
    """Show versions, processor, kernels and backends."""
    values = _collect()
    output = Output(as_json)
    output.record(values)
    output.table(
        [(name, version or "not installed") for name, version in values["versions"].items()]
    )
    output.text("")
    keys = ("cpu", "threads", "gpu", "kernels", "cuda_kernels")
    output.table([(key.replace("_", " "), _words(values[key])) for key in keys])
    output.text("")
    output.table(
        [
            (primitive, "runs on " + ", ".join(b for b, reason in reasons.items() if not reason))
            for primitive, reasons in values["primitives"].items()
        ]
    )
    output.text("")
    output.table(_refusals(values["primitives"]))
    output.text("", *(f"{name}={value}" for name, value in values["environment"].items()))


def _collect() -> dict[str, Any]:
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    return {
        "versions": machine.versions(),
        "cpu": machine.cpu_model(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if has_gpu else None,
        "kernels": _kernels(),
        "cuda_kernels": cuda.route(device if has_gpu else None),
        "primitives": {
            primitive: {
                candidate.backend: candidate.reason
                for candidate in backends.candidates(primitive, device, torch.float32)
            }
            for primitive in primitives.NAMES
        },
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_PREFIXES) or name in _NAMES
        },
    }


def _refusals(by_primitive: dict[str, dict[str, str | None]]) -> list[tuple[str, str]]:
    """Reasons why whole backends do not run here, without primitives that lack one."""
    return sorted(
        {
            (backend, f"does not run here: {reason}")
            for primitive, reasons in by_primitive.items()
            for backend, reason in reasons.items()
            if reason and not reason.startswith(primitive)
        }
    )


def _kernels() -> dict[str, Any]:
    """Build facts of the compiled module, or why it is missing."""
    try:
        module = cpu.module()
    except RuntimeError as error:
        return {"missing": str(error)}
    return {
        "isa_in_use": cpu.isa(),
        "isas_supported": list(cpu.supported_isas()),
        "isas_built": [name for name, _ in module.isas()],
        **module.build_info(),
    }


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key.replace('_', ' ')} {_words(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(value)
    return "none" if value is None else str(value)
