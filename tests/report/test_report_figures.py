"""The figures: real images whose bars and labels add up to the numbers put in."""

from __future__ import annotations

import io
import math
import re

import pytest
import torch

from sae_kernels.plotting.style import BLUE, ORANGE, STYLE
from sae_kernels.report import CurvePoint, draw_figures
from sae_kernels.report.plots import drawings

matplotlib = pytest.importorskip("matplotlib")


def _draw(report, name):
    from matplotlib.figure import Figure

    figure = Figure()
    with matplotlib.rc_context(STYLE):
        next(d for d in drawings(report) if d.name == name).draw(figure)
    return figure.axes


def _bars(axes, colour):
    from matplotlib.colors import to_hex

    return sum(p.get_height() for p in axes.patches if to_hex(p.get_facecolor()) == colour)


@pytest.fixture(
    scope="module", params=["usual", "all dead", "none dead", "one point", "not finite"]
)
def drawn(request, make_report):
    """A report at the ends of what a run can leave behind, and its figures."""
    nan = torch.full((500,), math.nan)
    report = {
        "usual": lambda: make_report(),
        "all dead": lambda: make_report(latent_density=torch.zeros(500)),
        "none dead": lambda: make_report(latent_density=torch.full((500,), 0.3)),
        "one point": lambda: make_report(curve=[CurvePoint(7, 1.0, 0.5, 3.0, 0.0)]),
        "not finite": lambda: make_report(decoder_cosine=nan, latent_density=nan, curve=[]),
    }[request.param]()
    return report, draw_figures(report)


@pytest.mark.sampled(2)
def test_png_files_are_images_with_ink(drawn):
    from matplotlib.image import imread

    for figure in drawn[1]:
        image = imread(io.BytesIO(figure.png))
        assert image.shape[0] > 600
        assert image.shape[1] > 900
        assert image[..., :3].std() > 0.02, figure.name
        assert image[..., :3].max() == 1.0


def test_every_count_of_never_fired_latents_is_the_input(drawn):
    report, figures = drawn
    never = int((report.latent_density == 0).sum())
    counted = {
        f.name: re.findall(r"(\d[\d,]*)(?: of 500)?(?: latents)? never fired", f.svg + f.alt)
        for f in figures
    }
    expected = [str(never)] * 2
    curves = {"reconstruction": [], "sparsity": []} if report.curve else {}
    assert counted == {**curves, "density": expected, "decoder_cosine": expected}


def test_histograms_hold_every_latent(make_report):
    report = make_report()
    for name in ("density", "decoder_cosine"):
        (axes,) = _draw(report, name)
        assert _bars(axes, ORANGE) == 37
        assert _bars(axes, BLUE) == 463


def test_rounding_past_the_ends_loses_no_latent(make_report):
    cosine = torch.full((500,), 1.0000001)
    report = make_report(decoder_cosine=cosine, latent_density=torch.full((500,), 1.0))
    assert _bars(_draw(report, "decoder_cosine")[0], BLUE) == 500
    assert _bars(_draw(report, "density")[0], BLUE) == 500


def test_values_left_out_are_named(make_report):
    cosine = torch.rand(500)
    cosine[:12] = math.nan
    (axes,) = _draw(make_report(decoder_cosine=cosine), "decoder_cosine")
    assert "(12 not finite)" in axes.get_xlabel()


def test_curves_are_the_points_given(make_report):
    report = make_report()
    loss, fvu = _draw(report, "reconstruction")
    assert loss.lines[0].get_ydata() == pytest.approx([p.loss for p in report.curve])
    assert fvu.lines[0].get_ydata() == pytest.approx([p.fvu for p in report.curve])
    assert fvu.lines[1].get_ydata() == [0.125, 0.125]
    assert fvu.get_yscale() == "log"
    assert fvu.texts[0].get_text() == "0.100"
    assert fvu.get_title(loc="right") == "held-out 0.125"
    l0, dead = _draw(report, "sparsity")
    assert set(l0.lines[0].get_ydata()) == {40.0}
    assert dead.lines[0].get_ydata() == pytest.approx([p.dead_fraction for p in report.curve])


def test_fvu_of_zero_has_no_place_on_a_log_axis_but_does_not_break_it(make_report):
    curve = [CurvePoint(1, 1.0, 0.5, 3.0, 0.0), CurvePoint(2, 0.0, 0.0, 3.0, 0.0)]
    _, fvu = _draw(make_report(curve=curve, measured_fvu=0.0), "reconstruction")
    assert len(fvu.lines) == 1
    assert list(fvu.lines[0].get_ydata()) == [0.5]


def test_drawing_leaves_matplotlib_as_it_was(make_report):
    before = dict(matplotlib.rcParams)
    draw_figures(make_report())
    assert dict(matplotlib.rcParams) == before
