"""The seam for other engines: hidden states of many requests, and a bank changed in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_edits import D, F, Place, edit_activation
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch_versions import one_graph

from sae_kernels.interventions import EditBank, add, clamp, keep_only, scale, set_to, steer
from sae_kernels.nn import TopKSAE

PROMPTS = [3, 1, 5, 2]


@pytest.fixture
def bank() -> EditBank:
    sae = TopKSAE(D, F, k=6).double().requires_grad_(False)
    return EditBank(sae, n_requests=4, n_slots=3, n_directions=2)


def edits() -> list[list[Any]]:
    direction = torch.linspace(-1, 1, D, dtype=torch.float64)
    return [
        [set_to(3, 4.0), scale(5, 2.0, when=3)],
        [],
        [clamp(7, low=1.0, at="generated"), steer(direction, 2.0, at="prompt"), add(9, 3.0)],
        [set_to([1, 2], 2.0, at=0)],
    ]


def mixed(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states of tokens of all requests, in no order, as an engine has them."""
    pick = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, dtype=torch.float64, generator=pick)
    requests = torch.randint(4, (n,), generator=pick)
    return x, requests, torch.randint(8, (n,), generator=pick)


def by_hand(bank: EditBank, x: Tensor, requests: Tensor, positions: Tensor, given: Any) -> Tensor:
    where = [
        Place(request, position, PROMPTS[request])
        for request, position in zip(requests.tolist(), positions.tolist(), strict=True)
    ]
    moved = [
        edit_activation(bank.sae, row, given[place.row], place)
        for row, place in zip(x, where, strict=True)
    ]
    return torch.stack(moved)


def fill(bank: EditBank, given: Any) -> None:
    for request, some in enumerate(given):
        bank.write(request, some, prompt_length=PROMPTS[request])


def test_each_token_has_the_edits_of_its_request(bank: EditBank) -> None:
    fill(bank, edits())
    for n in (1, 4, 33):
        x, requests, positions = mixed(n, n)
        want = by_hand(bank, x, requests, positions, edits())
        got = bank(x, requests, positions)
        # Two sums of at most 9 terms, of size 4 at most.
        torch.testing.assert_close(got, want, rtol=0, atol=9 * 4 * torch.finfo(torch.float64).eps)
        assert torch.equal(got[requests == 1], x[requests == 1])


def test_inactive_tokens_keep_their_bits(bank: EditBank) -> None:
    fill(bank, edits())
    x, requests, positions = mixed(20, 0)
    active = torch.arange(20) % 2 == 0
    got, whole = bank(x, requests, positions, active=active), bank(x, requests, positions)
    assert torch.equal(got[~active], x[~active])
    assert torch.equal(got[active], whole[active])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_hidden_states_keep_their_dtype(dtype: torch.dtype) -> None:
    sae = TopKSAE(D, F, k=6).requires_grad_(False)
    bank = EditBank(sae, n_requests=1, n_slots=1)
    bank.write(0, [set_to(3, 4.0)])
    x = torch.randn(5, D).to(dtype)
    got = bank(x, torch.zeros(5, dtype=torch.int32))
    want = torch.stack([edit_activation(sae, row.float(), [set_to(3, 4.0)], Place()) for row in x])
    assert got.dtype == dtype
    # The sum of x and one decoder row is rounded once to the dtype, and before it in fp32.
    torch.testing.assert_close(got.float(), want, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_constant_directions_need_no_codes() -> None:
    class Blind(TopKSAE):
        def encode(self, x: Tensor, *, k: float | None = None) -> Any:
            raise AssertionError("encoded")

    sae = Blind(D, F, k=6, activation_scale=2.0).requires_grad_(False)
    bank = EditBank(sae, n_requests=1, n_slots=0, n_directions=1)
    bank.write(0, [add([3, 4], 1.5), steer(torch.ones(D), 0.5)])
    x = torch.randn(5, D)
    want = x + (1.5 * (sae.W_dec[3] + sae.W_dec[4]) / 2.0 + 0.5)
    torch.testing.assert_close(bank(x, torch.zeros(5).long()), want)


class _Waits(TorchDispatchMode):
    """Refuses operators that a GPU's host would have to wait for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        assert not any(w in name for w in ("_local_scalar_dense", "nonzero", "unique")), name
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(bank: EditBank) -> None:
    fill(bank, edits())
    x, requests, positions = mixed(9, 1)
    with _Waits():
        bank(x, requests, positions)
    with pytest.raises(AssertionError), _Waits():
        (x > 0).nonzero()


def test_buffers_stay_where_they_are(bank: EditBank) -> None:
    places = {name: buffer.data_ptr() for name, buffer in bank.named_buffers()}
    fill(bank, edits())
    bank.write(0, [])
    assert {name: buffer.data_ptr() for name, buffer in bank.named_buffers()} == places


@one_graph
def test_a_compiled_bank_follows_later_edits(bank: EditBank) -> None:
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager", dynamic=False)
    x, requests, positions = mixed(12, 2)
    assert torch.equal(compiled(x, requests, positions), x)
    with torch.compiler.set_stance("fail_on_recompile"):
        for given in (edits(), list(reversed(edits())), [[]] * 4):
            fill(bank, given)
            want = by_hand(bank, x, requests, positions, given)
            got = compiled(x, requests, positions)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


@one_graph
def test_keep_only_compiles_too() -> None:
    sae = TopKSAE(D, F, k=6).double().requires_grad_(False)
    bank = EditBank(sae, n_requests=4, n_slots=3, keeps_only=True)
    compiled = torch.compile(bank, fullgraph=True, backend="aot_eager")
    bank.write(2, [keep_only([1, 2])])
    x, requests, positions = mixed(12, 2)
    assert torch.equal(compiled(x, requests, positions), bank(x, requests, positions))


class _Engine(nn.Module):
    """A block of an inference engine: hidden states of all requests in one matrix."""

    def __init__(self, bank: EditBank | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.bank = nn.Linear(D, D).double(), bank

    def forward(self, x: Tensor, requests: Tensor, positions: Tensor) -> Tensor:
        x = x + torch.tanh(self.linear(x))
        return x if self.bank is None else self.bank(x, requests, positions)


def test_requests_come_and_go_in_an_engine(bank: EditBank) -> None:
    """A line is reused by the next request; what other requests get does not change."""
    engine, plain = _Engine(bank), _Engine(None)
    fill(bank, edits())
    x, requests, positions = mixed(16, 5)
    before = engine(x, requests, positions)
    bank.write(0, [set_to(9, 1.0)], prompt_length=2)
    after = engine(x, requests, positions)
    others = requests != 0
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[~others], before[~others])
    for request in range(4):
        bank.write(request, [])
    assert torch.equal(engine(x, requests, positions), plain(x, requests, positions))
