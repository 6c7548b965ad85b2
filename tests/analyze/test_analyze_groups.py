"""Union-find over pairs, against a plain one that takes them one by one."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_kernels.analyze import UnionFind


def plain(n, pairs):
    labels = list(range(n))
    for a, b in pairs:
        low, high = sorted((labels[a], labels[b]))
        labels = [low if label == high else label for label in labels]
    return labels


@given(data=st.data(), n=st.integers(1, 12))
def test_any_pairs_in_any_order(data, n):
    number = st.integers(0, n - 1)
    batches = data.draw(st.lists(st.lists(st.tuples(number, number), max_size=8), max_size=4))
    groups = UnionFind(n)
    for pairs in batches:
        table = torch.tensor(pairs, dtype=torch.int64).view(-1, 2)
        groups.join(table[:, 0], table[:, 1])
    expected = plain(n, [pair for pairs in batches for pair in pairs])
    assert groups.labels.tolist() == expected
    assert groups.sizes().tolist() == [expected.count(i) for i in range(n)]
    parts = torch.arange(n) % 3
    spanning = [len({i % 3 for i in range(n) if expected[i] == root}) > 1 for root in range(n)]
    assert groups.spanning(parts).tolist() == spanning


def test_long_chains_in_one_call():
    n = 5000
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    groups = UnionFind(n)
    groups.join(order[:-1], order[1:])
    assert not groups.labels.any()
    groups = UnionFind(n)
    groups.join(torch.arange(n - 1, 0, -1), torch.arange(n - 2, -1, -1))
    assert not groups.labels.any()
