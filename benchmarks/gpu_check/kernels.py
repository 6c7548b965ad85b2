"""Measurements of single kernels: each group is a generator of records."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import calls
from benchmarks.gpu_check import floors
from benchmarks.gpu_check.bench import Bench, Record, check, compared, gather_rate, rates
from sae_kernels import machine
from sae_kernels.bench.cases import GPU_YARDSTICKS, Shape
from sae_kernels.codes import SparseCodes
from sae_kernels.functional import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PRODUCT = "product alone"
PEER = "eai-sparsify"
DECODE_SHAPES = {K: Shape(8192, 2304, 65536, K) for K in (32, 64, 128)}
_ROW_BYTES = (1536, 2048, 4096, 4608, 8192)


def device_rates(bench: Bench) -> Iterator[Record]:
    """What the floors are computed from, and the product at every yardstick."""
    found = rates(bench)
    yield {"kind": "rate", "what": "memory, read plus written", "bytes_per_s": found.moved}
    for row_bytes in _ROW_BYTES:
        rate = gather_rate(bench, row_bytes)
        yield {"kind": "rate", "what": f"gather of {row_bytes}-byte rows", "bytes_per_s": rate}
    for name in GPU_YARDSTICKS:
        B, D, F, _ = bench.shape(name)
        ms = bench.time({PRODUCT: product(bench, bench.shape(name))})[PRODUCT].median_ms
        yield {"kind": "rate", "what": f"product {name}", "flops": 2e3 * B * D * F / ms}
    yield {"kind": "clocks", "what": "right after the products", **machine.nvidia_smi()}


def product(bench: Bench, shape: Shape) -> Callable[[], object]:
    """The one product that is necessary, as torch's library does it, into a buffer."""
    x, W, *_ = bench.inputs("select_topk", shape)
    out = torch.empty(shape.B, shape.F, dtype=torch.bfloat16, device=bench.device)
    return lambda: torch.mm(x, W.T, out=out)


def select(bench: Bench, name: str, backend: str) -> Iterator[Record]:
    """select_topk of a backend against the product alone."""
    shape, case = bench.shape(name), f"select_topk {name}"
    x, W, *_ = inputs = bench.inputs("select_topk", shape)
    contestants = bench.runs("select_topk", inputs, (backend,))
    if not contestants:
        why = calls.reason("select_topk", inputs, backend)
        yield {"kind": "not available", "what": f"{case} on {backend}", "why": why}
        return
    ((provider, run),) = contestants.items()
    extra = bench.peak_bytes(run)
    scores = torch.empty(shape.B, shape.F, dtype=torch.bfloat16, device=bench.device)
    contestants[PRODUCT] = lambda: torch.mm(x, W.T, out=scores)
    for record in compared(case, "select_topk", bench.time(contestants), PRODUCT):
        if record["provider"] == provider and extra is not None:
            record["extra_mib"] = extra / 2**20
        yield record


def few_tokens(bench: Bench, name: str, n_tokens: int) -> Iterator[Record]:
    """select_topk of a few tokens against the column passes, whose bits it must have, and torch.

    The floor is reading W once.
    """
    shape, case = bench.shape(name)._replace(B=n_tokens), f"select_topk {name} B={n_tokens}"
    x, W, b, k, *_ = inputs = bench.inputs("select_topk", shape)
    contestants = bench.runs("select_topk", inputs, ("triton",))
    if not contestants:
        why = calls.reason("select_topk", inputs, "triton")
        yield {"kind": "not available", "what": case, "why": why}
        return
    run = calls.implementation("select_topk", "triton").run
    few, passes = contestants["triton"], functools.partial(run, *inputs, screened=False)
    contestants["column passes"] = passes
    contestants["torch: product, topk"] = lambda: torch.addmm(b.to(W.dtype), x, W.T).topk(k)
    different = sum(not came.equal(wanted) for came, wanted in zip(few(), passes(), strict=True))
    yield check("few tokens and column passes", "select_topk", "triton", different)
    floor = 1e3 * floors.few_tokens(shape, rates(bench))
    for record in compared(case, "select_topk", bench.time(contestants), "triton"):
        yield {**record, "floor_ms": floor, "of_floor": record["median_ms"] / floor}


def routed(bench: Bench, name: str, experts: int) -> Iterator[Record]:
    """select_topk_routed against the dense product, of which it needs one part in so many."""
    shape, case = bench.shape(name), f"select_topk_routed {name} E={experts}"
    contestants = bench.runs(
        "select_topk_routed", bench.inputs("select_topk_routed", shape, experts=experts)
    )
    if not contestants:
        yield {"kind": "not available", "what": case, "why": "no backend of it runs here"}
        return
    contestants[PRODUCT] = product(bench, shape)
    yield from compared(case, "select_topk_routed", bench.time(contestants), PRODUCT)


def torch_topk(bench: Bench, name: str) -> Iterator[Record]:
    """What selecting costs without these kernels: torch.topk over the scores in memory."""
    shape = bench.shape(name)
    x, W, *_ = bench.inputs("select_topk", shape)
    scores = torch.empty(shape.B, shape.F, dtype=torch.bfloat16, device=bench.device)
    contestants: dict[str, Callable[[], object]] = {
        PRODUCT: lambda: torch.mm(x, W.T, out=scores),
        "torch.topk": lambda: scores.topk(shape.K, dim=1),
    }
    yield from compared(f"torch.topk {name}", "select_topk", bench.time(contestants), PRODUCT)


def decode_both_ways(bench: Bench) -> Iterator[Record]:
    """decode and its backward pass against their floor, and against sparsify's where it is."""
    if importlib.util.find_spec("sparsify") is None:
        yield {"kind": "not available", "what": PEER, "why": f"{PEER} is not installed here"}
    for K, wanted in DECODE_SHAPES.items():
        shape = bench.cut(wanted)
        contestants = _decoders(bench, shape)
        peaks = {name: bench.peak_bytes(run) for name, run in contestants.items()}
        times = bench.time(contestants)
        floor = 1e3 * floors.decode_and_backward(shape, rates(bench))
        for record in compared(f"decode F=65536 D=2304 K={K}", "decode", times, "sae_kernels"):
            ours, peak = peaks["sae_kernels"], peaks[record["provider"]]
            if ours is not None and peak is not None:
                record |= {"extra_mib": peak / 2**20, "memory_ratio": peak / ours}
            yield {**record, "floor_ms": floor, "of_floor": record["median_ms"] / floor}


def _decoders(bench: Bench, shape: Shape) -> dict[str, Callable[[], object]]:
    values, indices, W, b_dec, *_ = bench.inputs("decode", shape)
    grad = torch.randn(shape.B, shape.D, device=bench.device)
    leaves = values.requires_grad_(), W.requires_grad_()

    def ours() -> object:
        with torch.enable_grad():
            out = decode(SparseCodes(values, indices, shape.F), W, b_dec)
        return torch.autograd.grad(out, leaves, grad)

    found: dict[str, Callable[[], object]] = {"sae_kernels": ours}
    if importlib.util.find_spec("sparsify") is not None:
        from sparsify.utils import decoder_impl

        long = indices.long()

        def theirs() -> object:
            with torch.enable_grad():
                out = decoder_impl(long, values.to(W.dtype), W.mT)
            return torch.autograd.grad(out, leaves, grad.to(W.dtype))

        found[f"{PEER} {importlib.metadata.version(PEER)}"] = theirs
    return found


def decode_residual(bench: Bench) -> Iterator[Record]:
    """The fused form, as a training step uses it, against the floor of its one visit."""
    for name in ("gpu-small", "gpu-mid"):
        yield from _each_backend(
            bench, f"decode_residual {name}", "decode_residual", name, floors.decode
        )


def rows(bench: Bench) -> Iterator[Record]:
    """row_update of a weight matrix under three popularities, against its memory traffic."""
    for popularity in ("uniform", "zipf", "hot"):
        yield from _each_backend(
            bench,
            f"row_update gpu-small {popularity}",
            "row_update",
            "gpu-small",
            floors.row_update,
            popularity=popularity,
        )
    for name, weight_bytes, options in (
        ("split master", 24, {"split": True}),
        ("bf16 moments", 18, {"states": torch.bfloat16}),
        ("split master, bf16 moments", 16, {"split": True, "states": torch.bfloat16}),
    ):
        floor = functools.partial(floors.row_update, weight_bytes=weight_bytes)
        case = f"row_update gpu-small {name}"
        yield from _each_backend(bench, case, "row_update", "gpu-small", floor, **options)


def _each_backend(
    bench: Bench,
    case: str,
    primitive: str,
    yardstick: str,
    floor_of: Callable[..., float],
    **options: Any,
) -> Iterator[Record]:
    shape = bench.shape(yardstick)
    contestants = bench.runs(primitive, bench.inputs(primitive, shape, **options))
    if not contestants:
        yield {"kind": "not available", "what": case, "why": f"no backend of {primitive} runs here"}
        return
    floor = 1e3 * floor_of(shape, rates(bench))
    for record in compared(case, primitive, bench.time(contestants), next(iter(contestants))):
        yield {**record, "floor_ms": floor, "of_floor": record["median_ms"] / floor}


def transpose(bench: Bench) -> Iterator[Record]:
    """transpose_codes of every backend against torch's stable sort."""
    for popularity in ("uniform", "zipf", "hot"):
        shape = bench.shape("gpu-mid")
        inputs = bench.inputs("transpose_codes", shape, popularity=popularity)
        contestants: dict[str, Callable[[], object]] = {
            "torch.sort": functools.partial(torch.sort, inputs[0].flatten(), stable=True),
            **bench.runs("transpose_codes", inputs),
        }
        case = f"transpose_codes gpu-mid {popularity}"
        yield from compared(case, "transpose_codes", bench.time(contestants), "torch.sort")


def repeats(bench: Bench, primitive: str) -> Iterator[Record]:
    """Each backend twenty times on the same arguments: how many runs differ from the first."""
    inputs = bench.inputs(primitive, bench.cut(Shape(2048, 768, 16384, 32)))
    for backend in bench.runs(primitive, inputs):
        run = calls.implementation(primitive, backend).run
        first = _outcome(run, inputs)
        again = (_outcome(run, inputs) for _ in range(2 if bench.small else 20))
        different = sum(not all(map(torch.equal, first, other)) for other in again)
        yield check("repeats", primitive, backend, different)


def _outcome(run: Callable[..., Any], inputs: tuple[Any, ...]) -> list[torch.Tensor]:
    """The bits of all results of a call, also of those written into its arguments."""
    fresh = [t.clone() if isinstance(t, torch.Tensor) else t for t in inputs]
    out = run(*fresh)
    results = out if isinstance(out, tuple) else (out,)
    written = [t for t in (*results, *fresh) if isinstance(t, torch.Tensor)]
    return [t.contiguous().flatten().view(torch.uint8) for t in written]
