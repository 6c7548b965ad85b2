"""benchmarks.attribution_graphs: both ways give the same graph, of which records have ratios.

Runs where circuit-tracer is installed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("circuit_tracer", reason="needs circuit-tracer")

import torch

from benchmarks import attribution_graphs as graphs


def test_both_ways_give_the_same_graph() -> None:
    shipped, accelerated = (run() for run in graphs.runs_of(graphs.SMALL, 4).values())
    assert torch.equal(shipped.selected_features, accelerated.selected_features)
    assert len(shipped.selected_features) == graphs.SMALL.nodes
    expected = shipped.adjacency_matrix
    off = (accelerated.adjacency_matrix - expected).abs().max()
    assert expected.abs().max() > 0
    assert off <= 1e-5 * expected.abs().max()


def test_times_have_a_ratio_to_as_shipped() -> None:
    shipped, _ = graphs.time("zipf", 1, graphs.SMALL)
    assert (shipped["provider"], shipped["ratio"]) == (graphs.SHIPPED, 1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_shipped_patterns_of_a_batch_are_held() -> None:
    shape = graphs.Shape(2, 16, 2, 64, 512, 8, (16,))
    patterns = 2 * 16 * 2 * 512 * 512 * 4
    ours, theirs = (
        graphs.peak(name, 16, shape, 1) for name in (graphs.ACCELERATED, graphs.SHIPPED)
    )
    assert ours < patterns < theirs
