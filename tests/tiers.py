"""Which tests run: a fast tier, a full tier, and every case there is.

A parametrized test multiplies its axes (input x dtype x backend x ...), and most of the product
repeats a kind of fault. So of its cases the **fast** tier runs enough to meet every value of every
axis, the **full** tier enough to meet every pair of values, and only ``pytest -m ""`` runs all of
them: cases beyond the first cover are marked ``full``, those beyond the second ``slow``, as tests
that are long by themselves are by hand. ``@pytest.mark.sampled(n)`` is for a table of long cases,
of which the fast tier runs n, spread evenly.
"""

from __future__ import annotations

from collections import defaultdict
from itertools import combinations
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FAST = "not full and not slow"  # what pyproject gives -m
Row = tuple[tuple[int, str], ...]  # a case: axes by number, each with its value's id


def mark(items: Iterable[pytest.Item]) -> None:
    """Marks the cases that the fast and the full tier can do without."""
    tables: defaultdict[str, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if getattr(item, "callspec", None):
            tables[item.nodeid.partition("[")[0]].append(item)
    for table in tables.values():
        # One id for each parametrize() that a test is under; callspec.params has one value for each
        # argument instead, and a table of several arguments is one axis.
        rows = [tuple(enumerate(item.callspec._idlist)) for item in table]  # type: ignore[attr-defined]
        fast, full = covers(rows)
        sampled = table[0].get_closest_marker("sampled")
        if sampled:
            fast = set(sorted(fast)[:: -(-len(fast) // sampled.args[0])])
        for i, item in enumerate(table):
            if i not in full:
                item.add_marker(pytest.mark.slow)
            elif i not in fast:
                item.add_marker(pytest.mark.full)


def covers(rows: Sequence[Row]) -> tuple[set[int], set[int]]:
    """Positions of rows that hold every value, and of rows (those among them) that hold every pair.

    Greedy: the next row is the one with the most values not seen yet, then pairs not seen yet; of
    equals the first.

    Example:
        >>> from itertools import product
        >>> rows = [tuple(enumerate(row)) for row in product("ab", "cd", "ef")]
        >>> fast, full = covers(rows)
        >>> [rows[i] for i in sorted(fast)]
        [((0, 'a'), (1, 'c'), (2, 'e')), ((0, 'b'), (1, 'd'), (2, 'f'))]
        >>> len(full)  # of 8: three axes of two values have 12 pairs, a row has three
        5
    """
    pairs = [set(combinations(row, 2)) for row in rows]
    unseen_values = {value for row in rows for value in row}
    unseen_pairs = set().union(*pairs)
    chosen: list[int] = []

    def take(best: int) -> None:
        chosen.append(best)
        unseen_values.difference_update(rows[best])
        unseen_pairs.difference_update(pairs[best])

    while unseen_values:
        take(
            max(
                range(len(rows)),
                key=lambda i: (
                    len(unseen_values.intersection(rows[i])),
                    len(unseen_pairs & pairs[i]),
                    -i,
                ),
            )
        )
    fast = set(chosen)
    while unseen_pairs:
        take(max(range(len(rows)), key=lambda i: (len(unseen_pairs & pairs[i]), -i)))
    return fast, set(chosen)
