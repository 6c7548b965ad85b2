"""The folder of an analysis: numbers that JSON holds, pictures that show what was found."""

from __future__ import annotations

import io
import json

import pytest
import torch

from sae_kernels.analyze import analyze, draw, plots, tables, write_analyses
from sae_kernels.analyze.geometry import duplicate_curve
from sae_kernels.nn import SwitchConfig, SwitchSAE, TopKConfig, TopKSAE

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def found():
    """A TopK and two Switch SAEs with copies, zeros and an expert that gets no token."""
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
    switch = SwitchSAE(SwitchConfig(32, 24, k=3, n_experts=4))
    shared = SwitchSAE(SwitchConfig(32, 24, k=3, n_experts=4, shared_expert=True))
    with torch.no_grad():
        switch.W_dec[7], switch.W_dec[3] = switch.W_dec[20], 0
        switch.W_router[2], switch.b_router[:] = 0, 0
        switch.W_router[1] = -switch.W_router[0]  # one of the two is above expert 2's logit of 0
    topk = TopKSAE(TopKConfig(32, 24, 3))
    return [
        analyze(sae, x, name=name)
        for name, sae in (("a$b_{$", topk), ("switch", switch), ("shared", shared))
    ]


def test_the_json_holds_what_was_found(found, tmp_path):
    files = write_analyses(found, tmp_path / "new" / "out", data=["acts"])
    assert [path.name for path in files] == [
        "analysis.json", "neighbours.png", "duplicates.png", "experts.png", "frontiers.png",
    ]  # fmt: skip
    values = json.loads(files[0].read_text(), parse_constant=pytest.fail)
    assert values["data"] == ["acts"]
    _, switch, _ = values["saes"]
    assert switch["duplicates"]["across"] == 2
    assert switch["duplicates"]["n_groups_across"] == 1
    assert switch["n_zero"] == 1
    assert switch["neighbours"]["nearest"]["n"] == 23
    assert switch["experts"]["by_expert"]["n_tokens"][2] == 0
    assert switch["experts"]["by_expert"]["fvu"][2] is None


def test_pictures_are_images_with_ink(found):
    for several in (found, found[:1], found[1:2]):
        pictures = draw(several)
        assert len(pictures) == {3: 4, 1: 3 if several[-1].use else 2}[len(several)]
        for picture in pictures:
            image = matplotlib.image.imread(io.BytesIO(picture.png))
            assert image.shape[0] > 200 * (
                len(several) if picture.name in ("neighbours", "duplicates") else 1
            )
            assert image[..., :3].std() > 0.02, picture.name


@pytest.fixture
def axes():
    from matplotlib.figure import Figure

    return Figure().subplots()


def test_bars_are_the_load(found, axes):
    for analysis in found[1:]:
        axes.clear()
        plots.load_panel(axes, analysis)
        assert [bar.get_height() for bar in axes.patches] == analysis.use.load.tolist()
        first = axes.patches[0].get_x() + axes.patches[0].get_width() / 2
        assert first == pytest.approx(analysis.shared)
        (line,) = axes.lines
        assert line.get_ydata()[0] == 1 / len(analysis.use.load)


def test_histograms_hold_every_latent_with_a_neighbour(found, axes):
    for analysis, kinds in zip(found, (1, 2, 2), strict=True):
        axes.clear()
        plots.neighbours_panel(axes, analysis, -1.0)
        counts = [sum(patch.get_data().values) for patch in axes.patches]
        assert counts == [24 - int(analysis.geometry.zero.sum())] * 2 * kinds
        edges = axes.patches[-1].get_data().edges
        assert edges[-1] <= 1.0 + 1e-12


def test_curves_are_drawn_whole(found, axes):
    high = max(duplicate_curve(found[1].geometry.nearest))
    plots.duplicates_panel(axes, found[1], high)
    _, within, across = axes.lines
    assert high == max(across.get_ydata()) < axes.get_ylim()[1]
    assert across.get_ydata()[-1] == 2 / 24  # a copy is above every threshold
    assert within.get_ydata()[-1] == 0


def test_tables_have_a_column_for_each(found):
    rows = tables.comparison(found)
    assert rows[0] == ("", "a$b_{$", "switch", "shared")
    table = {row[0]: row[1:] for row in rows}
    assert table["latents"] == ("24", "24 in 4 experts", "24 in 4 experts")
    assert table["  a duplicate in another expert"][:2] == ("-", "2 (8.33 %)")
    assert table["groups of duplicates"][1] == "1, 1 across experts, the largest of 2"
    assert table["distinct latents"][1] == "22 (91.7 %)"
    assert tables.by_expert(found[0]) == []
    assert [row[0] for row in tables.by_expert(found[2])] == ["expert", "0, shared", "1", "2", "3"]
    empty = tables.by_expert(found[1])[3]
    assert (empty[0], empty[1], empty[3:6]) == ("2", "0 %", ("n/a",) * 3)


def test_measures_without_data_are_left_out(found):
    alone = analyze(TopKSAE(TopKConfig(32, 24, 3)))
    assert "FVU" not in dict(tables.comparison([alone]))
    assert [picture.name for picture in draw([alone])] == ["neighbours", "duplicates"]


def test_a_picture_that_cannot_be_written_leaves_no_numbers(found, tmp_path):
    (tmp_path / "experts.png").mkdir()
    with pytest.raises(OSError, match=r"experts\.png"):
        write_analyses(found, tmp_path)
    assert not {"analysis.json", "neighbours.png"} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["\udc80", "long " * 50])
def test_any_name_of_a_folder_can_stand_above_a_picture(name):
    analysis = analyze(TopKSAE(TopKConfig(32, 24, 3)), name=name)
    assert len(draw([analysis])) == 2
