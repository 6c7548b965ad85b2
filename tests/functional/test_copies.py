"""The warning about weights that every call copies: once, and not where nothing is copied."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels import SparseCodes, decode, encode_threshold, encode_topk
from sae_kernels.functional import recording
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from collections.abc import Callable

B, D, F = 5, 6, 20


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_warned", set())


def said(call: Callable[[], Any], times: int = 2) -> list[warnings.WarningMessage]:
    """The warnings of repeated calls."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            call()
    return caught


def test_a_transposed_view_is_said_once_with_what_to_keep() -> None:
    x, W = torch.randn(B, D), torch.randn(D, F)
    codes = SparseCodes.from_dense(torch.randn(B, F), 3)
    for name, call in (
        ("W_enc", lambda: encode_topk(x, W.T, None, 3)),
        ("W_dec", lambda: decode(codes, W.T)),
    ):
        (warning,) = said(call)
        assert warning.category is UserWarning
        assert warning.filename == __file__, "the caller's line"
        message = str(warning.message)
        assert message.startswith(f"{name}: expected [20, 6] row after row")
        assert "copied at every call" in message
        assert f"{name} = W.T.contiguous()" in message
    assert not said(lambda: encode_threshold(x, W.T, None, 0.0)), "said before"
    assert_bitwise("decoded", decode(codes, W.T), decode(codes, W.T.contiguous()))


def test_another_view_has_no_transpose_in_its_remedy() -> None:
    (warning,) = said(
        lambda: encode_topk(torch.randn(B, D), torch.randn(F, 2 * D)[:, ::2], None, 3)
    )
    assert "W_enc = W.contiguous()" in str(warning.message)


def test_weights_that_are_read_as_they_are_say_nothing() -> None:
    x, W = torch.randn(B, D), torch.randn(F, D)
    codes = SparseCodes.from_dense(torch.randn(B, F), 3)
    assert not said(lambda: encode_topk(x, W, None, 3))
    assert not said(lambda: encode_topk(x, W[:10], None, 3))
    assert not said(lambda: encode_topk(x.T.contiguous().T, W, None, 3)), "tokens are not weights"
    assert not said(lambda: decode(codes, W))
