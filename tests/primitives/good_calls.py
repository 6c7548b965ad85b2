"""Every operator called with small arguments that are good but for those a test changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels import SparseCodes, encode_topk
from sae_kernels.functional import encode_batch_topk, encode_jumprelu, encode_threshold
from sae_kernels.primitives.auxk import auxk
from sae_kernels.primitives.code_grad import code_grad
from sae_kernels.primitives.decode import decode as decode_rows
from sae_kernels.primitives.decode_residual import decode_residual
from sae_kernels.primitives.route_top1 import route_top1
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.row_update import AdamMatrix, row_update
from sae_kernels.primitives.select_batch_topk import select_batch_topk
from sae_kernels.primitives.select_threshold import select_threshold
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.select_topk_routed import select_topk_routed
from sae_kernels.primitives.terms import Gradient, Term
from sae_kernels.primitives.transpose_codes import transpose_codes

if TYPE_CHECKING:
    from collections.abc import Callable

    # A call, its error and the words that must be in it, with what came last.
    Refusal = tuple[Callable[[], Any], type[Exception], str]

f32, f64, bf16, i32 = torch.float32, torch.float64, torch.bfloat16, torch.int32
t = torch.zeros
B, D, F, K = 3, 4, 6, 2
x, W, b = t(B, D), t(F, D), t(F)
values, indices = t(B, K), t(B, K, dtype=i32)
codes = SparseCodes(values, indices, F)
offsets = torch.tensor([0, 2, 2, 6], dtype=i32)
ragged = {"values": t(6), "indices": t(6, dtype=i32), "offsets": offsets}
ends = torch.tensor([2, F], dtype=i32)
tokens, starts = torch.tensor([1, 0, 2], dtype=i32), torch.tensor([0, 1, 3, 3], dtype=i32)
term = Term(t(F + 1, dtype=i32), t(6, dtype=i32), t(6, dtype=i32), t(6), t(B, D))
hyper = t(6, dtype=f64)
row = AdamMatrix(t(F, D), t(F, D), t(F, D))
low = t(F, D, dtype=torch.int16)


def select(**changes: Any) -> None:
    args = {"x": x, "W": W, "b": b, "k": K, "rank_scale": None, **changes}
    select_topk(*args.values())


def above(**changes: Any) -> None:
    args = {"x": x, "W": W, "b": b, "bounds": b, **changes}
    select_threshold(*args.values())


def largest(**changes: Any) -> None:
    args = {"x": x, "W": W, "b": b, "count": K, "rank_scale": None, "start": None, **changes}
    select_batch_topk(*args.values())


def route(**changes: Any) -> None:
    args = {"x": x, "W": W, "b": b, **changes}
    route_top1(*args.values())


def routed(**changes: Any) -> None:
    args = {"x": x, "W": W, "b": b, "k": K, "tokens": tokens, "starts": starts, **changes}
    select_topk_routed(*args.values())


def rows(**changes: Any) -> None:
    args = {"values": values, "indices": indices, "W": W, "b_dec": None, "ends": None}
    decode_rows(*({**args, "offsets": None, **changes}).values())


def residual(**changes: Any) -> None:
    args = {"values": values, "indices": indices, "W": W, "b_dec": None, "target": x, "drop": True}
    forms = {"ends": None, "weights": None, "offsets": None}
    decode_residual(*({**args, **forms, **changes}).values())


def grads(**changes: Any) -> None:
    args = {"grad": x, "indices": indices, "W": W, "ends": None, "offsets": None, **changes}
    code_grad(*args.values())


def dead(**changes: Any) -> None:
    args = {"x": x, "residual": t(B, 5), "W_enc": W, "b_enc": b, "W_dec": t(F, 5)}
    latents = {"latents": t(2, dtype=i32), "count": t((), dtype=i32), "k": K, "alpha": 1.0}
    auxk(*({**args, **latents, **changes}).values())


def transpose(**changes: Any) -> None:
    args = {"indices": indices, "values": values, "row_ids": None, "n_latents": F, **changes}
    transpose_codes(*args.values())


def weights(W: Any = None, n_terms: int = 1, **changes: Any) -> None:
    row_grad([term._replace(**changes)] * n_terms, F, D, W=W)


def update(gradient: Gradient | None = None, hyper: torch.Tensor = hyper, **changes: Any) -> None:
    options = {name: changes.pop(name) for name in ("norm", "slices") if name in changes}
    row_update(row._replace(**changes), gradient or Gradient([term]), hyper, **options)


def encode(**changes: Any) -> None:
    args = {"x": x, "W_enc": W, "b_enc": b, "k": K, **changes}
    encode_topk(**args)


def threshold(**changes: Any) -> None:
    args = {"x": x, "W_enc": W, "b_enc": b, "threshold": 0.5, **changes}
    encode_threshold(**args)


def jumprelu(**changes: Any) -> None:
    args = {"x": x, "W_enc": W, "b_enc": b, "threshold": b, **changes}
    encode_jumprelu(**args)


def batch(**changes: Any) -> None:
    args = {"x": x, "W_enc": W, "b_enc": b, "k": 1.5, **changes}
    encode_batch_topk(**args)


def assert_refused(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """Raises AssertionError unless the call raises that error, in one line that has the message."""
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value), "one line, please"
