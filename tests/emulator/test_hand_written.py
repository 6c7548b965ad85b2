"""What the emulator says of small kernels, right and wrong ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from emulator import library
from emulator.hand_written import run

if TYPE_CHECKING:
    from collections.abc import Callable

EXCHANGE = """
    st.shared.u32 [%r1], %r0;
    {barrier}
    xor.b32 %r2, %r1, 128;
    ld.shared.u32 %r3, [%r2];
    st.global.u32 [%rd1], %r3;
"""


def ints(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32)


def test_warps_exchange_over_a_barrier() -> None:
    out = run(EXCHANGE.format(barrier="bar.sync 0;"), ints(64))
    assert out.tolist() == [i ^ 32 for i in range(64)]


def test_an_exchange_without_a_barrier_is_a_race() -> None:
    with pytest.raises(RuntimeError, match=r"race in shared memory|uninitialised"):
        run(EXCHANGE.format(barrier=""), ints(64))


@pytest.mark.parametrize("seed", range(4))
def test_a_race_is_found_in_any_order_of_warps(seed: int) -> None:
    library.library().emulator_seed(seed)
    with pytest.raises(RuntimeError, match=r"race in shared memory|uninitialised"):
        run(EXCHANGE.format(barrier=""), ints(64))


def test_what_was_read_may_not_be_overwritten_before_a_barrier() -> None:
    body = EXCHANGE.format(barrier="bar.sync 0;") + "add.u32 %r4, %r0, 1; st.shared.u32 [%r1], %r4;"
    with pytest.raises(RuntimeError, match="writes what was just read by"):
        run(body, ints(64))


def test_blocks_that_store_to_one_place_race() -> None:
    body = "mov.u32 %r2, %ctaid.x; st.global.u32 [%rd1], %r2;"
    with pytest.raises(
        RuntimeError, match="race in global memory: writes what was written by block"
    ):
        run(body, ints(64), blocks=3)


def test_blocks_that_store_the_same_do_not() -> None:
    assert run("st.global.u32 [%rd1], %r0;", ints(64), blocks=3).tolist() == list(range(64))


def test_blocks_that_read_what_another_wrote_race() -> None:
    body = """
        ld.global.u32 %r2, [%rd1];
        mov.u32 %r3, %ctaid.x;
        add.u32 %r2, %r2, %r3;
        st.global.u32 [%rd1], %r2;"""
    with pytest.raises(RuntimeError, match="race in global memory"):
        run(body, ints(64), blocks=2)


def test_atomics_do_not_race() -> None:
    out = run("atom.global.add.u32 %r2, [%rd0], 1;", ints(64), blocks=3)
    assert out[0] == 3 * 64


def test_a_plain_read_of_what_is_counted_by_others_races() -> None:
    body = """
        atom.global.add.u32 %r2, [%rd0], 1;
        ld.global.u32 %r3, [%rd0];
        st.global.u32 [%rd1+256], %r3;"""
    with pytest.raises(RuntimeError, match="race in global memory"):
        run(body, ints(128))


@pytest.mark.parametrize(
    ("offset", "words"), [(4, "4 bytes beyond a tensor of 256"), (-4, "4 bytes before")]
)
def test_one_element_beyond_a_tensor(offset: int, words: str) -> None:
    storage = torch.zeros(64, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"out of bounds.*{words}"):
        run(f"st.global.u32 [%rd1+{offset}], %r0;", storage)


def test_shared_memory_ends() -> None:
    with pytest.raises(
        RuntimeError, match="out of bounds: bytes 256 to 260 of 256 of shared memory"
    ):
        run("st.shared.u32 [%r1+4], %r0;", ints(64))


def test_misaligned() -> None:
    with pytest.raises(RuntimeError, match="misaligned"):
        run("st.global.u32 [%rd1+2], %r0;", ints(65))


def test_uninitialised_shared_memory_may_be_read_and_not_used() -> None:
    body = "ld.shared.u32 %r2, [%r1]; add.u32 %r2, %r2, 1;"
    run(body, ints(64))
    with pytest.raises(
        RuntimeError, match="uninitialised: what is stored hangs on what nobody wrote"
    ):
        run(body + "st.global.u32 [%rd1], %r2;", ints(64))


def test_uninitialised_register_as_an_address_and_a_branch() -> None:
    with pytest.raises(RuntimeError, match="uninitialised: an address"):
        run("ld.global.u32 %r2, [%rd5];", ints(64))
    with pytest.raises(RuntimeError, match="uninitialised: a predicate"):
        run("@%p3 bra end; mov.u32 %r2, 1; end: mov.u32 %r3, 1;", ints(64))


def test_a_masked_value_may_be_anything() -> None:
    body = "setp.lt.u32 %p1, %r0, 64; selp.b32 %r2, %r0, %r8, %p1; st.global.u32 [%rd1], %r2;"
    assert run(body, ints(64)).tolist() == list(range(64))


def test_a_deadlock_names_who_waits_where() -> None:
    body = "setp.ge.u32 %p1, %r0, 32; @%p1 bra end; bar.sync 0; end: mov.u32 %r2, 1;"
    with pytest.raises(RuntimeError, match=r"deadlock") as raised:
        run(body, ints(64))
    assert "warp 0 waits in line" in str(raised.value)
    assert "at barrier 0, where 1 of 2 warps are" in str(raised.value)
    assert "warp 1 has ended" in str(raised.value)


def test_a_barrier_that_a_part_of_a_warp_reaches() -> None:
    with pytest.raises(RuntimeError, match="divergent"):
        run("setp.ge.u32 %p1, %r0, 16; @%p1 bra end; bar.sync 0; end: mov.u32 %r2, 1;", ints(64))


def test_an_endless_loop() -> None:
    library.library().emulator_limit(10_000)
    try:
        with pytest.raises(RuntimeError, match=r"endless: .* more than 10000 instructions"):
            run("loop: bra loop;", ints(64))
    finally:
        library.library().emulator_limit(100_000_000)


@pytest.mark.parametrize(
    "body",
    [
        "tanh.approx.f32 %r2, %r3;",
        "st.async.u32 [%rd1], %r0;",
        "mul24.lo.u32 %r2, %r0, %r0;",
        "add.cc.u32 %r2, %r0, %r0;",
        "fma.rn.relu.bf16 %r2, %r0, %r0, %r0;",
    ],
)
def test_an_unknown_instruction_is_named(body: str) -> None:
    with pytest.raises(RuntimeError, match=f"unknown instruction, line 18: {body[:8]}"):
        run(body, ints(64))


@pytest.mark.parametrize(("name", "bound"), [("min", min), ("max", max)])
def test_the_smaller_or_larger_or_zero(name: str, bound: Callable[[int, int], int]) -> None:
    body = f"sub.s32 %r2, %r0, 9; {name}.relu.s32 %r3, %r2, 5; st.global.u32 [%rd1], %r3;"
    assert run(body, ints(64)).tolist() == [max(bound(i - 9, 5), 0) for i in range(64)]


def test_magnitudes_and_larger_ones_of_bf16() -> None:
    one, nan = 0x3F80, 0x7FC0  # -1 and what is larger, or -1 if that is no number
    body = f"""
        setp.eq.u32 %p1, %r0, 3;
        selp.b32 %r2, {nan}, %r0, %p1;
        mov.b32 %r3, {one | 0x8000};
        abs.bf16 %r4, %r3;
        max.bf16 %r5, %r2, %r3;
        shl.b32 %r5, %r5, 16;
        or.b32 %r5, %r5, %r4;
        st.global.u32 [%rd1], %r5;"""
    out = run(body, ints(64))
    assert (out & 0xFFFF).eq(one).all()  # |-1|
    larger = torch.arange(64, dtype=torch.int32)
    larger[3] = one - 0x8000  # as a signed number of 16 bits
    assert (out >> 16).equal(larger)


def test_lanes_part_and_meet() -> None:
    body = """
        and.b32 %r2, %r0, 1;
        setp.eq.u32 %p1, %r2, 0;
        mov.u32 %r3, 7;
        @%p1 bra even;
        mov.u32 %r3, 9;
        even: shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
        st.global.u32 [%rd1], %r4;"""
    assert run(body, ints(64)).tolist() == [9, 7] * 32
