"""Products of s8 with sums in s32, as matrix units multiply them, against torch's."""

from __future__ import annotations

import pytest
import torch

from emulator.hand_written import run

LARGEST = 2**31 - 1
MMA = """
    shl.b32 %r2, %r0, 4;
    cvt.u64.u32 %rd2, %r2;
    add.u64 %rd2, %rd0, %rd2;
    ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd2];
    ld.global.v4.b32 {{%r7, %r8, %r10, %r11}}, [%rd2+512];
    mma.sync.aligned.m16n8k32.row.col{saturated}.s32.s8.s8.s32
        {{%r12, %r13, %r14, %r15}}, {{%r3, %r4, %r5, %r6}}, {{%r7, %r8}},
        {{%r10, %r11, %r10, %r11}};
    st.global.v4.b32 [%rd2+1024], {{%r12, %r13, %r14, %r15}};
"""


def fragments(a: torch.Tensor, b: torch.Tensor, sums: tuple[int, int]) -> torch.Tensor:
    """What the lanes of m16n8k32 load: four words of a, then two of b and two initial sums."""
    lane = torch.arange(32)
    of_a = a.view(torch.int32)  # [16, 8]: a word holds four elements of a row
    of_b = b.view(torch.int32)  # [8, 8]
    row, word = lane // 4, lane % 4
    first = [of_a[row + i % 2 * 8, word + i // 2 * 4] for i in range(4)]
    start = torch.tensor(sums, dtype=torch.int32).expand(32, 2)
    second = [of_b[row, word], of_b[row, word + 4], start[:, 0], start[:, 1]]
    return torch.cat([torch.stack(words, 1) for words in (first, second)])


def multiplied(a: torch.Tensor, b: torch.Tensor, sums: tuple[int, int], how: str) -> torch.Tensor:
    out = torch.cat([fragments(a, b, sums), torch.zeros(32, 4, dtype=torch.int32)])
    run(MMA.format(saturated=how), out, threads=32)
    lane, c = torch.arange(32), torch.empty(16, 8, dtype=torch.int32)
    for i in range(4):
        c[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] = out[64:, i]
    return c


def test_a_warp_multiplies_bytes() -> None:
    torch.manual_seed(0)
    a, b = (torch.randint(-128, 128, (n, 32), dtype=torch.int8) for n in (16, 8))
    expected = a.int() @ b.int().T
    expected[:, 0::2] += 70000
    expected[:, 1::2] -= 5
    assert multiplied(a, b, (70000, -5), "").equal(expected)


@pytest.mark.parametrize(("how", "sign"), [("", -1), (".satfinite", 1)])
def test_sums_beyond_32_bits_wrap_or_stay_at_the_largest(how: str, sign: int) -> None:
    a, b = (torch.full((n, 32), 127, dtype=torch.int8) for n in (16, 8))
    came = multiplied(a, b, (LARGEST - 1, 0), how)
    most = LARGEST if how else LARGEST - 1 + 32 * 127**2 - 2**32
    assert most * sign > 0
    assert came[:, 0::2].eq(most).all()
    assert came[:, 1::2].eq(32 * 127**2).all()


GROUP = """
    shl.b32 %r2, %r0, 4;
    cvt.u64.u32 %rd2, %r2;
    add.u64 %rd2, %rd0, %rd2;
    add.u32 %r2, %r2, %r9;
    ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd2];
    st.shared.v4.b32 [%r2], {{%r3, %r4, %r5, %r6}};
    setp.lt.u32 %p1, %r0, 16;
    @%p1 ld.global.v4.b32 {{%r3, %r4, %r5, %r6}}, [%rd2+2048];
    @%p1 st.shared.v4.b32 [%r2+2048], {{%r3, %r4, %r5, %r6}};
    fence.proxy.async;
    bar.sync 0;
    shr.u32 %r7, %r9, 4;
    cvt.u64.u32 %rd3, %r7;
    or.b64 %rd3, %rd3, {layout};
    add.u64 %rd4, %rd3, 128;
    mov.u32 %r12, {start};
    mov.u32 %r13, {start};
    mov.u32 %r14, {start};
    mov.u32 %r15, {start};
    setp.ne.u32 %p2, %r0, 1000;
    {fence}
    wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {{%r12, %r13, %r14, %r15}}, %rd3, %rd4, %p2;
    wgmma.commit_group.sync.aligned;
    {wait}
    shl.b32 %r2, %r0, 4;
    cvt.u64.u32 %rd2, %r2;
    add.u64 %rd2, %rd0, %rd2;
    st.global.v4.b32 [%rd2+2304], {{%r12, %r13, %r14, %r15}};
"""
RIGHT = {
    # Eight rows of 16 bytes lie together; the other 16 bytes of them 128 bytes on.
    "layout": 128 // 16 << 16 | 256 // 16 << 32,
    "fence": "wgmma.fence.sync.aligned;",
    "wait": "wgmma.wait_group.sync.aligned 0;",
    "start": 9,
}


def in_cores(rows: torch.Tensor) -> torch.Tensor:
    """Rows of 32 bytes as a descriptor without a swizzle has them."""
    return rows.view(-1, 8, 2, 16).transpose(1, 2).reshape(-1).view(torch.int32)


def multiplied_by_a_group(**changes: object) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    a, b = (torch.randint(-128, 128, (n, 32), dtype=torch.int8) for n in (64, 8))
    out = torch.cat([in_cores(a), in_cores(b), torch.zeros(512, dtype=torch.int32)])
    run(GROUP.format(**{**RIGHT, **changes}), out, threads=128, shared=2304)
    thread, c = torch.arange(128), torch.empty(64, 8, dtype=torch.int32)
    for i in range(4):
        row = thread // 32 * 16 + thread % 32 // 4 + i // 2 * 8
        c[row, thread % 4 * 2 + i % 2] = out[576:].view(128, 4)[:, i]
    return c, a.int() @ b.int().T + 9


def test_a_warp_group_multiplies_bytes() -> None:
    came, expected = multiplied_by_a_group()
    assert came.equal(expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fence": ""}, "unfenced"),
        ({"wait": ""}, "a product will write"),
        ({"layout": 128 // 16 << 16 | 512 // 16 << 32}, "out of bounds|uninitialised"),
    ],
    ids=str,
)
def test_a_wrong_product_of_bytes_is_found(changes: dict[str, object], words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        multiplied_by_a_group(**changes)


@pytest.mark.parametrize("types", ["s32.s8.u8", "s32.s4.s4", "s32.u8.u8", "f32.s8.s8"])
def test_other_products_of_bytes_are_unknown(types: str) -> None:
    group = GROUP.replace("s32.s8.s8", types).format(**RIGHT)
    with pytest.raises(RuntimeError, match="unknown instruction"):
        run(group, torch.zeros(1088, dtype=torch.int32), threads=128, shared=2304)
