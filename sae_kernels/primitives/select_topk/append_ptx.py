"""Inline PTX that appends scores to candidate lists, for which Triton spills registers.

Every score is compared; few pass. Two passes over a part of the tile, so that all its atomics are
on their way before the first answer is waited for. The comparison is unordered: NaN passes.
"""

from __future__ import annotations

import triton.language as tl

# slot = key >= threshold ? count++ : none
TAKE_A_SLOT = tl.constexpr("""
{
    .reg .pred passes;
    setp.geu.f32 passes, $1, $2;
    mov.u32 $0, 0xffffffff;
    @passes atom.global.relaxed.gpu.add.u32 $0, [$3], 1;
}
""")
# the same where key > threshold
TAKE_A_SLOT_ABOVE = tl.constexpr(TAKE_A_SLOT.value.replace("setp.geu", "setp.gtu"))
TAKE_A_SLOT_OPERANDS = tl.constexpr("=&r,r,r,l")  # slot; key, threshold, address of the count

# if (slot < capacity) list[slot] = (h, latent)
APPEND = tl.constexpr("""
{
    .reg .pred fits;
    .reg .u64 entry;
    setp.lt.u32 fits, $1, $5;
    mul.wide.u32 entry, $1, 8;
    add.u64 entry, entry, $2;
    @fits st.global.v2.b32 [entry], {$3, $4};
    mov.u32 $0, 0;
}
""")
APPEND_OPERANDS = tl.constexpr("=r,r,l,r,r,r")  # unused; slot, address of the list, h, latent, size
