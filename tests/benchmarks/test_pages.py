"""The pages that are written from results say what the results say."""

from __future__ import annotations

from benchmarks import page, quality
from benchmarks.gpu_check import page as gpu_page


def test_the_benchmark_page_is_current() -> None:
    assert page.PAGE.read_text() == page.text(page.RESULTS), "python -m benchmarks.page"


def test_the_gpu_page_is_current() -> None:
    written = gpu_page.PAGE.read_text()
    assert written.count(gpu_page.MARK) == 1
    current = gpu_page.written(written, gpu_page.RESULTS)
    assert written == current, "python -m benchmarks.gpu_check.page"


def test_the_tables_of_architectures_are_current() -> None:
    written = quality.PAGE.read_text()
    assert written.count(quality.MARK) == 1
    assert written == quality.text(written), "python -m benchmarks.quality --page"
