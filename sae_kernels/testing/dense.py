"""The loss of every SAE architecture in its textbook form: dense, differentiable, torch alone.

Sparse kernels and closed-form gradients are tested against it, in fp64. It builds [B, F] matrices
and leaves every gradient to autograd, so it shares no idea with what it judges; in fp32 it is a
dense baseline. Shapes: B tokens, F n_latents, d_in and d_out the widths of x and y.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sae_kernels.testing.dense_selection import batchtopk_kept, gated, jumprelu, step, topk_kept
from sae_kernels.testing.dense_spec import DenseSpec, check_tensors
from sae_kernels.testing.dense_switch import routed, switch_codes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae_kernels.testing.dense_spec import Norm

__all__ = ["DenseResult", "DenseSpec", "decoder_norm", "dense_loss"]


class DenseResult(NamedTuple):
    """Result of :func:`dense_loss`, all on the autograd graph.

    Attributes:
        loss: ``reconstruction + penalty``.
        reconstruction: all scaled squared errors: prefixes, 4k codes, the gated auxiliary loss.
        penalty: all of the sparsity penalties, coefficients included.
        y_hat: [B, d_out], the reconstruction from all latents.
        codes: [B, F], as decoded.
        h: [B, F], pre-activations (of a gated SAE the gate's, pi).
    """

    loss: Tensor
    reconstruction: Tensor
    penalty: Tensor
    y_hat: Tensor
    codes: Tensor
    h: Tensor


def dense_loss(
    spec: DenseSpec,
    parameters: Mapping[str, Tensor],
    x: Tensor,
    y: Tensor | None = None,
    dead: Tensor | None = None,
) -> DenseResult:
    """The loss of an SAE, a transcoder or a crosscoder, in the dtype of its operands.

    ``h = (x - b_dec) W_enc^T + b_enc``, ``y_hat = f W_dec + b_dec (+ x W_skip^T)`` and
    ``loss = scale sum (y_hat - y)^2 + coefficient penalty``, with f by ``spec.selection``:

    - topk: relu(h) or h at the first k latents by key or its magnitude descending, ties to the
      lower latent, NaN first (Gao et al., arXiv 2406.04093; arXiv 2510.00404); with ``n_sources``
      of each group of latents.
    - batchtopk: relu(h) at the first min(int(k B), positives) entries of the batch, ties to the
      lower (token, latent) (Bussmann et al., arXiv 2412.06410).
    - jumprelu, with its straight-through gradients: see
      :func:`~sae_kernels.testing.dense_selection.jumprelu` and ``step`` there, of pre-activations.
    - switch: relu(h) times the gate at the first k latents of the token's expert, see
      :mod:`~sae_kernels.testing.dense_switch` (Mudide et al., arXiv 2410.08201).
    - gated: ``1[pi > 0] relu(exp(r_mag) a + b_mag)`` with ``a`` the product alone and ``pi = h``.
      relu(pi) takes the place of f in the penalty and in the auxiliary squared error
      (Rajamanoharan et al., arXiv 2404.16014).

    A row of W_dec that is not finite reaches y_hat even where its code is 0, unlike in the kernels.

    Args:
        spec: what to compute.
        parameters: W_enc [F, d_in], b_enc [F], W_dec [F, d_out] and b_dec [d_out]; "threshold" or
            "log_threshold" [F] for jumprelu; "r_mag" and "b_mag" [F] for gated; "W_router"
            [E, d_in] and "b_router" [d_in] for switch; "W_skip" [d_out, d_in] for a skip
            connection.
        x: [B, d_in]; a crosscoder's layers side by side.
        y: [B, d_out], the target. Default: x.
        dead: bool [F], for ``spec.preact``.

    Raises:
        ValueError: a parameter is missing or unknown, or a shape does not fit.

    Example:
        >>> names = ("W_enc", "b_enc", "W_dec", "b_dec")
        >>> values = (torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2))
        >>> parameters = {n: v.requires_grad_() for n, v in zip(names, values)}
        >>> result = dense_loss(DenseSpec("topk", k=1), parameters, torch.tensor([[3.0, 1.0]]))
        >>> result.codes.tolist(), result.loss.item()
        ([[3.0, 0.0]], 1.0)
        >>> result.loss.backward()
        >>> parameters["b_dec"].grad.tolist()
        [0.0, -2.0]
    """
    y = x if y is None else y
    check_tensors(spec, parameters, x, y, dead)
    x_centred = x - parameters["b_dec"] if spec.subtract_b_dec else x
    a = x_centred @ parameters["W_enc"].T
    h = a + parameters["b_enc"]
    routes = None
    if spec.selection == "switch":
        routes = routed(spec, parameters, x, h.shape[1])
        codes = switch_codes(routes, h, int(spec.k))
    else:
        codes = _codes(spec, parameters, a, h, spec.k)
    y_hat, error = _prefixes(spec, parameters, codes, x, y)
    if spec.multi_topk:
        more = _codes(spec, parameters, a, h, 4 * spec.k)
        error = error + (_decode(parameters, more, x) - y).square().sum() / 8
    if spec.selection == "gated":
        error = error + _gated_auxiliary(spec, parameters, h, x, y)
    scale = 1 / (y - y.mean(0)).square().sum() if spec.loss == "fvu" else 1 / y.shape[0]
    reconstruction = scale * error
    penalty = spec.coefficient * _penalty(spec, parameters, h, codes)
    if routes is not None:
        penalty = penalty + spec.balance * routes.balance()
    if spec.preact and dead is not None:
        penalty = penalty + spec.preact * _preact(parameters, h, dead)
    return DenseResult(reconstruction + penalty, reconstruction, penalty, y_hat, codes, h)


def decoder_norm(W_dec: Tensor, norm: Norm, n_layers: int) -> Tensor:
    """[F], n_f of :class:`DenseSpec`."""
    rows = W_dec.unflatten(1, (n_layers, -1))
    joint: Tensor = torch.linalg.vector_norm(rows, dim=(1, 2))
    layers: Tensor = torch.linalg.vector_norm(rows, dim=2).sum(1)
    return {"joint": joint, "sum": layers, "mixed": 1.0 * joint + 0.1 * layers}[norm]


def _codes(spec: DenseSpec, p: Mapping[str, Tensor], a: Tensor, h: Tensor, k: float) -> Tensor:
    if spec.selection == "relu":
        return h.relu()
    if spec.selection == "jumprelu":
        return jumprelu(h, _threshold(p), spec.bandwidth)
    if spec.selection == "gated":
        return gated(h, (p["r_mag"].exp() * a + p["b_mag"]).relu())
    key = h
    if spec.rank_by_decoder_norm:
        key = h * decoder_norm(p["W_dec"], spec.norm, spec.n_layers)
    if spec.by_magnitude:
        key = key.abs()
    if spec.selection == "topk":
        groups = key.detach().unflatten(1, (spec.n_sources, -1))
        kept = topk_kept(groups, int(k)).flatten(1)
    else:
        kept = batchtopk_kept(h.detach(), key.detach(), int(k * h.shape[0]))
    return torch.where(kept, h.relu() if spec.relu else h, 0.0)


def _threshold(p: Mapping[str, Tensor]) -> Tensor:
    return p["log_threshold"].exp() if "log_threshold" in p else p["threshold"]


def _decode(p: Mapping[str, Tensor], codes: Tensor, x: Tensor, end: int | None = None) -> Tensor:
    """[B, d_out], from the first ``end`` latents."""
    y_hat = codes[:, :end] @ p["W_dec"][:end] + p["b_dec"]
    return y_hat + x @ p["W_skip"].T if "W_skip" in p else y_hat


def _prefixes(
    spec: DenseSpec, p: Mapping[str, Tensor], codes: Tensor, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor]:
    """The last prefix's reconstruction, and the weighted sum of the squared errors of all."""
    ends = spec.group_ends or (codes.shape[1],)
    weights = spec.group_weights or (1 / len(ends),) * len(ends)
    parts = [_decode(p, codes, x, end) for end in ends]
    errors = [w * (part - y).square().sum() for w, part in zip(weights, parts, strict=True)]
    return parts[-1], torch.stack(errors).sum()


def _gated_auxiliary(
    spec: DenseSpec, p: Mapping[str, Tensor], pi: Tensor, x: Tensor, y: Tensor
) -> Tensor:
    """The squared error of relu(pi), decoded by a copy of the decoder or by the decoder itself."""
    decoder = {name: t.detach() for name, t in p.items()} if spec.aux_stops_decoder else p
    return (_decode(decoder, pi.relu(), x) - y).square().sum()


def _penalty(spec: DenseSpec, p: Mapping[str, Tensor], h: Tensor, codes: Tensor) -> Tensor:
    if spec.penalty == "none":
        return h.new_zeros(())
    if spec.penalty in ("l0", "target_l0"):
        l0 = step(h, _threshold(p), spec.bandwidth).sum(1).mean()
        return l0 if spec.penalty == "l0" else (l0 / spec.target_l0 - 1).square()
    f = h.relu() if spec.selection == "gated" else codes
    if spec.norm_weighted:
        f = f * decoder_norm(p["W_dec"], spec.norm, spec.n_layers)
    if spec.penalty == "tanh":
        f = (spec.tanh_scale * f).tanh()
    elif spec.penalty == "lp":
        # The inner where keeps the infinite slope at 0 out of the graph.
        f = torch.where(f == 0, 0.0, torch.where(f == 0, 1.0, f) ** spec.p)
    return f.sum(1).mean()


def _preact(p: Mapping[str, Tensor], h: Tensor, dead: Tensor) -> Tensor:
    weight = dead * decoder_norm(p["W_dec"], "joint", 1).detach()
    return ((_threshold(p) - h).relu() * weight).sum(1).mean()
