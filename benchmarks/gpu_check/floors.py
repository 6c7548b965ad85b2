"""The least time a part of a step can take on a device, from rates measured on it.

A part's floor is its longest necessary movement of data; the encoder's is the product alone, as
torch's library does it in the same run. Rows of weights have 2 bytes an element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.bench.work import Amount, Work, update_bytes

if TYPE_CHECKING:
    from sae_kernels.bench.cases import Shape
    from sae_kernels.bench.work import Rates


def decode(shape: Shape, rates: Rates) -> float:
    """The least seconds of decoding from bf16 rows."""
    return rates.seconds(Work.of(shape).decode(rates))


def decode_and_backward(shape: Shape, rates: Rates) -> float:
    """The least seconds of decoding, code gradients and a decoder gradient, written once in bf16.

    Both gradients gather one row of the upstream gradient per use, from cache if it fits, and read
    the decoder rows in use once.
    """
    work = Work.of(shape)
    rows = Amount("rows", "moved", work.used)
    written = Amount("gradient", "moved", work.F * work.row)
    order = work.latent_order(rates, work.element_bytes)
    return rates.seconds(work.decode(rates), rows, order, written)


def few_tokens(shape: Shape, rates: Rates) -> float:
    """The least seconds of encoding so few tokens that the encoder's rows, read once, are all."""
    return rates.seconds(Amount("encoder", "moved", shape.F * Work.of(shape).row))


def row_update(shape: Shape, rates: Rates, weight_bytes: int = update_bytes(2)) -> float:
    """The least seconds of an update: one matrix's weights and states, once in and once out."""
    return rates.seconds(Amount("optimizer", "moved", shape.F * shape.D * weight_bytes))


def step(shape: Shape, rates: Rates, product: float) -> float:
    """The least seconds of a step: the encoder's product takes ``product`` of them, then decoder
    rows are read once and both matrices updated."""
    rows = rates.seconds(Amount("decode", "moved", Work.of(shape).used))
    return product + rows + 2 * row_update(shape, rates)
