"""DenseSpec: the settings of a dense loss, and the checks of its tensors."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, get_args

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

Selection = Literal["topk", "batchtopk", "jumprelu", "relu", "gated", "switch"]
Loss = Literal["fvu", "mse"]
Penalty = Literal["none", "l1", "lp", "l0", "tanh", "target_l0"]
Norm = Literal["joint", "sum", "mixed"]


@dataclasses.dataclass(frozen=True)
class DenseSpec:
    """Settings of :func:`dense_loss`; in its formulas f are codes, n_f decoder norms.

    Attributes:
        selection: how codes are made of ``h = x W_enc^T + b_enc``.
        k: "topk" and "switch": latents per token. "batchtopk": ``int(k * B)`` are kept in the whole
            batch.
        relu: "topk": the kept values are relu(h), else h.
        by_magnitude: "topk" ranks by the magnitude of the key.
        subtract_b_dec: h is that of ``x - b_dec``.
        rank_by_decoder_norm: "topk" and "batchtopk" rank by ``h n_f`` (n_f without gradient).
        bandwidth: "jumprelu": the width w of the straight-through window.
        loss: the scale of the squared errors: 1 / sum (y - mean_b y)^2, or 1 / B.
        multi_topk: adds an eighth of the squared error of the codes with 4k in the place of k.
        group_ends: Matryoshka prefixes, ascending; the last is F, one of 0 latents is b_dec alone.
        group_weights: of each prefix's squared error. Default: 1 / number of prefixes each.
        penalty: "l1" mean_b sum_f f, "lp" mean_b sum_f f^p, "tanh" mean_b sum_f tanh(c f), "l0"
            L0 = mean_b sum_f 1[h > theta], "target_l0" (L0 / target - 1)^2.
        coefficient: multiplies the penalty.
        norm_weighted: "l1", "lp" and "tanh" see ``f n_f``, with gradient into W_dec.
        norm: n_f, of the row of a latent over its layers: "joint" |row|, "sum" of each layer's
            norm, "mixed" 1.0 joint + 0.1 sum.
        n_layers: equal parts of a row of W_dec (crosscoders).
        n_sources: "topk": equal groups of latents, one after the other, of each of which the first
            k are kept (cross-layer transcoders).
        p: "lp"; the gradient at f = 0 is 0.
        tanh_scale: c of "tanh".
        target_l0: of "target_l0".
        preact: "jumprelu": times mean_b sum_f relu(theta - h) dead_f |W_dec[f]|, which is added to
            the penalty; the norm is joint and has no gradient.
        n_experts: "switch": E, the shared expert included.
        gated: "switch": codes are multiplied with the probability of the token's expert.
        shared_expert: "switch": the first expert is every token's, without gate.
        balance: "switch": times E sum_i F_i P_i, which is added to the penalty.
        aux_stops_decoder: "gated": the auxiliary loss sends no gradient through its decoder.

    Raises:
        ValueError: settings that mean nothing together.
    """

    selection: Selection
    k: float = 0
    relu: bool = True
    by_magnitude: bool = False
    subtract_b_dec: bool = True
    rank_by_decoder_norm: bool = False
    bandwidth: float = 0.0
    loss: Loss = "mse"
    multi_topk: bool = False
    group_ends: tuple[int, ...] | None = None
    group_weights: tuple[float, ...] | None = None
    penalty: Penalty = "none"
    coefficient: float = 0.0
    norm_weighted: bool = False
    norm: Norm = "joint"
    n_layers: int = 1
    n_sources: int = 1
    p: float = 1.0
    tanh_scale: float = 4.0
    target_l0: float = 0.0
    preact: float = 0.0
    n_experts: int = 1
    gated: bool = True
    shared_expert: bool = False
    balance: float = 0.0
    aux_stops_decoder: bool = True

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                came = repr(getattr(self, name))
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {came}")
        for check in (_check_selection, _check_penalty, _check_groups):
            check(self)


_CHOICES = {
    "selection": get_args(Selection),
    "loss": get_args(Loss),
    "penalty": get_args(Penalty),
    "norm": get_args(Norm),
}


def _check_selection(spec: DenseSpec) -> None:
    ranked = spec.selection in ("topk", "batchtopk")
    if (ranked or spec.selection == "switch") and not spec.k > 0:
        raise ValueError(f"k: expected a positive number of latents per token, got {spec.k}")
    if spec.selection in ("topk", "switch") and spec.k % 1 != 0:
        raise ValueError(f"k: expected a whole number of latents per token, got {spec.k}")
    if spec.selection == "jumprelu" and not spec.bandwidth > 0:
        raise ValueError(f"bandwidth: expected a positive number, got {spec.bandwidth}")
    if spec.balance and spec.selection != "switch":
        raise ValueError(f"balance: expected switch, got {spec.selection}")
    for name in ("multi_topk", "rank_by_decoder_norm"):
        if getattr(spec, name) and not ranked:
            raise ValueError(f"{name}: expected topk or batchtopk, got {spec.selection}")
    if not spec.relu and spec.selection != "topk":
        raise ValueError(f"relu: only topk may leave it out, got {spec.selection}")
    if spec.by_magnitude and spec.selection != "topk":
        raise ValueError(f"by_magnitude: expected topk, got {spec.selection}")


def _check_penalty(spec: DenseSpec) -> None:
    counts = spec.penalty in ("l0", "target_l0")
    if counts and spec.selection != "jumprelu":
        raise ValueError(
            f"penalty: {spec.penalty} has a gradient with jumprelu only, got {spec.selection}; "
            "use l1, lp or tanh"
        )
    if counts and spec.norm_weighted:
        raise ValueError(f"norm_weighted: expected l1, lp or tanh, got {spec.penalty}")
    if spec.penalty == "target_l0" and not spec.target_l0 > 0:
        raise ValueError(f"target_l0: expected a positive number, got {spec.target_l0}")
    if spec.penalty == "lp" and not spec.p >= 0:
        raise ValueError(f"p: expected a number of at least 0, got {spec.p}")
    if spec.penalty != "none" and not spec.relu:
        raise ValueError(f"relu: {spec.penalty} needs codes that are not negative, got relu=False")
    if spec.preact and spec.selection != "jumprelu":
        raise ValueError(f"preact: expected jumprelu, got {spec.selection}")


def _check_groups(spec: DenseSpec) -> None:
    ends, weights = spec.group_ends, spec.group_weights
    if ends is not None and (not ends or ends[0] < 0 or list(ends) != sorted(ends)):
        raise ValueError(f"group_ends: expected ascending numbers of latents, got {ends}")
    if weights is not None and len(weights) != len(ends or ()):
        raise ValueError(f"group_weights: expected one for each of {ends}, got {weights}")


def check_tensors(
    spec: DenseSpec, parameters: Mapping[str, Tensor], x: Tensor, y: Tensor, dead: Tensor | None
) -> None:
    """Raises ValueError unless the tensors have exactly the shapes that the spec needs."""
    _check_names(spec, parameters)
    if x.dim() != 2 or y.dim() != 2 or not len(x) == len(y) > 0:
        came = f"{list(x.shape)} and {list(y.shape)}"
        raise ValueError(f"x, y: expected [B, d_in] and [B, d_out] with B > 0, got {came}")
    F, d_in, d_out = len(parameters["W_enc"]), x.shape[1], y.shape[1]
    wanted = {"W_enc": [F, d_in], "W_dec": [F, d_out], "b_dec": [d_out], "W_skip": [d_out, d_in]}
    n_routed = spec.n_experts - spec.shared_expert
    wanted |= {"W_router": [n_routed, d_in], "b_router": [d_in]}
    for name, tensor in parameters.items():
        shape = wanted.get(name, [F])
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(tensor.shape)}")
    if spec.subtract_b_dec and d_in != d_out:
        raise ValueError(f"subtract_b_dec: expected d_in = d_out, got {d_in} and {d_out}")
    if F % spec.n_sources or (spec.selection == "topk" and spec.k > F // spec.n_sources):
        of = "" if spec.n_sources == 1 else f" in {spec.n_sources} equal groups of latents"
        raise ValueError(f"k: expected at most n_latents = {F}{of}, got {spec.k}")
    if spec.group_ends and spec.group_ends[-1] != F:
        raise ValueError(f"group_ends: expected to end in F = {F}, got {spec.group_ends}")
    if F % spec.n_experts or (spec.selection == "switch" and spec.k > F // spec.n_experts):
        came = f"{spec.n_experts} with k = {spec.k}"
        raise ValueError(f"n_experts: expected a divisor of F = {F}, k fitting one, got {came}")
    if d_out % spec.n_layers:
        raise ValueError(f"n_layers: expected a divisor of d_out = {d_out}, got {spec.n_layers}")
    if spec.preact and (dead is None or dead.dtype != torch.bool or list(dead.shape) != [F]):
        came = "None" if dead is None else f"{dead.dtype} {list(dead.shape)}"
        raise ValueError(f"dead: preact needs a bool tensor of shape [{F}], got {came}")


def _check_names(spec: DenseSpec, parameters: Mapping[str, Tensor]) -> None:
    wanted = ["W_enc", "b_enc", "W_dec", "b_dec"]
    if spec.selection == "gated":
        wanted += ["r_mag", "b_mag"]
    if spec.selection == "switch":
        wanted += ["W_router", "b_router"]
    if spec.selection == "jumprelu":
        wanted.append("log_threshold" if "log_threshold" in parameters else "threshold")
    if set(parameters) - {"W_skip"} != set(wanted):
        raise ValueError(
            f"parameters: expected {', '.join(wanted)} and, with a skip connection, W_skip; "
            f"got {', '.join(parameters)}"
        )
