"""The examples are scripts of a page each; .ci/run runs them all."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_a_page_that_says_what_it_leaves(path: Path) -> None:
    text = path.read_text()
    about = ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 120
    assert about is not None
    assert "examples-out" in about  # where its picture is


def test_ci_runs_every_example() -> None:
    assert 'for example in examples/*.py; do python "$example"' in (ROOT / ".ci/run").read_text()
