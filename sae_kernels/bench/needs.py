"""What a case needs, whoever does it: the work that counts, and the least time that it can take.

B tokens, D d_in, F n_latents, K kept per token; s bytes an element of the compute dtype. Counted is
what an exact sparse method must do, so that all providers of a case are measured by one rule: dense
ones do more, and their rates fall short by that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sae_kernels.bench.cases import Case

# fp32 weight, m and v read and written, and a copy of the compute dtype written where it differs.
_ADAM_BYTES = 24


class Needs(NamedTuple):
    """Work.

    Attributes:
        flops: multiplications and additions.
        product_flops: of them in the encoder's product.
        moved_bytes: read and written besides that product's operands, each once.
    """

    flops: float
    product_flops: float
    moved_bytes: float

    def floor_ms(self, product_ms: float, copy_bytes_per_s: float) -> float:
        """The product as torch's library does it, then all bytes at the rate of a copy."""
        return product_ms * bool(self.product_flops) + 1e3 * self.moved_bytes / copy_bytes_per_s


def needs(case: Case, dtype: str) -> Needs:
    """Of a case in a compute dtype.

    - encode: the product ``2 B D F``; values and indices written, ``8 B K`` bytes.
    - decode: ``2 B K D``; the rows in use once, ``s min(F, B K) D`` bytes, and ``4 B D`` written.
    - backward: code gradients and both weight gradients, ``2 B K D`` each; rows again, x and the
      error read, two fp32 gradients [F, D] written.
    - step: the same work without gradients in memory; weights and Adam's states of both matrices
      read and written, ``24 F D`` bytes each (26 with a bf16 copy).

    Example:
        >>> from sae_kernels.bench.cases import Case, Shape
        >>> needs(Case("decode", "inference", Shape(2, 4, 16, 2)), "float32")
        Needs(flops=32, product_flops=0, moved_bytes=96)
    """
    B, D, F, K = case.shape
    size = 4 if dtype == "float32" else 2
    encodes = 0 if case.operation == "decode" else 2 * B * D * F
    decodes = 0 if case.operation == "encode" else 2 * B * K * D
    moved = 8 * B * K if encodes and not decodes else 0
    if decodes:
        moved += size * min(F, B * K) * D + 4 * B * D
    learns = case.mode in ("backward", "step")
    if learns:
        moved += size * (min(F, B * K) * D + 2 * B * D)
    if case.mode == "backward":
        moved += 2 * 4 * F * D
    elif case.mode == "step":
        moved += 2 * (_ADAM_BYTES + (size if size < 4 else 0)) * F * D
    return Needs(encodes + decodes * (4 if learns else 1), encodes, moved)
