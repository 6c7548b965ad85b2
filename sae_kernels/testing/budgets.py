"""Error budgets of rounding, derived from the data, and assertions that use them.

A sum of n products in floating point of unit roundoff u, in whatever order and with or without
FMA, is off by at most ``gamma_n * sum |terms|`` with ``gamma_n = n u / (1 - n u)`` (Higham,
Accuracy and Stability of Numerical Algorithms, 3.1). Operands in bf16 and fp16 multiply exactly in
fp32, so the accumulator's u is all that counts; the fp64 oracle has the same bound with its own u.
Below the normal range an operation may also lose up to half the smallest subnormal, or, on units
that flush subnormals (AMX bf16), the smallest normal number.
"""

from __future__ import annotations

import torch

from sae_kernels.primitives.checks import accumulator


def unit_roundoff(dtype: torch.dtype) -> float:
    """Unit roundoff u of the accumulator of an operand dtype: half the gap above 1."""
    return torch.finfo(accumulator(dtype)).eps / 2


def gamma(n: int, dtype: torch.dtype) -> float:
    """The relative error of n successive roundings in the accumulator of ``dtype``."""
    nu = n * unit_roundoff(dtype)
    return nu / (1 - nu)


def rounding(
    n: int, magnitude: torch.Tensor, dtype: torch.dtype, *, flushed: float = 0.0
) -> torch.Tensor:
    """The budget of a sum of n products, given the sum of their absolute values.

    Args:
        n: roundings on the way of a term: the number of terms, plus any later operation.
        magnitude: the sum of the absolute terms, from an oracle.
        dtype: of the operands.
        flushed: the largest absolute operand, when the unit takes subnormals for zero.
    """
    info = torch.finfo(accumulator(dtype))
    lost = info.smallest_normal * max(1.0, flushed) if flushed else info.smallest_normal * info.eps
    return (gamma(n, dtype) + gamma(n, torch.float64)) * magnitude + n * lost


def adam_budgets(
    before: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grad: torch.Tensor,
    grad_budget: torch.Tensor,
    hyper: torch.Tensor,
    dtype: torch.dtype,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    moment_budgets: tuple[torch.Tensor | float, torch.Tensor | float] = (0.0, 0.0),
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Budgets of (param, m, v) after an Adam step whose clipped gradient is off by grad_budget.

    ``moment_budgets`` says how far m and v were off before it.

    First-order propagation through ``p - s m / (sqrt(v) c + eps)``. Each term of a formula has its
    own roundings, counted as written: a constant derived in fp64 and rounded once (beta, 1 - beta,
    s, c, eps), a difference (of ``m + (1 - beta1) (g - m)``) or a square, a product, the sum. A
    moment's budget is therefore small beside each of its terms, also beside ``(1 - beta2) g^2``.
    The slope of the square root is taken at the smallest v within its budget; v near zero therefore
    gives a large budget, as it should.
    """
    param, m, v = (t.double() for t in before)
    lr, _, correction1, correction2, *_ = hyper.double().tolist()
    beta1, beta2 = betas
    size = grad.abs() + grad_budget
    new_m = beta1 * m + (1 - beta1) * grad
    new_v = beta2 * v + (1 - beta2) * grad**2
    off_m, off_v = moment_budgets
    dm = beta1 * off_m + (1 - beta1) * grad_budget
    dm = dm + rounding(4, beta1 * (m.abs() + off_m) + (1 - beta1) * size, dtype)
    dv = beta2 * off_v + (1 - beta2) * (2 * grad.abs() + grad_budget) * grad_budget
    dv = dv + rounding(4, beta2 * (v + off_v) + (1 - beta2) * size**2, dtype)
    scale, step = correction2**-0.5, lr / correction1
    root = (new_v - dv).clamp(min=0).sqrt()
    denominator = root * scale + eps
    slope = scale / (2 * root).clamp(min=1e-300)
    d_denominator = slope * dv + rounding(5, new_v.sqrt() * scale + eps, dtype)
    update = step * new_m.abs() / denominator
    dp = step * dm / denominator + update * d_denominator / denominator + rounding(3, update, dtype)
    budget: torch.Tensor = dp + rounding(1, param.abs() + update, dtype)
    return budget, dm, dv


def norm_budget(
    param: torch.Tensor, budget: torch.Tensor, dtype: torch.dtype, slices: int
) -> torch.Tensor:
    """The budget of rows divided by their norms, from that of the rows before.

    ``w = p / |p|``: ``|dw| <= (|dp| + |w| |dn|) / |p|`` with ``|dn| <= |dp|_2 + gamma |p|``.
    """
    p, dp = (t.double().unflatten(1, (slices, -1)) for t in (param, budget))
    length = p.norm(dim=-1, keepdim=True)
    off = dp.norm(dim=-1, keepdim=True) + gamma(p.shape[-1] + 4, dtype) * length
    length = (length - off).clamp(min=1e-300)
    after: torch.Tensor = (dp + p.abs() / length * off) / length
    return after.flatten(1)


def softmax_budget(logits: torch.Tensor, budget: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The budget of ``softmax(logits)``, [B, E] like its arguments, from that of the logits.

    ``p_i = exp(d_i) / S`` with ``d_i = l_i - max l``. Logits off by e_j change p_i by a factor of
    ``exp(e_i) / sum_j p_j exp(e_j)``, at most ``exp(e_i + max_j e_j)``. Three roundings on the way
    into exp (the difference, log2 e and the product with it) are each ``u |d_j|`` in the exponent,
    of p_i and on average of S. exp itself and the division may be off by two units in the last
    place, 4 u, as on a GPU: with S's own that is 12, and E more of its sum. Below the normal range
    a weight may be lost.
    """
    p = logits.double().softmax(1)
    # What is infinite is exactly that, and what has no weight adds none.
    off = torch.where(logits.isfinite(), budget, 0.0)
    d = torch.where(p > 0, logits - logits.amax(1, keepdim=True), 0.0).abs()
    u = unit_roundoff(dtype) + unit_roundoff(torch.float64)
    exponent = 3 * u * (d + (p * d).sum(1, keepdim=True)) + off + off.amax(1, keepdim=True)
    few = rounding(logits.shape[1] + 12, p, dtype)
    lost = torch.finfo(accumulator(dtype)).smallest_normal
    total: torch.Tensor = p * torch.expm1(exponent) + few * torch.exp(exponent) + lost
    return total


def assert_within(
    name: str, actual: torch.Tensor, expected: torch.Tensor, budget: torch.Tensor | float
) -> None:
    """Raises AssertionError where ``|actual - expected| > budget``.

    NaN must meet NaN and an infinity itself; the message holds the worst element.
    """
    _require(
        actual.shape == expected.shape,
        f"{name}: expected shape {list(expected.shape)}, got {list(actual.shape)}",
    )
    got, want = actual.detach().double(), expected.detach().double()
    limit = torch.as_tensor(budget, dtype=torch.float64).expand_as(want)
    error = (got - want).abs()
    fits = (got == want) | (got.isnan() & want.isnan()) | (want.isfinite() & (error <= limit))
    if bool(fits.all()):
        return
    excess = torch.where(fits, -1.0, (error / limit).nan_to_num(nan=torch.inf, posinf=torch.inf))
    worst = int(excess.flatten().argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape))
    raise AssertionError(
        f"{name}: {int((~fits).sum())} of {fits.numel()} elements out of budget; the worst at "
        f"{where}: expected {float(want[where])!r}, got {float(got[where])!r}, error "
        f"{float(error[where]):.3g}, budget {float(limit[where]):.3g}"
    )


def assert_bitwise(name: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Raises AssertionError unless both hold the same bits (NaN payloads included)."""
    came, wanted = ((t.dtype, list(t.shape)) for t in (actual, expected))
    _require(came == wanted, f"{name}: expected {wanted}, got {came}")
    bits = [t.detach().contiguous().view(torch.uint8) for t in (actual, expected)]
    if not torch.equal(*bits):
        different = (bits[0] != bits[1]).nonzero()
        raise AssertionError(f"{name}: bits differ, first at byte {different[0].tolist()}")


def assert_same_selection(
    name: str,
    indices: torch.Tensor,
    key: torch.Tensor,
    k: int,
    tolerance: torch.Tensor | float = 0.0,
) -> None:
    """Raises AssertionError unless each row holds the top k of the exact keys, up to rounding.

    Outside the band of ``tolerance`` around the exact k-th key the set must be exact: everything
    above the band is kept, nothing below it is, and there are k distinct latents.

    Args:
        name: leads the message.
        indices: [B, k], what was selected.
        key: [B, F], the exact keys in fp64 (NaN ranks first).
        k: how many should be kept.
        tolerance: how far a computed key may be from the exact one; [B, F] or a number.
    """
    came, wanted = list(indices.shape), [key.shape[0], k]
    _require(came == wanted, f"{name}: expected indices {wanted}, got {came}")
    # NaN above +inf above every number: as ranks, +inf above the largest number.
    largest = torch.finfo(torch.float64).max
    key = torch.where(key.isnan(), torch.inf, key.double().clamp(-largest, largest))
    band = torch.as_tensor(tolerance, dtype=torch.float64).expand_as(key)
    band = torch.where(band.isfinite(), band, 0.0)
    for row in range(key.shape[0]):
        kept = indices[row].long()
        in_range = int(kept.min()) >= 0 and int(kept.max()) < key.shape[1]
        _require(in_range, f"{name}: row {row} holds latents outside [0, F): {kept.tolist()}")
        _require(kept.unique().numel() == k, f"{name}: row {row} repeats one of {kept.tolist()}")
        keys, slack = key[row], band[row]
        cut = keys.topk(k)
        # Both a key and the one at the cut may be off.
        width = slack + slack[cut.indices].max()
        last = float(cut.values[-1])
        missing = keys > cut.values[-1] + width
        missing[kept] = False
        for fault, latents in (
            ("keeps", kept[keys[kept] < cut.values[-1] - width[kept]].tolist()),
            ("misses", missing.nonzero().flatten().tolist()),
        ):
            _require(
                not latents,
                f"{name}: row {row} {fault} latents {latents} of keys {keys[latents].tolist()}; "
                f"the k-th key is {last!r}, the band about {float(width.max()):.3g}",
            )


def _require(condition: bool, message: str) -> None:
    # Not an assert statement: these checks must survive python -O.
    if not condition:
        raise AssertionError(message)
