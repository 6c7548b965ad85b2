"""The least time a step or a part of it can take on a device, from rates measured on it.

B tokens, D d_in, F n_latents, K kept per token; rows of weights have 2 bytes an element. A part's
floor is its longest necessary movement of data; the encoder's is the product alone, as torch's
library does it in the same run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from sae_kernels.bench.cases import Shape

# fp32 weight, m and v read and written, and the bf16 copy written.
ADAM_BYTES = 26


class Rates(NamedTuple):
    """Bytes per second.

    Attributes:
        memory: read plus written, from and to the device's memory.
        gather: read by rows from a table that the L2 cache holds.
        l2_bytes: of that cache.
    """

    memory: float
    gather: float
    l2_bytes: int


def decode(shape: Shape, rates: Rates) -> float:
    """Every row that is used leaves memory once; every use of it is gathered."""
    B, D, F, K = shape
    return max(min(F, B * K) * 2 * D / rates.memory, 2 * B * K * D / rates.gather)


def decode_and_backward(shape: Shape, rates: Rates) -> float:
    """Decoding, code gradients (all rows again) and a decoder gradient, written once in bf16.

    The gradient's rows gather one row of the upstream gradient per use, from L2 if it fits there.
    """
    B, D, F, K = shape
    uses = 2 * B * K * D
    upstream = rates.gather if 0.75 * rates.l2_bytes >= 2 * B * D else rates.memory
    written = 2 * F * D / rates.memory
    return decode(shape, rates) + uses / rates.gather + uses / upstream + written


def row_update(shape: Shape, rates: Rates, state_bytes: int = ADAM_BYTES) -> float:
    """One matrix's weights and optimizer states, once in and once out."""
    return shape.F * shape.D * state_bytes / rates.memory


def step(shape: Shape, rates: Rates, product: float) -> float:
    """A whole step: the encoder product, decoder rows once, both matrices' states once."""
    B, D, F, K = shape
    rows = min(F, B * K) * 2 * D / rates.memory
    return product + rows + 2 * row_update(shape, rates)
