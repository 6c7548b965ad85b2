"""The page: what it says, what it must not contain, and that it survives bad input."""

from __future__ import annotations

import math
import re
import sys
from html.parser import HTMLParser
from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.plotting.units import duration, number, percent, rate
from sae_kernels.report import CurvePoint, LatentExamples, TokenContext, write_report
from sae_kernels.report.contexts import peak_word

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("matplotlib")

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Outline(HTMLParser):
    """Collects text, ids and tags, and fails on a tag closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def _tiles(html: str) -> dict[str, str]:
    return dict(re.findall(r'<dt>([^<]*)</dt><dd class="big">([^<]*)</dd>', html))


@pytest.mark.full
def test_page_shows_the_numbers_and_leaves_only_finished_files(make_report, tmp_path: Path):
    page = write_report(make_report(), tmp_path / "new" / "run")
    html = page.read_text(encoding="utf-8")
    assert _tiles(html) == {
        "Held-out FVU": "0.125",
        "L0": "32.3",
        "Dead latents": "7.4\u202f%",
        "Training time": "20\u202fs",
    }
    assert "87.5\u202f% of variance explained" in html
    assert "37 of 500 never fired" in html
    assert "100\u202fk tokens/s" in html
    assert "sae-kernels demo --seed 0" in html
    outline = Outline(html)
    assert len(outline.ids) == len(set(outline.ids))
    assert outline.tags.count("svg") == 4
    assert sorted(p.name for p in page.parent.iterdir()) == [
        "decoder_cosine.png", "density.png", "reconstruction.png", "report.html", "sparsity.png",
    ]  # fmt: skip


def test_page_is_self_contained(make_report, tmp_path: Path):
    html = write_report(make_report(), tmp_path).read_text(encoding="utf-8")
    assert not re.search(r"https?://", html)
    assert not re.search(r"@import|url\((?!#)", html)
    targets = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert all(target.startswith("#") for target in targets)
    assert {t[1:] for t in targets} <= set(Outline(html).ids)


@pytest.mark.full
def test_hostile_text_is_escaped_everywhere(make_report, tmp_path: Path):
    bad = '<script>alert("x")</script>'
    context = TokenContext([bad, bad, "\ud800", "\n"], [1.0, 2.0, 0.5, 0.0], 1)
    report = make_report(
        title=bad, subtitle=bad, facts={bad: bad}, metrics={bad: 1.0}, command=bad,
        examples=[LatentExamples(3, 0.1, 2.0, [context])],
    )  # fmt: skip
    html = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert "script" not in Outline(html).tags
    # title twice, subtitle, fact twice, metric, command, chip, card, and two tokens.
    assert html.count("&lt;script&gt;") == 11
    assert "↵" in html


@pytest.mark.full
def test_tokens_join_shade_and_mark_the_peak(make_report, tmp_path: Path):
    html = write_report(make_report(), tmp_path).read_text(encoding="utf-8")
    row = re.search(r'<li tabindex="0">.*?</li>', html)
    assert row is not None
    assert Outline(row[0]).text == "6.00the riverbank was"
    assert '<span style="--a:0.25" title="activation 1.50">river</span>' in row[0]
    assert '<mark style="--a:1.00" title="activation 6.00">bank</mark>' in row[0]
    assert "peaks on <b>riverbank</b>" in html


@pytest.mark.parametrize(
    ("tokens", "peak", "word"),
    [
        (["a", "photo", "##synth", "##esis", "b"], 2, "photosynthesis"),
        (["##ing", "x"], 0, "ing"),
        ([" the", " cat"], 1, "cat"),
        (["##", "x"], 0, "##"),
    ],
)
def test_peak_word(tokens, peak, word):
    assert peak_word(TokenContext(tokens, [1.0] * len(tokens), peak)) == word


@pytest.mark.full
def test_tokens_that_bring_their_own_space_get_no_second_one(make_report, tmp_path: Path):
    context = TokenContext([" the", " cat", "fish", " sat"], [0.0, 1.0, 0.0, 0.0], 1)
    report = make_report(examples=[LatentExamples(1, 0.1, 1.0, [context])])
    html = write_report(report, tmp_path).read_text(encoding="utf-8")
    row = re.search(r'<span class="line">.*?</li>', html)
    assert row is not None
    assert re.sub("<[^>]*>", "", row[0]) == " the catfish sat"


@pytest.mark.full
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_show_as_missing(make_report, tmp_path: Path, value: float):
    context = TokenContext(["a", "b"], [value, 1.0], 0)
    report = make_report(
        metrics={"fvu": value, "l0": value, "dead_fraction": value, "seconds": value},
        measured_fvu=value,
        curve=[CurvePoint(s, value, value, value, value) for s in range(3)],
        decoder_cosine=torch.full((500,), value),
        examples=[LatentExamples(3, value, value, [context])],
    )
    html = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert set(_tiles(html).values()) == {"n/a"}
    assert not re.search(r"\b(nan|inf)\b", Outline(html).text, re.IGNORECASE)


def test_a_report_with_nothing_in_it(make_report, tmp_path: Path):
    report = make_report(
        facts={}, metrics={}, curve=[], measured_fvu=None, latent_density=torch.zeros(0),
        decoder_cosine=torch.zeros(0), examples=[], command=None,
    )  # fmt: skip
    html = write_report(report, tmp_path).read_text(encoding="utf-8")
    assert set(_tiles(html).values()) == {"n/a"}
    assert "No example latents" in html
    assert "Reproduce" not in html


@pytest.mark.full
def test_a_failed_write_keeps_the_old_page(make_report, tmp_path: Path, monkeypatch):
    page = write_report(make_report(title="old"), tmp_path)
    before = page.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_report(make_report(title="new"), tmp_path)
    assert page.read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_missing_matplotlib_names_the_extra_and_writes_nothing(make_report, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "sae-kernels\[report\]"'):
        write_report(make_report(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_fields_are_refused(make_report):
    with pytest.raises(ValueError, match="2 tokens but 1 activations"):
        TokenContext(["a", "b"], [1.0], 0)
    with pytest.raises(ValueError, match="peak 1 is outside"):
        TokenContext(["a"], [1.0], 1)
    with pytest.raises(ValueError, match=r"must both be \[F\], got \[3\] and \[500\]"):
        make_report(latent_density=torch.zeros(3))


def test_units():
    assert [number(v) for v in (0, 0.5, 12345.6, 9.999, 1e-9, -0.0312)] == [
        "0", "0.500", "12,346", "10.0", "1.00e-09", "-0.0312",
    ]  # fmt: skip
    assert [percent(v) for v in (0, 1, 0.0004, None)] == [
        "0\u202f%", "100\u202f%", "0.04\u202f%", "n/a",
    ]  # fmt: skip
    assert [duration(v) for v in (1.25, 125, 3725)] == [
        "1.2\u202fs", "2\u202fmin 5\u202fs", "1\u202fh 2\u202fmin",
    ]  # fmt: skip
    assert [rate(v) for v in (2.5e6, 12, math.nan)] == [
        "2.50\u202fM tokens/s", "12.0 tokens/s", "",
    ]  # fmt: skip
