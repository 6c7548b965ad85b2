"""Formatting numbers for readers: few digits, a unit, and "n/a" for missing values."""

from __future__ import annotations

import math
import re

MISSING = "n/a"


def number(value: float | None, digits: int = 3) -> str:
    """Formats a value with ``digits`` significant digits and thousands separators.

    >>> number(0.08713), number(12288), number(float("nan"))
    ('0.0871', '12,288', 'n/a')
    """
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    # Of the rounded value: 9.999 becomes 10.0 and not 10.00.
    magnitude = int(f"{value:.{digits - 1}e}".split("e")[1])
    if not -5 <= magnitude < 15:
        return f"{value:.{digits - 1}e}"
    # At least every digit before the point: 12,345 is never rounded to 12,300.
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def percent(fraction: float | None, digits: int = 3) -> str:
    """Formats a fraction as a percentage."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    text = number(100 * fraction, digits)
    # "0.0400 %" and "100.0 %" would claim a precision that is not there.
    return f"{text.rstrip('0').rstrip('.') if '.' in text and 'e' not in text else text}\u202f%"


def duration(seconds: float | None) -> str:
    """Formats seconds as seconds, minutes or hours."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 100:
        return f"{number(seconds, 2)}\u202fs"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u202fmin {rest}\u202fs"
    return f"{minutes // 60}\u202fh {minutes % 60}\u202fmin"


def rate(per_second: float | None) -> str:
    """Formats tokens per second with an SI prefix; empty if unknown."""
    if per_second is None or not math.isfinite(per_second) or per_second <= 0:
        return ""
    for size, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if per_second >= size:
            return f"{number(per_second / size)}\u202f{prefix} tokens/s"
    return f"{number(per_second)} tokens/s"


def parse(text: str | None) -> float | None:
    """Parses a formatted number or number of seconds; None for anything else.

    >>> parse("20,000,000"), parse("61.5 s"), parse("20 M")
    (20000000.0, 61.5, None)
    """
    match = re.fullmatch(r"\s*(\d[\d,_ ]*(?:\.\d+)?)(?:\s*s)?\s*", text or "")
    return float(re.sub(r"[,_ ]", "", match[1])) if match else None


def size(n_bytes: float) -> str:
    """Formats a number of bytes with a binary unit.

    >>> size(3 * 2**19), size(300 * 2**30)
    ('1.50 MiB', '300 GiB')
    """
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if n_bytes >= 2**power:
            return f"{number(n_bytes / 2**power)} {unit}"
    return f"{number(n_bytes)} B"


def si(value: float) -> str:
    """Formats a number in an SI prefix: k, M or G.

    >>> si(500), si(20_000), si(2.5e6)
    ('500', '20k', '2.5M')
    """
    for power, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:g}{prefix}"
    return f"{value:g}"
