"""Parses numbers with unit suffixes: 16M latents, 40G tokens.

Sizes in memory (widths, latents, k, batches) use binary units, as published SAEs are named: 16M
latents are 16 * 2^20 = 16,777,216. Tokens of a run use decimal units: 40G are 40,000,000,000.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def size(text: str, what: str) -> int:
    """Parses an integer of at least 1; K, M and G are 2^10, 2^20 and 2^30.

    Raises:
        ValueError: no such number; ``what`` names the option.

    Example:
        >>> size("16M", "--n-latents"), size("1.5k", "--batch"), size("131_072", "--batch")
        (16777216, 1536, 131072)
    """
    return _whole(text, what, _BINARY)


def tokens(text: str, what: str) -> int:
    """Parses an integer of at least 1; K, M, G or B, and T are 10^3, 10^6, 10^9 and 10^12.

    Raises:
        ValueError: no such number; ``what`` names the option.

    Example:
        >>> tokens("40G", "--tokens"), tokens("1.3b", "--tokens"), tokens("5e8", "--tokens")
        (40000000000, 1300000000, 500000000)
    """
    return _whole(text, what, _DECIMAL)


def _whole(text: str, what: str, units: dict[str, int]) -> int:
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?(?:[eE]\d{1,2})?)([A-Za-z]?)", text.strip())
    factor = units.get(match[2].upper()) if match else None
    if match and factor:
        value = Fraction(re.sub("[_,]", "", match[1])) * factor
        if value.denominator == 1 and 1 <= value < 2**63:
            return math.floor(value)
    known = ", ".join(unit for unit in units if unit)
    raise ValueError(
        f"{what}: expected a whole number of at least 1, with {known} if you like, got {text!r}"
    )
