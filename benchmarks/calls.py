"""Arguments of every primitive at any shape: for compiling, sanitizing and timing its backends.

Data is random and never zero: kernels on zeros draw less power, so they run at higher clocks.
"""

from __future__ import annotations

import inspect
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels import backends, primitives
from sae_kernels.codes import LatentOrder
from sae_kernels.primitives.checks import accumulator
from sae_kernels.primitives.narrow import narrowed
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
    """Arguments of a primitive's ``run``, made by their names; `_makers` has the options.

    ``without`` names optional columns of the operator's schema that are left out, with commas.
    """
    without = options.pop("without", "").split(",")
    _, D, F, _ = shape
    experts = options.get("experts", 8)
    if primitive == "route_top1":
        shape = shape._replace(F=experts)
    elif primitive == "select_topk_routed":  # as many latents as make equal parts
        shape = shape._replace(F=F // experts * experts)
    with torch.device(device):
        makers = _makers(shape, dtype, **options)
        if primitive == "auxk":
            dead = min(4096, F // 2)
            makers["k"] = lambda: max(1, min(D // 2, dead))
            makers["count"] = lambda: torch.full((), dead, dtype=torch.int32)
            makers["latents"] = lambda: torch.arange(dead, dtype=torch.int32) * (F // dead)
        if primitive == "row_grad" and not options.get("dots"):
            makers["W"] = lambda: None
        names = inspect.signature(_operator(primitive)).parameters
        made = tuple(makers[name]() for name in names if name != "backend")
    return _left_out(primitive, made, without) if any(without) else made


# How to make what is left out unless asked for, and what is left out only with something else.
PRESENT: dict[str, dict[str, Any]] = {
    "group_ends": {"groups": 4},
    "group_weights": {"groups": 4},
    "offsets": {"ragged": True},
    "rank_scale": {"ranked": True},
    "narrow": {"narrow": True},
    "floor": {"floored": True},
    "row_ids": {"ragged": True},
    "row_coef": {"penalties": 4, "norm": "none"},
    "dense": {"dense": True},
    "dense_latents": {"dense": True},
    "high": {"split": True},
    "variance": {"variance": True},
    "W": {"dots": True},
}
ABSENT = dict.fromkeys(("dense", "dense_latents"), "dense,dense_latents")


def optional(primitive: str) -> list[str]:
    """The columns of a primitive's schema that may be None."""
    listed = _operator(primitive).op._schema.arguments
    return [a.name for a in listed if "Optional[Tensor]" in str(a.type)]


def forms(primitive: str) -> list[dict[str, Any]]:
    """Options of `arguments` that give each optional column once and leave it out once."""
    found: list[dict[str, Any]] = []
    for name in optional(primitive):
        for options in (PRESENT.get(name, {}), {"without": ABSENT.get(name, name)}):
            if options not in found:
                found.append(options)
    return found


def flat(primitive: str, inputs: Sequence[Any]) -> dict[str, Any]:
    """The columns of a primitive's arguments by name."""
    operator = _operator(primitive)
    names = [argument.name for argument in operator.op._schema.arguments]
    return dict(zip(names, operator._flat(inputs), strict=False))


def _left_out(primitive: str, inputs: Sequence[Any], names: Sequence[str]) -> tuple[Any, ...]:
    taken = flat(primitive, inputs)
    for name in names:
        taken[name] = [None] * len(taken[name]) if isinstance(taken[name], list) else None
    left = iter(taken.values())
    kinds = _operator(primitive)._kinds[: len(inputs)]
    return tuple(kind.unflatten(left) for kind in kinds)


def _operator(primitive: str) -> Any:
    return getattr(import_module(f"sae_kernels.primitives.{primitive}"), primitive)


def runnable(primitive: str, inputs: tuple[Any, ...], wanted: Sequence[str]) -> list[str]:
    """The wanted backends that can run a call with these arguments."""
    return [name for name, why in _candidates(primitive, inputs) if name in wanted and why is None]


def reason(primitive: str, inputs: tuple[Any, ...], backend: str) -> str | None:
    """Why a backend cannot run a call with these arguments, or None."""
    return dict(_candidates(primitive, inputs))[backend]


def _candidates(primitive: str, inputs: tuple[Any, ...]) -> list[backends.Candidate]:
    like = _operator(primitive).like(inputs)
    return backends.candidates(primitive, like.device, like.dtype, inputs)


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


def unit_rows(F: int, width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A matrix with rows of norm 1, [F, width], built in place: it may fill half the device."""
    W = torch.empty(F, width, dtype=dtype).normal_()
    for part in W.split(65536):
        part /= part.norm(dim=1, keepdim=True)
    return W


def _makers(
    shape: Shape,
    dtype: torch.dtype,
    *,
    popularity: str = "uniform",  # of latents, see `latents`
    ranked: bool = False,  # whether latents are ranked by scores times a scale
    narrow: bool = False,  # whether there are rows of W in 8 bits, all of which may pass
    floored: bool = False,  # whether scores below 0 are not wanted
    experts: int = 8,  # that tokens choose among, at random
    groups: int = 0,  # of latents that are decoded apart; 0 is one
    ragged: bool = False,  # whether tokens have any number of entries up to 2K, K on average
    drop_zeros: bool = True,
    norm: str = "unit",
    split: bool = False,  # whether masters are low and high halves
    states: torch.dtype = torch.float32,  # of Adam's moments
    copied: bool = True,  # whether there is a compute copy
    width: int | None = None,  # of gradients and masters; default: D
    penalties: int = 0,  # on the norms of so many parts of a row
    dense: bool = False,  # whether a gradient has dense rows too
    variance: bool = False,  # whether auxk is given what it divides by
    dots: bool = False,  # whether row_grad multiplies the source's rows with a matrix too
) -> dict[str, Callable[[], Any]]:
    """A function for each argument of the primitives that makes it."""
    B, D, F, K = shape
    width = D if width is None else width
    codes = cache(partial(_ragged if ragged else _codes, shape, popularity))
    master = cache(partial(_master, F, width, split))
    routing = cache(partial(_routing, B, experts))
    gradient = partial(_gradient, shape, dtype, width, popularity, penalties, dense)
    ends = [F * (g + 1) // groups for g in range(groups)]
    after = 10_000_000

    def matrix() -> AdamMatrix:
        m = torch.empty(F, width, dtype=states).normal_()
        v = torch.empty(F, width, dtype=states).uniform_(0.1, 1.1)
        return AdamMatrix(master()[0], m, v, master()[1] if copied else None)

    constants = {
        "k": K, "count": B * K, "drop_zeros": drop_zeros, "n_latents": F,
        "width": width, "betas": (0.9, 0.999), "eps": 1e-8, "norm": norm, "slices": 1,
        "lazy": False, "alpha": 1 / 32, "after": after, "at_most": min(4096, F),
        "by_magnitude": False, "blocks": 1,
    }  # fmt: skip
    return {
        **{name: partial(lambda value: value, value) for name, value in constants.items()},
        "x": lambda: torch.randn(B, D, dtype=dtype),
        **dict.fromkeys(("W", "W_enc", "W_dec"), lambda: unit_rows(F, D, dtype)),
        **dict.fromkeys(("b", "b_enc"), lambda: torch.randn(F) / 8),
        "dtype": lambda: None,
        "rank_scale": lambda: torch.rand(F) + 0.5 if ranked else None,
        "narrow": lambda: narrowed(torch.full((F, D), torch.nan)) if narrow else None,
        "floor": lambda: torch.zeros(B, dtype=accumulator(dtype)) if floored else None,
        "start": lambda: _bound(shape),
        "bounds": lambda: _bound(shape).expand(F).clone(),
        "tokens": lambda: routing()[0],
        "starts": lambda: routing()[1],
        "values": lambda: codes()[0],
        "indices": lambda: codes()[1],
        "offsets": lambda: codes()[2],
        "row_ids": lambda: _rows_of(codes()[2]),
        "b_dec": lambda: torch.randn(D),
        **dict.fromkeys(("target", "residual"), lambda: torch.randn(B, D)),
        "group_ends": lambda: torch.tensor(ends, dtype=torch.int32) if groups else None,
        "group_weights": lambda: torch.rand(groups) + 0.5 if groups else None,
        "grad": lambda: torch.randn(*([groups] if groups else []), B, D),
        "terms": lambda: gradient().terms,
        "gradient": gradient,
        "param": lambda: master()[0],
        "high": lambda: master()[1] if split else None,
        "matrix": matrix,
        "variance": lambda: torch.full((), float(B * D)) if variance else None,
        "hyper": lambda: torch.tensor([1e-4, 1.0, 0.1, 0.001, 0.0, 1.0], dtype=torch.float64),
        "since_fired": lambda: torch.randint(0, 4 * after // 3, (F,)),
    }


Codes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


def _codes(shape: Shape, popularity: str) -> Codes:
    """Codes after a ReLU, fp32 [B, K], none of them zero, and their latents."""
    return torch.rand(shape.B, shape.K) + 0.5, latents(shape, popularity), None


def _ragged(shape: Shape, popularity: str) -> Codes:
    """Values, latents and offsets of codes with any number of entries up to 2K, K on average."""
    wide = shape._replace(K=2 * shape.K)
    kept = torch.rand(wide.B, wide.K) < torch.rand(wide.B, 1)
    values, chosen, _ = _codes(wide, popularity)
    return values[kept], chosen[kept], _starts(kept.sum(1))


def _rows_of(offsets: torch.Tensor | None) -> torch.Tensor | None:
    """The row of each entry of ragged codes."""
    if offsets is None:
        return None
    rows = torch.arange(offsets.numel() - 1, dtype=torch.int32)
    return rows.repeat_interleave(offsets.diff())


def _starts(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)


def _bound(shape: Shape) -> torch.Tensor:
    """A bound that about K of a token's scores are above: they are as good as normal."""
    share = torch.tensor(1 - shape.K / shape.F, dtype=torch.float64)
    bound: torch.Tensor = torch.special.ndtri(share) * (1 + 1 / 64) ** 0.5
    return bound.float()


def _routing(B: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens in order of experts, chosen at random, and where each expert's begin."""
    chosen = torch.randint(experts, (B,))
    order = chosen.argsort(stable=True).to(torch.int32)
    return order, _starts(chosen.bincount(minlength=experts))


def _gradient(
    shape: Shape, dtype: torch.dtype, width: int, popularity: str, penalties: int, dense: bool
) -> Gradient:
    """A weight gradient as a step has it: one term, its sources in ``dtype``; width 1 has none."""
    values, chosen, _ = _codes(shape, popularity)
    order = LatentOrder(*transpose_codes(chosen, None, None, shape.F))
    source = None if width == 1 else torch.randn(shape.B, width).to(dtype)
    found = Gradient([order.term(values, source)])
    if penalties:
        found = found._replace(row_coef=torch.rand(shape.F, penalties))
    if dense:
        chosen = torch.randperm(shape.F)[: shape.F // 8].to(torch.int32)
        found = found._replace(dense=torch.randn(len(chosen), width), dense_latents=chosen)
    return found


def _master(F: int, width: int, split: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 weights and their bf16 copy, or the low and the high halves of the weights."""
    copy = unit_rows(F, width, torch.bfloat16)
    if not split:
        return copy.float(), copy
    return torch.randint(-(2**15), 2**15, (F, width), dtype=torch.int16), copy
