"""Nominal rates of devices with their sources; calibration replaces them by measured ones."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from sae_kernels.backends import cpu
from sae_kernels.bench.work import Rates
from sae_kernels.errors import name_hint

# The units in which a step's work is counted; a device has a rate for each.
UNITS = {
    "bfloat16": "flop of the encoder product in 16 bits",
    "float32": "flop of the encoder product in fp32",
    "gathered": "bytes of rows read from a cache",
    "moved": "bytes read plus bytes written, from and to memory",
    "candidates": "entries that selection and latent order handle one by one",
    "latents": "rows of weights that an update visits",
    "steps": "steps of nothing: what a step costs at any size",
    "node": "bytes sent to GPUs of the same node",
    "network": "bytes sent to other nodes",
}
# Torch, the driver and what an allocator cannot use.
USABLE_MEMORY = 0.95


@dataclass(frozen=True)
class Device:
    """A device to plan for, with its rates and memory."""

    name: str  # as ``--device`` has it
    rates: dict[str, float]  # per second, by unit of :data:`UNITS`; without links on the CPU
    memory_bytes: float
    cache_bytes: float  # of that rows are gathered from; infinite: every gather counts at one rate
    node: int  # devices in a node
    gpu: str | None  # a word of a GPU's name in a result; None for the CPU
    source: str  # where the rates are from

    @property
    def traffic(self) -> Rates:
        """The device's rates of data movement."""
        return Rates(self.rates["moved"], self.rates["gathered"], self.cache_bytes)

    def dtype(self, compute: str) -> str:
        """The dtype of a ``compute`` setting on this device; resolves "auto"."""
        if compute != "auto":
            return compute
        return "bfloat16" if self.gpu is not None or isa() == "amx" else "float32"


_GPU_SOURCE = (
    "80 % of NVIDIA's dense tensor-core rate and of its link rates, 90 % of its memory rate; the "
    "rate of the L2 cache is assumed, what entries, rows and launches cost is estimated"
)


# Flop/s in 16 bits and in fp32, bytes/s of cache and memory, of links to the node and the network,
# GiB of memory, MiB of cache; the name in capitals is a word of its name in results.
_GPUS = {
    "h200": (989e12, 67e12, 5.5e12, 4.8e12, 450e9, 50e9, 140, 60),
    "h100": (989e12, 67e12, 5.5e12, 3.35e12, 450e9, 50e9, 79, 50),
    "a100": (312e12, 19.5e12, 4e12, 2.04e12, 300e9, 25e9, 79, 40),
}
NAMES = (*_GPUS, "cpu")


def device(name: str) -> Device:
    """Looks a device up by name.

    Raises:
        ValueError: there is none of this name.

    Example:
        >>> f"{device('h200').rates['bfloat16']:.3g}"
        '7.91e+14'
    """
    if name == "cpu":
        return this_cpu()
    if name not in _GPUS:
        hint = name_hint(name, NAMES)
        raise ValueError(f"--device: expected a known device, got {name!r}; {hint}")
    tensor, fp32, cache, memory, node, network, gib, mib = _GPUS[name]
    rates = {
        "bfloat16": 0.8 * tensor,
        "float32": 0.8 * fp32,
        "gathered": cache,
        "moved": 0.9 * memory,
        "candidates": 3e10,
        "latents": 5e9,
        "steps": 5e3,
        "node": 0.8 * node,
        "network": 0.8 * network,
    }
    return Device(name, rates, gib * 2**30, mib * 2**20, 8, name.upper(), _GPU_SOURCE)


def this_cpu() -> Device:
    """This machine's processor, on torch's number of threads."""
    threads = torch.get_num_threads()
    per_core = {
        "bfloat16": 0.8e12 if isa() == "amx" else 0.15e12,
        "float32": 0.15e12,
        "gathered": 25e9,
        "moved": 16e9,
        "candidates": 4e7,
        "latents": 1e7,
    }
    rates = {unit: threads * rate for unit, rate in per_core.items()} | {"steps": 1e3}
    source = f"those of a core of one Xeon with AVX-512, times {threads} threads"
    return Device("cpu", rates, _memory_bytes(), math.inf, 1, None, source)


def isa() -> str | None:
    """The instruction set of the CPU kernels; None if they are not built."""
    built = cpu.reason(torch.device("cpu"), torch.float32) is None
    return cpu.isa() if built else None


def _memory_bytes() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, OSError, ValueError):  # not on this system
        return math.inf
