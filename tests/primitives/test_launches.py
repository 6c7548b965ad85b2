"""How many kernels a call launches on a GPU; each takes the host time too."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch

pytest.importorskip("triton", reason="the launches are those of the Triton kernels")

from triton.runtime.jit import JITFunction

from benchmarks import calls
from sae_kernels import backends, gpu

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(gpu.interpreted(), reason="counts launches of compiled kernels")
B, D, F, K = 8192, 768, 65536, 32  # gpu-small


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Counter[str]]:
    """Calls an implementation in Triton with arguments that have no memory, and counts launches."""

    def count(primitive: str, *arguments: Any) -> Counter[str]:
        found: Counter[str] = Counter()
        note = lambda kernel, *_, **__: found.update([kernel.__name__])  # noqa: E731
        monkeypatch.setattr(JITFunction, "run", note)
        monkeypatch.setattr(gpu, "architecture", lambda: 90)
        monkeypatch.setattr(gpu, "multiprocessors", lambda device: 132)
        calls.implementation(primitive, "triton").run(*arguments)
        return found

    return count


def operands(n_latents: int = F, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    x, W = (torch.empty(n, D, dtype=dtype, device="meta") for n in (B, n_latents))
    return x, W, torch.empty(n_latents, device="meta")


@pytest.mark.parametrize(("n_latents", "most"), [(256, 4), (1024, 8), (F, 16)])
def test_select_topk(n_latents: int, most: int, launched: Callable[..., Counter[str]]) -> None:
    found = launched("select_topk", *operands(n_latents), K, None)
    assert found.total() == most
    # After the last pass over all columns the one for rows whose lists overflowed, and the rescue.
    assert found["rescore_overflowed"] == found["write_complete"] == found["sample"] == 1


@pytest.mark.parametrize(
    ("n_tokens", "n_latents", "most"),
    [(B, 2047, 12), (B, 2048, 20), (B, F, 32), (42, F, 18), (43, F, 32)],
)
def test_select_topk_in_fp32(
    n_tokens: int, n_latents: int, most: int, launched: Callable[..., Counter[str]]
) -> None:
    x, W, b = operands(n_latents, torch.float32)
    found = launched("select_topk", x[:n_tokens], W, b, K, None)
    assert found.total() == most
    screened = n_latents >= 2048 and n_tokens * n_latents * D >= 2**31
    assert found["_round_rows"] == 2 * screened
    # Rows whose lists overflowed are scored by the fp32 product alone.
    assert found["_score_unscored"] == screened * (found["_encode_pass"] - 1)


@pytest.mark.parametrize(
    "primitive", ["select_topk", "select_topk_routed", "select_threshold", "select_batch_topk"]
)
def test_explain_says_where_a_screen_is_taken_and_which_tokens_are_few(primitive: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        note = str(backends.note(primitive, "triton", dtype))
        # The limits of test_few_tokens_on_gpus.
        few = "up to 16 tokens with 8388608 scores (k at most 128, above 524288 latents 64)"
        assert note.startswith(few)
        assert ("in bf16" in note) == (dtype == torch.float32)


@pytest.mark.parametrize(("n_experts", "most"), [(8, 15), (32, 13), (64, 9), (256, 5)])
def test_select_topk_routed(
    n_experts: int, most: int, launched: Callable[..., Counter[str]]
) -> None:
    routes = [torch.empty(n, dtype=torch.int32, device="meta") for n in (B, n_experts + 1)]
    found = launched("select_topk_routed", *operands(), K, *routes)
    assert found.total() == most
    assert found["_lay_out"] == 1


@pytest.mark.parametrize("n_tokens", [1, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_few_tokens(
    n_tokens: int, dtype: torch.dtype, launched: Callable[..., Counter[str]]
) -> None:
    x, W, b = operands(dtype=dtype)
    routes = [torch.empty(n, dtype=torch.int32, device="meta") for n in (n_tokens, 9)]
    for primitive, more in (("select_topk", [None]), ("select_topk_routed", routes)):
        found = launched(primitive, x[:n_tokens], W, b, K, *more)
        assert found == {"_score": 1, "_merge": 1}, primitive


@pytest.mark.parametrize(("n_latents", "most"), [(16384, 1), (16385, 3), (1 << 24, 3)])
def test_pick_dead(n_latents: int, most: int, launched: Callable[..., Counter[str]]) -> None:
    ages = torch.empty(n_latents, dtype=torch.int64, device="meta")
    assert launched("pick_dead", ages, 1000, 4096).total() == most
