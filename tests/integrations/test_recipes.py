"""docs/recipes.md: each block runs as it stands where its library is installed."""

from __future__ import annotations

import re
from importlib import util
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "recipes.md"
BLOCKS = dict(re.findall(r"\n## ([^\n]+)\n.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
MODULES = {
    "circuit-tracer": "circuit_tracer",
    "llamascopium": "llamascopium",
    "interp_embed": "interp_embed",
    "hypothesaes": "hypothesaes",
    "delphi": "delphi",
    "SAEBench": "sae_bench",
}


def test_every_recipe_is_known() -> None:
    assert BLOCKS.keys() == MODULES.keys()


@pytest.mark.parametrize("name", MODULES)
def test_a_recipe(name: str) -> None:
    if util.find_spec(MODULES[name]) is None:
        pytest.skip(f"needs {name}: pip install it beside this package")
    exec(compile(BLOCKS[name], f"{PAGE.name}: {name}", "exec"), {"__name__": "recipe"})
