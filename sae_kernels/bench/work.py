"""The model of work: FLOPs and bytes of a training step and its parts.

Used by roofline shares, the planner, the floors of GPU checks and the Switch study.
B tokens, D d_in, F n_latents, K kept per token, E experts, s bytes an element of an operand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sae_kernels.bench.cases import Case, Shape

ADAM_FLOPS = 12
"""Operations a weight: 3 for the first moment, 4 for the second, 5 for the update itself."""

_CACHE_SHARE = 0.75  # of a cache that a table may fill and still be found there


class Rates(NamedTuple):
    """A device's rates of data movement.

    Attributes:
        moved: bytes/s read plus written, from and to the device's memory.
        gathered: bytes/s read by rows from a table that the cache holds.
        cache_bytes: size of that cache; infinite where every gather is counted at one rate.
    """

    moved: float
    gathered: float
    cache_bytes: float

    def unit(self, table_bytes: float) -> str:
        """The unit of reading rows of a table: "gathered" if the cache holds it, else "moved"."""
        return "gathered" if table_bytes <= _CACHE_SHARE * self.cache_bytes else "moved"

    def seconds(self, *amounts: Amount) -> float:
        """Seconds of data movements, one after another."""
        return sum(each.amount / float(getattr(self, each.unit)) for each in amounts)


class Amount(NamedTuple):
    """The work of one part of a step in one unit, such as "moved" or "gathered" bytes."""

    part: str
    unit: str
    amount: float


def update_bytes(element_bytes: int, *, moment_bytes: int = 4, copied: bool | None = None) -> int:
    """Bytes that an update reads and writes per weight: master, two moments, copy (written).

    Args:
        element_bytes: of the compute dtype.
        moment_bytes: of an element of Adam's moments.
        copied: whether a compute copy lies beside the master. Default: if the dtypes differ.

    Example:
        >>> update_bytes(4), update_bytes(2), update_bytes(2, moment_bytes=2, copied=False)
        (24, 26, 16)
    """
    copied = element_bytes < 4 if copied is None else copied
    return 2 * (4 + 2 * moment_bytes) + (element_bytes if copied else 0)


@dataclass(frozen=True)
class Work:
    """The work of a step of a TopK SAE, or of a Switch SAE (E > 1), on one device.

    Attributes:
        B, D, F: tokens, d_in and latents, of all experts together.
        K: kept per token; of a shard of the latents its mean share.
        element_bytes: s, of a row of W_dec as it is read.
        n_experts: E; 1 is TopK, which has no router.
    """

    B: int
    D: int
    F: int
    K: float
    element_bytes: int = 2
    n_experts: int = 1

    @classmethod
    def of(cls, shape: Shape, element_bytes: int = 2) -> Work:
        """The work of a step at a case's shape."""
        return cls(*shape, element_bytes=element_bytes)

    @property
    def product(self) -> int:
        """FLOPs of the encoder's product, ``2 B D F / E``."""
        return 2 * self.B * self.D * self.F // self.n_experts

    @property
    def visit(self) -> float:
        """FLOPs of one pass over the kept entries, ``2 B K D``.

        Decoding, the gradient of the codes and those of both matrices take one pass each."""
        return 2 * self.B * self.K * self.D

    @property
    def router(self) -> int:
        """FLOPs of the router and its gradient, ``4 B D E``; 0 for one expert."""
        return 4 * self.B * self.D * self.n_experts if self.n_experts > 1 else 0

    @property
    def step(self) -> float:
        """FLOPs of a training step with dense Adam.

        Biases, ReLU, softmax, selection and norms are left out, and so is AuxK.

        Example:
            >>> topk = Work(1024, 384, 3072, 32).step
            >>> topk == 2 * 1024 * 384 * 3072 + 8 * 1024 * 32 * 384 + 12 * 2 * 3072 * 384
            True
            >>> round(Work(1024, 384, 3072, 32, n_experts=8).step / topk, 2)  # equal width
            0.17
            >>> round(Work(1024, 384, 8 * 3072, 32, n_experts=8).step / topk, 2)  # equal FLOPs
            1.08
        """
        routed = self.n_experts if self.n_experts > 1 else 0
        weights = (2 * self.F + routed) * self.D
        return self.product + self.router + 4 * self.visit + ADAM_FLOPS * weights

    @property
    def used_rows(self) -> float:
        """The most latents that fire, ``min(F, B K)``."""
        return min(self.F, self.B * self.K)

    @property
    def used(self) -> float:
        """Bytes of the decoder rows of the latents that fire, each counted once."""
        return self.used_rows * self.row

    @property
    def gathered(self) -> float:
        """Bytes of a decoder row for every kept entry."""
        return self.B * self.K * self.row

    @property
    def row(self) -> int:
        """Bytes of a decoder row."""
        return self.D * self.element_bytes

    def decode(self, rates: Rates) -> Amount:
        """The data movement of decoding: each used row read from memory once, and gathered per use.

        The slower of the two counts, unless all rows are in the cache.
        """
        slow = self.used / rates.moved > self.gathered / rates.gathered
        if slow and rates.unit(self.F * self.row) == "moved":
            return Amount("decode", "moved", self.used)
        return Amount("decode", "gathered", self.gathered)

    def code_gradients(self) -> Amount:
        """The data movement of the codes' gradient: decoder rows gathered again, from the cache."""
        return Amount("code_gradients", "gathered", self.gathered)

    def latent_order(self, rates: Rates, source_bytes: int) -> Amount:
        """The data movement of one gradient pass: a row [D] of the source for each kept entry."""
        unit = rates.unit(self.B * self.D * source_bytes)
        return Amount("latent_order", unit, self.B * self.K * self.D * source_bytes)


class Need(NamedTuple):
    """The least FLOPs and bytes of a case, for any implementation."""

    flops: float  # multiplications and additions
    product: float  # those of them in the encoder's product
    moved: float  # bytes read and written besides that product's operands, each once

    def floor_ms(self, product_ms: float, copy_bytes_per_s: float) -> float:
        """The least milliseconds: the product as torch does it, then all bytes at a copy's rate."""
        return product_ms * bool(self.product) + 1e3 * self.moved / copy_bytes_per_s


def of_case(case: Case, dtype: str) -> Need:
    """The least work of an exact sparse implementation of a case in a compute dtype.

    All providers are measured by it: dense ones do more, and their rates fall short by that.

    - encode: the product ``2 B D F``; values and indices written, ``8 B K`` bytes.
    - decode: ``2 B K D``; the rows in use once, ``s min(F, B K) D`` bytes, and ``4 B D`` written.
    - backward: code gradients and both weight gradients, ``2 B K D`` each; rows again, x and the
      error read, two fp32 gradients [F, D] written.
    - step: the same work without gradients in memory; weights and Adam's states of both matrices
      read and written, ``24 F D`` bytes each (26 with a bf16 copy).

    Example:
        >>> from sae_kernels.bench.cases import Case, Shape
        >>> of_case(Case("decode", "inference", Shape(2, 4, 16, 2)), "float32")
        Need(flops=32, product=0, moved=96)
    """
    work = Work.of(case.shape, 4 if dtype == "float32" else 2)
    B, D, F, K = case.shape
    product = 0 if case.operation == "decode" else work.product
    if case.operation == "encode":
        return Need(product, product, 8 * B * K)
    moved = work.used + 4 * B * D
    written = {"backward": 4, "step": update_bytes(work.element_bytes)}  # of a weight
    if learns := case.mode in written:
        moved += work.used + 2 * work.element_bytes * B * D + 2 * written[case.mode] * F * D
    return Need(product + work.visit * (4 if learns else 1), product, moved)
