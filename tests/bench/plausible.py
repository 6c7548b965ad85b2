"""Records as a run of the benchmark might write them: times are floors times a factor each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.bench.results import Results

if TYPE_CHECKING:
    from sae_kernels.bench.results import Record

PROVENANCE: Record = {
    "cpu": "A CPU", "isa": "amx", "threads": 2, "python": "3.11.7", "torch": "2.13.0+cpu",
    "sae_kernels": "0.1.0", "commit": "0123abc", "dirty": True, "malloc": "default",
    "command": "sae-kernels bench --preset cpu-small", "time": "2026-11-21T10:00:00Z",
    "libraries": {
        "ours": {"package": "sae_kernels 0.1.0", "torch": "2.13.0+cpu", "differs": ""},
        "sparsify": {"package": "eai-sparsify 1.3.3", "torch": "2.9.1+cpu",
                     "differs": "loss is FVU, not the squared error"},
    },
}  # fmt: skip

# Times by that of the bf16 product alone, and whether [B, F] exists.
FACTORS = {
    ("product", "bfloat16"): (1.0, False), ("product", "float32"): (15.0, False),
    ("copy", "int8"): (0.5, False),
    ("ours", "bfloat16"): (2.8, False), ("ours", "float32"): (9.0, False),
    ("dense", "float32"): (78.0, True), ("dense", "bfloat16"): (24.0, True),
    ("dense_compile", "bfloat16"): (21.0, True),
    ("sparsify", "float32"): (27.0, True), ("sparsify", "bfloat16"): (18.0, True),
    ("dictionary_learning", "float32"): (95.0, True), ("sae_lens", "float32"): (120.0, True),
}  # fmt: skip
SHIPPED = {"ours": "bfloat16"}
SHARES = {"product": 0.36, "selection": 0.06, "decode": 0.1, "backward": 0.2, "optimizer": 0.28}


def record(
    provider: str = "ours", dtype: str = "bfloat16", median_ms: float = 100.0, **others: Any
) -> Record:
    """A measured record whose p20 and p80 are 5 % below and 10 % above its median."""
    sizes = {"B": 2048, "D": 768, "F": 24576, "K": 32}
    B, D, F, K = (others.pop(name, size) for name, size in sizes.items())
    flops, moved = 2.0 * B * D * F, 26.0 * F * D
    return {
        "case": f"step-topk-{B}x{D}x{F}x{K}-zipf", "operation": "step", "mode": "step",
        "architecture": "topk", "B": B, "D": D, "F": F, "K": K, "popularity": "zipf",
        "provider": provider, "dtype": dtype, "status": "measured", "reason": None, "rounds": 7,
        "as_shipped": "+" not in provider and SHIPPED.get(provider, "float32") == dtype,
        "median_ms": median_ms, "p20_ms": 0.95 * median_ms, "p80_ms": 1.1 * median_ms,
        "peak_bytes": 20 * F * D, "max_error": 1.2e-6, "error_budget": 3e-5,
        "gflops": flops / median_ms / 1e6, "gbps": moved / median_ms / 1e6,
        "of_roofline": 0.4, "floor_ms": 0.4 * median_ms, "phases_ms": None, **others,
    }  # fmt: skip


def run() -> Results:
    """A run over sizes, with one provider that gives a wrong result and one that cannot."""
    shapes = [{}, {"F": 6144}, {"F": 98304}, {"B": 256}, {"B": 8192}, {"K": 8}, {"K": 256}]
    records = [one for shape in shapes for one in _case(**shape)]
    records.append(record("cusparse", "float32", status="unable", reason="needs a GPU"))
    return Results(PROVENANCE, records)


def _case(B: int = 2048, D: int = 768, F: int = 24576, K: int = 32) -> list[Record]:
    product = 2e3 * B * D * F / 2.2e12
    found = []
    for (provider, dtype), (factor, dense) in FACTORS.items():
        ms = product * factor * (1 if dense else 0.6 + 0.4 * (K / 32) ** 1.2)
        ms += 0 if dense else 1e-7 * F * D
        phases = {name: ms * share for name, share in SHARES.items()} if dense or K == 32 else None
        peak = 20 * F * D + (8 * B * F if dense else 8 * B * K)
        rate = {"gflops": None, "gbps": None} if provider in ("product", "copy") else {}
        found.append(record(provider, dtype, ms, B=B, D=D, F=F, K=K, phases_ms=phases,
                            peak_bytes=peak, **rate))  # fmt: skip
    return found
