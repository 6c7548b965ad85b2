"""What a run leaves: its file, tables, comparison, pictures and page say what was measured."""

from __future__ import annotations

import copy
import io
import json
import re
import sys
from typing import TYPE_CHECKING, Any

import pytest
from plausible import PROVENANCE, record, run
from rich.console import Console

from benchmarks import page as benchmarks_page
from sae_kernels.bench.output import cells, page, pictures, ratios, series
from sae_kernels.bench.output.compare import compare
from sae_kernels.bench.output.compare import show as show_comparison
from sae_kernels.bench.provenance import provenance
from sae_kernels.bench.results import Results, Writer, read, roofs
from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def written(path: Path, *records: dict[str, Any]) -> Path:
    with Writer(path, PROVENANCE) as writer:
        for one in records:
            writer.write(one)
    return path


def shown(results: Results, width: int) -> str:
    out = io.StringIO()
    cells.show(results, Console(file=out, width=width))
    return out.getvalue()


def test_a_machine_that_was_made_to_do_with_less_is_shown_as_such(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("ATEN_CPU_CAPABILITY", "SAE_KERNELS_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    facts: Any = provenance("here")
    assert facts["isa_limits"] == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in cells.machine(facts)


def test_each_line_is_on_disk_before_the_next_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    writer = Writer(path, PROVENANCE)
    for n, dtype in enumerate(("bfloat16", "float32"), 1):
        writer.write(record(dtype=dtype, later_key=[1]))
        assert len(read(path).records) == n  # while the writer is open
    assert read(path) == Results(
        PROVENANCE, [record(later_key=[1]), record(dtype="float32", later_key=[1])]
    )
    writer.close()


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    one = record(gflops=float("nan"), max_error=float("inf"), phases_ms={"product": float("nan")})
    path = written(tmp_path / "run.jsonl", one)
    assert not re.search("NaN|Infinity", path.read_text())
    back = read(path).records[0]
    assert (back["gflops"], back["max_error"], back["phases_ms"]) == (None, None, {"product": None})


def test_a_line_cut_off_by_a_kill_is_left_out_and_said(tmp_path: Path) -> None:
    path = written(tmp_path / "run.jsonl", record(), record(dtype="float32"))
    whole = path.read_bytes()
    cuts = range(whole.rindex(b"{", 0, whole.rindex(b"\n", 0, -1) + 2) + 1, len(whole) - 1)
    for cut in (*cuts[:3], cuts[-1]):
        path.write_bytes(whole[:cut])
        results = read(path)
        assert len(results.records) == 1
        assert results.notes == [f"{path}, line 3 is cut off and was left out"]
    path.write_bytes(whole[:-1])  # only the end of the line is missing
    assert (len(read(path).records), read(path).notes) == (2, [])


GOOD = json.dumps({"provenance": {}}) + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "line 1: expected the provenance, got nothing"),
        ("\n\n", "line 1: expected a JSON object, got nothing"),
        ("a,b\n1,2\n", "line 1: expected a JSON object, got a,b"),
        ('{"step": 1}\n', "line 1: expected .*provenance.*, got .*step"),
        (GOOD + "[1]\n", "line 2: expected a JSON object"),
        (GOOD + '{"case": "c", "provider": "P"}\n', "line 2: dtype: expected a text, got None"),
        (GOOD + "{bad}\n" + json.dumps(record()) + "\n", "line 2: expected a JSON object, got"),
        (
            GOOD + json.dumps({**record(), "p20_ms": 0}) + "\n",
            "p20_ms: expected a time above 0, got 0",
        ),
        (GOOD + json.dumps(record(gbps="9")) + "\n", "gbps: expected a finite number or null"),
        (GOOD + json.dumps(record(peak_bytes=float("nan"))) + "\n", "peak_bytes: .* got nan"),
        (GOOD + json.dumps(record(mode=[1])) + "\n", r"line 2: mode: .* got \[1\]"),
        (GOOD + json.dumps(record(phases_ms=[1])) + "\n", "phases_ms: expected an object"),
        (GOOD + json.dumps(record(calls=[1])) + "\n", "calls: expected counts by kind or null"),
        (GOOD + json.dumps(record(calls={"left": {"a": "b"}})) + "\n", "calls: expected counts"),
        ("[" * 100_000 + "\n", "line 1: expected a JSON object"),
    ],
)
def test_a_damaged_or_foreign_file_is_named_in_one_line(
    tmp_path: Path, text: str, said: str
) -> None:
    path = tmp_path / "foreign.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_and_binary_files_are_data_errors(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary"):
        with pytest.raises(DataError, match="expected a file of benchmark results"):
            read(tmp_path / name)


def test_ratios_by_hand() -> None:
    ours = [record("ours", "bfloat16", 4.0), record("ours", "float32", 10.0)]
    theirs = [record("sparsify", "float32", 30.0), record("sparsify", "bfloat16", 12.0)]
    records = [*ours, *theirs]
    quoted = ratios.same_dtype(theirs[1], records)
    # p20 and p80 are 0.95 and 1.1 of a median: 12 * 0.95 / (4 * 1.1), 12 * 1.1 / (4 * 0.95).
    assert quoted is not None
    assert quoted[:3] == pytest.approx((3.0, 11.4 / 4.4, 13.2 / 3.8))
    assert str(quoted) == "2.6 to 3.5x"  # 4 ms is too short for the ratio alone
    assert str(ratios.same_dtype(theirs[0], records)) == "3.00x"
    assert ratios.as_shipped(theirs[0], records)[0] == 7.5  # type: ignore[index]
    assert ratios.as_shipped(theirs[1], records) is None
    assert ratios.headline(records) == [ours[0], theirs[1]]
    # A library without bf16 is quoted in fp32, against ours in fp32.
    assert ratios.headline([*ours, theirs[0]])[1] is theirs[0]
    # The product alone does another thing: no ratio is said of it.
    product = record("product", "bfloat16", 1.0, as_shipped=True)
    assert ratios.headline([*records, product]) == ratios.headline(records)
    assert ratios.same_dtype(product, [*records, product]) is None
    assert ratios.as_shipped(product, [*records, product]) is None


def test_an_accelerated_library_is_compared_with_itself_and_says_what_was_left() -> None:
    calls = {
        "taken": {"encode": 3},
        "left": {"decode (hooks)": 2, "loss (class A)": 1},
        "dense": {},
    }
    alone = [record("sae_lens", "float32", 120.0), record("sae_lens", "bfloat16", 60.0)]
    faster = record("sae_lens+ours:trainer", "float32", 8.0, calls=calls)
    other = record("sae_lens+ours:module", "bfloat16", 20.0, calls={"taken": {}, "left": {}})
    dense = record(
        "sparsify+ours:module", "float32", 9.0, calls={"taken": {"a": 1}, "dense": {"max": 4}}
    )
    records = [record("ours", "float32", 4.0), *alone, faster, other, dense]
    assert str(ratios.over_library(faster, records)) == "15.0x"
    assert str(ratios.over_library(other, records)) == "3.00x"
    for one in (*alone, records[0], dense):  # sparsify did not run alone
        assert ratios.over_library(one, records) is None
    (case,) = cells.cases(Results(PROVENANCE, records))
    assert case.remarks == [
        "sae_lens+ours:trainer fp32 ran as shipped: 2 x decode (hooks); 1 x loss (class A)",
        "sae_lens+ours:module bf16: nothing ran on the kernels",
        "sparsify+ours:module fp32 made dense for: 4 x max",
    ]
    text = shown(Results(PROVENANCE, records), 200)
    assert re.search(r"as alone", text)
    assert re.search(r"sae_lens\+ours:trainer +fp32 +8\.00 .* 15\.0x", text)
    assert case.remarks[0] in text
    assert "as alone" not in shown(Results(PROVENANCE, alone), 200)


def test_lines_of_an_accelerated_library_are_told_apart() -> None:
    names = ("sae_lens", "sae_lens+ours:module", "sae_lens+ours:trainer", "ours")
    records = [record(name, "float32", 9.0, F=F) for name in names for F in (6144, 24576)]
    looks = [pictures.look(record(name, "float32")) for name in names]
    assert len({(look["color"], look["marker"]) for look in looks}) == len(names)
    assert len({look["color"] for look in looks}) == 2
    found = {picture.name: picture for picture in pictures.draw(Results(PROVENANCE, records))}
    assert "sae_lens+ours:trainer fp32" in found["speed-F"].alt
    assert "sae_lens+ours:trainer fp32" in found["headline"].alt


def test_ratios_need_ours() -> None:
    lost = [record("ours", status="failed"), record("dense", "float32")]
    assert ratios.same_dtype(lost[1], lost) is None
    assert "1.2e-06" in shown(Results(PROVENANCE, lost), 80)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_loses_nothing_at_any_width(width: int) -> None:
    reason = "worst [element] is\nfar off"
    results = run()
    results.records.append(record("dense", "float64", status="refused", reason=reason))
    text = shown(results, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "\u2026" not in text
    words = "".join(text.split())
    for record_ in results.records:
        assert record_["provider"] in words
    assert "densefloat64refused:worst[element]isfaroff" in words
    assert "cusparsefp32unable:needsaGPU" in words
    if width >= 80:
        # 24 / 2.8 of bf16; 95 / 2.8 as shipped; ms is 2e3 * 2048 * 768 * 24576 / 2.2e12 * 95.
        assert re.search(r"\* dense +bf16 +843 +801 to 928 +8\.41x", text)
        assert re.search(r"\* dictionary_learning +fp32 +3,338 .* 10\.5x +33\.3x", text)


def test_compare_flags_what_noise_cannot_explain() -> None:
    now = Results(PROVENANCE, [record(), record("dense", median_ms=800.0)])
    stored = copy.deepcopy(now)
    assert not any(row.changed for row in compare(now, stored).rows)
    for factor, changed in ((1.12, False), (1.2, True), (0.8, True)):
        stored.records[1] = record("dense", median_ms=800.0 * factor)
        row = compare(now, stored).rows[1]
        # At 1.12 p20 of the slower, 0.95 * 1.12, is still below p80 of the faster, 1.1.
        assert (row.changed, row.time.value) == (changed, pytest.approx(1 / factor))
        assert row.speedup is not None
        assert row.speedup[1].value == pytest.approx(8 * factor)
    tight = {"p20_ms": 99.9, "p80_ms": 100.1}
    now.records[0], stored.records[0] = (
        record(**tight),
        record(median_ms=108, p20_ms=107, p80_ms=109),
    )
    assert not compare(now, stored).rows[0].changed  # apart, but within 10 %


def test_between_machines_only_ratios_count() -> None:
    now = Results(PROVENANCE, [record(), record("dense", median_ms=800.0)])
    other = Results(
        {**PROVENANCE, "threads": 4},
        [record(median_ms=50.0), record("dense", median_ms=400.0), record("sparsify", "float32")],
    )
    found = compare(now, other)
    assert found.differs == ["threads 2, was 4"]
    assert not any(row.changed for row in found.rows)  # twice as fast, all of them
    assert list(found.only_stored) == [(record()["case"], "sparsify", "float32")]
    other.records[1] = record("dense", median_ms=800.0)
    other.records.append(record("sae_lens"))
    now.records.append(record("sae_lens", status="refused"))
    found = compare(now, other)
    assert [row.changed for row in found.rows] == [False, True]
    assert found.only_stored[record()["case"], "sae_lens", "bfloat16"] == "refused"
    out = io.StringIO()
    show_comparison(now, other, Console(file=out, width=120))
    assert "(threads 2, was 4)" in out.getvalue()
    assert re.search(
        r"\* dense +bf16 +800 +800 +\+0\.0 % +8\.00x +16\.0x +-50\.0 %", out.getvalue()
    )


def test_a_picture_is_drawn_only_of_what_varies() -> None:
    everything = ["headline", "speed-F", "speed-B", "speed-K", "crossover", "memory-F", "roofline"]
    assert [d.name for d in pictures.drawings(run())] == [*everything, "phases"]
    assert pictures.drawings(Results(PROVENANCE, [])) == []
    assert pictures.drawings(Results(PROVENANCE, [record()])) == []
    two = Results(PROVENANCE, [record(), record("dense", median_ms=800.0)])
    assert [d.name for d in pictures.drawings(two)] == ["headline", "roofline"]


def test_lines_hold_one_dtype_and_all_else_equal() -> None:
    lines = series.lines(run(), "F")
    assert [r["F"] for r in lines["dense bf16"]] == [6144, 24576, 98304]
    assert {(r["B"], r["K"]) for records in lines.values() for r in records} == {(2048, 32)}
    assert "dense fp32" not in lines
    axis, (mine, *dense) = series.crossing(run())[0], series.crossing(run())[1].values()
    assert (axis, mine[0]["provider"]) == ("K", "ours")
    assert {r["dtype"] for records in (mine, *dense) for r in records} == {"bfloat16"}
    # Sizes at which only one of the two was measured make no point of a crossover.
    apart = [record(F=F) for F in (1024, 2048)] + [record("dense", F=F) for F in (2048, 4096)]
    assert series.crossing(Results(PROVENANCE, apart)) == ("", {})


def test_the_roofs_are_the_best_of_the_run() -> None:
    slow, fast = (record("product", "float32", ms) for ms in (20.0, 10.0))
    found = roofs(Results(PROVENANCE, [slow, fast, record("copy", "int8", 64.0)]))
    # 256 MiB read and written in 64 ms, and 2 * 2048 * 768 * 24576 operations in 10.
    assert found == (pytest.approx(2 * 2**28 / 0.064), {"float32": pytest.approx(7.73094113e12)})


@pytest.mark.full
def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    results = run()
    bad = '<script src="https://example.org/x.js">'
    results.records.append(record("dense", "float64", status="failed", reason=bad))
    html = page.write(results, tmp_path / "new").read_text(encoding="utf-8")
    assert not re.search(r"<(script|link|iframe)|@import|url\(", html)
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert len(sources) == 8
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert "&lt;script src=" in html
    assert re.search(r'<tr class="quoted"><th>\* dense</th><th>bf16</th><td>843</td>', html)
    assert "loss is FVU, not the squared error" in html
    assert len(list((tmp_path / "new").glob("*.png"))) == 8


def test_missing_matplotlib_names_the_extra_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "sae-kernels\[report\]"'):
        page.write(run(), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_benchmark_page_takes_files_of_the_command(tmp_path: Path) -> None:
    refused = record("sae_lens", "float32", status="refused", reason="a | b")
    written(tmp_path / "bench-here.jsonl", record(), record("dense", median_ms=800.0), refused)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "bench-headline.png").touch()
    text = benchmarks_page.text(tmp_path, tmp_path / "pictures")
    assert "![headline](pictures/bench-headline.png)" in text
    assert "- sparsify: eai-sparsify 1.3.3, torch 2.9.1+cpu, loss is FVU" in text
    assert r"| \* dense | bf16 | 800 | 760 to 880 | 8.00x |" in text
    assert r"- sae_lens fp32 refused: a \| b" in text
