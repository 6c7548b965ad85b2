"""The latent browser: its numbers, its size, and the page in a real browser."""

from __future__ import annotations

import base64
import json
import re
import zlib
from typing import TYPE_CHECKING, Any

import chromium
import numpy as np
import pytest
import torch

from sae_kernels.data import ShardDataset, ShardWriter
from sae_kernels.nn import ReLUConfig, ReLUSAE, TopKConfig, TopKSAE
from sae_kernels.report.browser import write_browser
from sae_kernels.report.latent_table import latent_table

if TYPE_CHECKING:
    from pathlib import Path

TITLE = {"title": "Latents of <a> test", "subtitle": "with \u201cwords\u201d & signs"}


def unpacked(page: Path) -> dict[str, Any]:
    """The arrays and words that a page holds."""
    found = re.search(r'id="data">([^<]*)<', page.read_text())
    assert found is not None
    header, _, data = zlib.decompress(base64.b64decode(found[1])).partition(b"\n")
    told = json.loads(header)
    for array in told.pop("arrays"):
        size = int(np.prod(array["shape"]))
        flat = np.frombuffer(data, f"<{array['dtype']}", size)
        told[array["name"]] = flat.reshape(array["shape"])
        data = data[flat.nbytes :]
    assert data == b""
    return told


@pytest.fixture
def table(sae, source, to_tokens):
    effects = (torch.tensor([[0], [10], [20], [0], [0], [0]]), torch.full((6, 1), 0.5))
    return latent_table(sae, source, to_tokens, (*effects, *effects))


def test_every_latent_has_its_contexts_histogram_and_neighbours(table):
    assert table.counts.tolist() == [20, 20, 20, 0, 0, 0]
    assert (table.low.tolist(), table.documents.tolist()) == ([0] * 6, list(range(0, 200, 10)))
    assert table.high[:4].tolist() == pytest.approx([2.9, 3.9, 4.9, 0])
    # In document d latent f fires on row 10 d + 3 f alone; the last documents the strongest.
    assert table.peaks[0].tolist() == [190, 180, 170, 160, 150, 140]
    assert table.peaks[3].tolist() == [-1] * 6
    assert table.activations[0, 0, 8].item() == pytest.approx(2.9)
    assert table.activations.count_nonzero(2)[:3].tolist() == [[1] * 6] * 3  # not the next document
    assert table.histogram.sum(1).tolist() == table.counts.tolist()
    assert table.histogram[1, -1] == 3  # 3.7, 3.8 and 3.9 of a range of 3.9, which 16 bars share
    assert table.neighbours.tolist() == [[-1] * 5] * 6  # no two fire on one token
    assert [table.words[w].strip() for w in table.stream[:4]] == ["cat", "and", "and", "dog"]


def test_latents_that_fire_on_the_same_tokens_are_neighbours(source, to_tokens):
    config = TopKConfig(6, 6, k=3)
    sae = TopKSAE(config)
    sae.W_enc.data = torch.eye(6)
    sae.W_enc.data[4] = sae.W_enc.data[0] / 2  # fires where 0 does
    sae.W_enc.data[5] = sae.W_enc.data[0] + sae.W_enc.data[1]  # and where 1 does
    table = latent_table(sae, source, to_tokens)
    assert table.neighbours[4].tolist() == [0, 5, -1, -1, -1]
    assert table.together[4].tolist() == pytest.approx([1, 0.5**0.5, 0, 0, 0])
    assert table.neighbours[1].tolist() == [5, -1, -1, -1, -1]


def test_an_sae_that_never_fires_has_a_page(source, to_tokens, tmp_path):
    sae = ReLUSAE(ReLUConfig(6, 6))
    sae.b_enc.data.fill_(-100.0)
    table = latent_table(sae, source, to_tokens)
    page = unpacked(write_browser(table, tmp_path / "latents.html", **TITLE))
    for name in ("counts", "peaks", "activations", "neighbours", "histogram"):
        assert not page[name].any(), name


def test_the_page_holds_the_table(table, tmp_path):
    page = unpacked(write_browser(table, tmp_path / "latents.html", **TITLE))
    assert [page["words"][w] for w in page["stream"]] == [table.words[w] for w in table.stream]
    assert (page["peaks"].astype(int) - 1).tolist() == table.peaks.tolist()
    activations = page["activations"] / 255 * page["high"][:, None, None]
    assert activations == pytest.approx(table.activations.numpy(), abs=4.9 / 500)
    assert page["promoted_by"].tolist() == [[255]] * 6
    assert page["scales"] == {"promoted": 0.5, "suppressed": 0.5}


def test_rows_without_text_are_refused_by_the_browser(sae, to_tokens, tmp_path):
    with ShardWriter(tmp_path, 6) as writer:
        writer.write(torch.ones(3, 6))
    with pytest.raises(ValueError, match="with their tokens and documents"):
        latent_table(sae, ShardDataset(tmp_path), to_tokens)


@pytest.mark.full
def test_a_page_of_24576_latents_stays_below_5_mb(tmp_path):
    """With the sample that `report` takes, popular tokens and rare ones, and effects."""
    D, F, N, V = 32, 24576, 65536, 30000
    sae = TopKSAE(TopKConfig(D, F, k=32))
    tokens = (torch.rand(N).pow(4) * V).long()
    x = torch.randn(V, D)[tokens] + 0.3 * torch.randn(N, D)
    with ShardWriter(tmp_path / "acts", D) as writer:
        writer.write(x, tokens, torch.arange(N) // 400)
    ids = torch.randint(0, V, (2, F, 5))
    effects = (ids[0], torch.rand(F, 5), ids[1], torch.rand(F, 5))
    source = ShardDataset(tmp_path / "acts")
    table = latent_table(sae, source, lambda ids: [f"token{i}" for i in ids], effects)
    page = write_browser(table, tmp_path / "latents.html", **TITLE)
    assert (table.counts > 0).float().mean() > 0.9
    assert page.stat().st_size < 5_000_000


@pytest.mark.skipif(chromium.PROGRAM is None, reason="no chromium in the PATH")
def test_the_page_in_a_browser(table, tmp_path):
    """Search, order, clicks, keys, dark mode and a phone's width."""
    path = write_browser(table, tmp_path / "latents.html", **TITLE)
    shown = "document.querySelector('#shown h2')?.textContent"
    listed = "[...document.querySelectorAll('#list b')].map(b => b.textContent)"
    with chromium.opened(tmp_path / "profile") as page:
        page.open(path)
        page.wait(shown)
        assert page.value("document.title") == TITLE["title"]
        assert page.value(listed) == ["0", "1", "2", "3", "4", "5"]
        assert page.value(shown) == "Latent 0"
        assert page.value("document.querySelector('mark').textContent") == "kitten"
        assert page.value("document.querySelectorAll('.contexts li').length") == 6
        assert page.value("document.querySelectorAll('.bars i').length") == 16
        assert page.value("document.querySelector('.pair li').textContent.trim()") == "cat"

        page.press("j")
        assert page.value(shown) == "Latent 1"
        page.press("ArrowDown")
        page.press("k")
        assert page.value(shown) == "Latent 1"
        page.click("#list li:nth-child(4)")
        assert page.value(shown) == "Latent 3"
        assert "fired on no token" in page.value("document.querySelector('#shown p').textContent")

        page.press("/")
        for letter in "DoG":
            page.press(letter)
        assert page.value(listed) == ["1"]
        assert page.value(shown) == "Latent 1"
        assert page.value("document.getElementById('found').textContent") == "1 of 6 latents"
        page.press("Escape")
        assert len(page.value(listed)) == 6
        page.value(
            "(e => { e.value = 'strong'; e.dispatchEvent(new Event('change')); })"
            "(document.getElementById('order'))"
        )
        assert page.value(listed)[:3] == ["2", "1", "0"]

        ground = "getComputedStyle(document.body).backgroundColor"
        light = page.value(ground)
        dark = [{"name": "prefers-color-scheme", "value": "dark"}]
        page.call("Emulation.setEmulatedMedia", features=dark)
        assert page.value(ground) != light
        size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        page.call("Emulation.setDeviceMetricsOverride", **size)
        assert page.value("document.documentElement.scrollWidth") == 390
        assert page.complaints() == []
