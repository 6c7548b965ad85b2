"""Switch against TopK on stored activations: the runs, the tables, the pictures and the page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks.switch_frontier import pictures, tables
from benchmarks.switch_frontier.__main__ import main
from benchmarks.switch_frontier.runs import ARMS, curve, plans
from sae_kernels.bench.work import ADAM_FLOPS, Work
from sae_kernels.data import ShardWriter

if TYPE_CHECKING:
    from pathlib import Path

D = 16
SMALL = ["--n-latents", "32", "--experts", "2", "4", "--k", "2", "4", "--steps", "30"]
SMALL += ["--batch-size", "64", "--threads", "1"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The options for 512 tokens in two folders."""
    draw = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("activations")
    for side in ("train", "held"):
        with ShardWriter(folder / side, D) as writer:
            writer.write(torch.randn(512, D, generator=draw))
    return ["--data", str(folder / "train"), "--held-out", str(folder / "held")]


@pytest.fixture(scope="module")
def results(stored: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of runs with two seeds."""
    out = tmp_path_factory.mktemp("results") / "switch-frontier-here.jsonl"
    main([*stored, "--out", str(out), "--seeds", "0", "1", *SMALL])
    return out


def test_each_run_leaves_a_line(results: Path) -> None:
    facts, records = tables.read(results)
    assert str(results.parent) not in facts["command"]
    assert "--steps 30" in facts["command"]
    shapes = tables.by_shape(records)
    assert {shape: len(runs) for shape, runs in shapes.items()} == {
        (arm, n, k): 2
        for arm, n in [("base", 1), *((arm, n) for arm in ARMS for n in (2, 4))]
        for k in (2, 4)
    }
    for record in records:
        assert record["architecture"] == ("topk" if record["arm"] == "base" else "switch")
        assert record["n_latents"] == 32 * (record["n_experts"] if record["arm"] == "flops" else 1)
        assert 0 < record["fvu"] < 1
        assert record["l0"] <= record["k"]
        assert 1 / record["n_experts"] <= record["largest_load"] <= 1
        assert 1 <= record["effective_experts"] <= record["n_experts"] * (1 + 1e-6)


def test_a_curve_ends_where_the_run_does(results: Path) -> None:
    for record in tables.read(results)[1]:
        points = record["curve"]
        for name in ("step", "seconds", "flops"):
            values = [point[name] for point in points]
            assert values == sorted(set(values)), name
        assert points[-1]["step"] == record["steps"]
        assert points[-1]["flops"] == record["flops"]
        assert points[-1]["seconds"] == pytest.approx(record["seconds"], rel=1e-2, abs=1e-2)
        assert points[-1]["fvu"] < points[0]["fvu"]


def test_a_point_of_a_curve_is_the_mean_since_the_one_before() -> None:
    fvu = [float(i) for i in range(40)]
    points = curve(fvu, fvu, 1)
    before, last = points[-2]["step"], points[-1]["step"]
    assert last == 40
    assert points[-1]["fvu"] == pytest.approx(sum(fvu[before:]) / (40 - before))


def test_resuming_makes_what_is_missing(stored: list[str], results: Path, tmp_path: Path) -> None:
    lines = results.read_text().splitlines(keepends=True)
    out = tmp_path / "half.jsonl"
    out.write_text("".join(lines[:-2]) + lines[-2][:50])  # it was killed while it wrote
    asked = [*stored, "--out", str(out), "--seeds", "0", "1", *SMALL, "--resume"]
    main(asked)
    timed = {"seconds", "step_ms", "curve"}

    def learnt(path: Path) -> list[dict[str, Any]]:
        return [{k: v for k, v in r.items() if k not in timed} for r in tables.read(path)[1]]

    assert learnt(out) == learnt(results)
    done = out.read_bytes()
    main(asked)
    assert out.read_bytes() == done


def test_results_are_not_written_over(stored: list[str], results: Path) -> None:
    before = results.read_bytes()
    with pytest.raises(SystemExit):
        main([*stored, "--out", str(results), *SMALL])
    assert results.read_bytes() == before


def test_settings_that_cannot_be_stop_before_the_first_run(
    stored: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "none.jsonl"
    with pytest.raises(ValueError, match="k: expected at most 8, the latents of one of 4 experts"):
        main([*stored, "--out", str(out), *SMALL, "--k", "4", "9"])
    assert not out.exists()


def test_equal_flops_are_equal_but_for_router_and_adam() -> None:
    B, F, k = 1024, 3072, 32
    base = Work(B, D, F, k).step
    for n in (2, 8):
        wide = Work(B, D, n * F, k, n_experts=n).step
        router = 2 * 2 * B * D * n + ADAM_FLOPS * D * n
        assert wide - base == router + ADAM_FLOPS * 2 * (n - 1) * F * D
        narrow = Work(B, D, F, k, n_experts=n).step
        assert base - narrow == 2 * B * D * F * (n - 1) // n - router


def test_the_runs_of_a_seed_come_together() -> None:
    found = plans(32, [2], [4, 8], [0, 1], ["width"], steps=1, batch_size=1, lr=0.1)
    assert [(plan.seed, plan.k, plan.arm) for plan in found] == [
        (seed, k, arm) for seed in (0, 1) for k in (4, 8) for arm in ("base", "width")
    ]


def test_pictures_of_one_arm_and_of_both(results: Path) -> None:
    records = tables.read(results)[1]
    one = [record for record in records if record["arm"] != "flops"]
    both, alone = pictures.draw(records), pictures.draw(one)
    assert [p.name for p in both] == [p.name for p in alone]
    assert {p.name for p in both} == set(tables.SHOWN)
    for wide, narrow in zip(both, alone, strict=True):
        assert _width(wide.png) > _width(narrow.png), wide.name


def test_drawing_needs_no_training(results: Path, tmp_path: Path) -> None:
    main(["--out", str(results), "--plots", str(tmp_path / "plots")])
    assert len(list((tmp_path / "plots").glob("switch-*.png"))) == 3


def test_the_page_says_what_the_results_give(results: Path, tmp_path: Path) -> None:
    frame = f"# Title\n\nAbove.\n\n{tables.BEGIN}\nold\n{tables.END}\n\nBelow.\n"
    page = tables.written(frame, results.parent, tmp_path)
    assert page.startswith("# Title\n\nAbove.\n\n")
    assert page.endswith(f"{tables.END}\n\nBelow.\n")
    assert "old" not in page
    assert tables.written(page, results.parent, tmp_path) == page
    runs = tables.by_shape(tables.read(results)[1])
    ours, base = (
        sum(run["fvu"] for run in runs[shape]) / 2 for shape in (("flops", 4, 2), ("base", 1, 2))
    )
    assert f"| 4 experts | 128 | {ours:.4f} ({100 * (ours / base - 1):+.1f} %) |" in page
    assert "| 2 experts, equal width | 32 |" in page
    assert "![" not in page
    assert "Not measured yet." in tables.written(frame, tmp_path, tmp_path)
    (tmp_path / "switch-flops.png").write_bytes(b"")
    assert f"({tmp_path.name}/switch-flops.png)" in tables.written(page, results.parent, tmp_path)


def test_a_page_without_its_marks_is_refused() -> None:
    for page in (
        "",
        tables.BEGIN,
        f"{tables.END}{tables.BEGIN}",
        2 * f"{tables.BEGIN}{tables.END}",
    ):
        with pytest.raises(ValueError, match=r"switch\.md: expected"):
            tables.written(page)


def test_the_switch_page_is_current() -> None:
    written = tables.PAGE.read_text()
    assert written == tables.written(written), "python -m benchmarks.switch_frontier --page"


def _width(png: bytes) -> int:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(png[16:20], "big")
