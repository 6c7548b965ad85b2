"""Arguments of every primitive at any shape: for compiling, sanitizing and timing its backends.

Data is random and never zero: kernels on zeros draw less power, so they run at higher clocks.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels import backends, primitives
from sae_kernels.codes import LatentOrder
from sae_kernels.primitives.row_update import AdamMatrix
from sae_kernels.primitives.terms import Gradient
from sae_kernels.primitives.transpose_codes import transpose_codes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sae_kernels.bench.cases import Shape

GPU_BACKENDS = ("cuda", "triton", "gluon")


def kernels() -> list[tuple[str, str]]:
    """Every (primitive, backend) that is written for GPUs."""
    every = ((primitive, backend) for primitive in primitives.NAMES for backend in GPU_BACKENDS)
    return [each for each in every if find_spec("sae_kernels.primitives.{}.{}".format(*each))]


def implementation(primitive: str, backend: str) -> Any:
    """The module whose ``run`` takes these arguments."""
    return import_module(f"sae_kernels.primitives.{primitive}.{backend}")


def arguments(
    primitive: str,
    shape: Shape,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    **options: Any,
) -> tuple[Any, ...]:
    """Arguments of a primitive's ``run``; ``options`` are those of its function below."""
    builder: Callable[..., tuple[Any, ...]] = globals()[f"_{primitive}"]
    with torch.device(device):
        return builder(shape, dtype, **options)


def runnable(primitive: str, inputs: tuple[Any, ...], wanted: Sequence[str]) -> list[str]:
    """The wanted backends that can run a call with these arguments."""
    operator = getattr(import_module(f"sae_kernels.primitives.{primitive}"), primitive)
    like = operator.like(inputs)
    found = backends.candidates(primitive, like.device, like.dtype, inputs)
    return [name for name, reason in found if name in wanted and reason is None]


def latents(shape: Shape, popularity: str = "uniform") -> torch.Tensor:
    """Distinct latents of every token, int32 [B, K].

    "uniform"; "hot", where latent 0 is in every token; or "zipf", where the latent of rank r is in
    a token with a probability near 1/r, and the first few in nearly all.
    """
    B, _, F, K = shape
    stratum = torch.arange(K)
    if popularity == "zipf":
        rank = torch.exp((stratum + torch.rand(B, K)) / K * torch.log(torch.tensor(F + 1.0)))
        distinct = (rank.long() - 1 - stratum).cummax(dim=1).values + stratum
        return torch.minimum(distinct, F - K + stratum).to(torch.int32)
    chosen = torch.randint(F // K, (B, K)) + stratum * (F // K)
    if popularity == "hot":
        chosen[:, 0] = 0
    return chosen.to(torch.int32)


def values(shape: Shape) -> torch.Tensor:
    """Codes after a ReLU, fp32 [B, K], none of them zero."""
    return torch.rand(shape.B, shape.K) + 0.5


def unit_rows(F: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A matrix with rows of norm 1, [F, width], built in place: it may fill half the device."""
    W = torch.empty(F, width, dtype=dtype).normal_()
    for part in W.split(65536):
        part /= part.norm(dim=1, keepdim=True)
    return W


def _select_topk(shape: Shape, dtype: torch.dtype, *, ranked: bool = False) -> tuple[Any, ...]:
    B, D, F, K = shape
    scale = torch.rand(F) + 0.5 if ranked else None
    return torch.randn(B, D, dtype=dtype), unit_rows(F, D, dtype), torch.randn(F) / 8, K, scale


def ragged_codes(shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values, latents and offsets of codes with any number of entries up to 2K, K on average."""
    wide = shape._replace(K=2 * shape.K)
    kept = torch.rand(wide.B, wide.K) < torch.rand(wide.B, 1)
    offsets = torch.zeros(wide.B + 1, dtype=torch.int32)
    offsets[1:] = kept.sum(1).cumsum(0)
    return values(wide)[kept], latents(wide)[kept], offsets


def _codes(shape: Shape, is_ragged: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    return ragged_codes(shape) if is_ragged else (values(shape), latents(shape), None)


def _bound(shape: Shape) -> torch.Tensor:
    """A bound that about K of a token's scores are above: they are as good as normal."""
    share = torch.tensor(1 - shape.K / shape.F, dtype=torch.float64)
    return (torch.special.ndtri(share) * (1 + 1 / 64) ** 0.5).float()


def _select_topk_routed(shape: Shape, dtype: torch.dtype, *, experts: int = 8) -> tuple[Any, ...]:
    """Tokens that chose at random; of the latents as many as make equal parts."""
    x, W, b, K, _ = _select_topk(shape._replace(F=shape.F // experts * experts), dtype)
    chosen = torch.randint(experts, (shape.B,))
    starts = torch.zeros(experts + 1, dtype=torch.int32)
    starts[1:] = chosen.bincount(minlength=experts).cumsum(0)
    return x, W, b, K, chosen.argsort(stable=True).to(torch.int32), starts


def _route_top1(shape: Shape, dtype: torch.dtype, *, experts: int = 8) -> tuple[Any, ...]:
    B, D, *_ = shape
    return torch.randn(B, D, dtype=dtype), unit_rows(experts, D, dtype), torch.randn(experts) / 8


def _select_threshold(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    x, W, b, *_ = _select_topk(shape, dtype)
    return x, W, b, _bound(shape).expand(shape.F).clone()


def _select_batch_topk(
    shape: Shape, dtype: torch.dtype, *, ranked: bool = False
) -> tuple[Any, ...]:
    x, W, b, K, scale = _select_topk(shape, dtype, ranked=ranked)
    return x, W, b, shape.B * K, scale, _bound(shape)


def _decode(
    shape: Shape, dtype: torch.dtype, *, groups: int = 0, ragged: bool = False
) -> tuple[Any, ...]:
    _, D, F, _ = shape
    entries, indices, offsets = _codes(shape, ragged)
    W = unit_rows(F, D, dtype)
    return entries, indices, W, torch.randn(D), _group_ends(F, groups), offsets


def _decode_residual(
    shape: Shape,
    dtype: torch.dtype,
    *,
    drop_zeros: bool = True,
    groups: int = 0,
    ragged: bool = False,
) -> tuple[Any, ...]:
    *first, ends, offsets = _decode(shape, dtype, groups=groups, ragged=ragged)
    weights = torch.rand(groups) + 0.5 if groups else None
    return *first, torch.randn(shape.B, shape.D), drop_zeros, ends, weights, offsets


def _code_grad(
    shape: Shape, dtype: torch.dtype, *, groups: int = 0, ragged: bool = False
) -> tuple[Any, ...]:
    B, D, F, _ = shape
    leading = [groups] if groups else []
    _, indices, offsets = _codes(shape, ragged)
    W = unit_rows(F, D, dtype)
    return torch.randn(*leading, B, D), indices, W, _group_ends(F, groups), offsets


def _group_ends(F: int, groups: int) -> torch.Tensor | None:
    if not groups:
        return None
    return torch.tensor([F * (g + 1) // groups for g in range(groups)], dtype=torch.int32)


def _transpose_codes(
    shape: Shape, dtype: torch.dtype, *, popularity: str = "uniform"
) -> tuple[Any, ...]:
    return latents(shape, popularity), values(shape), None, shape.F


def gradient(shape: Shape, dtype: torch.dtype, width: int, popularity: str = "uniform") -> Gradient:
    """A weight gradient as a step has it: one term, its sources in ``dtype``; width 1 has none."""
    chosen = latents(shape, popularity)
    order = LatentOrder(*transpose_codes(chosen, None, None, shape.F))
    source = None if width == 1 else torch.randn(shape.B, width).to(dtype)
    return Gradient([order.term(values(shape), source)])


def _row_grad(shape: Shape, dtype: torch.dtype, *, width: int | None = None) -> tuple[Any, ...]:
    width = shape.D if width is None else width
    return gradient(shape, dtype, width).terms, shape.F, width


def _row_sqnorm(
    shape: Shape, dtype: torch.dtype, *, norm: str = "unit", split: bool = False
) -> tuple[Any, ...]:
    param, high = _master(shape.F, shape.D, split)
    return param, gradient(shape, dtype, shape.D), high if split else None, norm, 1


def _master(F: int, width: int, split: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 weights and their bf16 copy, or the low and the high halves of the weights."""
    copy = unit_rows(F, width, torch.bfloat16)
    if not split:
        return copy.float(), copy
    return torch.randint(-(2**15), 2**15, (F, width), dtype=torch.int16), copy


def _row_update(
    shape: Shape,
    dtype: torch.dtype,
    *,
    norm: str = "unit",
    split: bool = False,
    states: torch.dtype = torch.float32,
    copied: bool = True,
    width: int | None = None,
    popularity: str = "uniform",
    penalties: int = 0,
) -> tuple[Any, ...]:
    width = shape.D if width is None else width
    param, copy = _master(shape.F, width, split)
    m = torch.empty(shape.F, width, dtype=states).normal_()
    v = torch.empty(shape.F, width, dtype=states).uniform_(0.1, 1.1)
    parts = gradient(shape, dtype, width, popularity)
    if penalties:  # on the norms of so many parts of a row
        parts = parts._replace(row_coef=torch.rand(shape.F, penalties))
    hyper = torch.tensor([1e-4, 1.0, 0.1, 0.001, 0.0, 1.0], dtype=torch.float64)
    matrix = AdamMatrix(param, m, v, copy if copied else None)
    return matrix, parts, hyper, (0.9, 0.999), 1e-8, norm, 1, False


def _auxk(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    B, D, F, _ = shape
    dead = min(4096, F // 2)
    chosen = torch.arange(dead, dtype=torch.int32) * (F // dead)
    count = torch.full((), dead, dtype=torch.int32)
    x, W_enc, b_enc, *_ = _select_topk(shape, dtype)
    k_aux = max(1, min(D // 2, dead))
    return x, torch.randn(B, D), W_enc, b_enc, W_enc.clone(), chosen, count, k_aux, 1 / 32


def _pick_dead(shape: Shape, dtype: torch.dtype) -> tuple[Any, ...]:
    after = 10_000_000
    return torch.randint(0, 4 * after // 3, (shape.F,)), after, min(4096, shape.F)
