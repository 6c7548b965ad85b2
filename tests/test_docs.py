"""What the pages name exists: files and folders, names of the package, options of commands."""

from __future__ import annotations

import functools
import pkgutil
import re
from pathlib import Path

import pytest
import typer.core
import typer.main

from sae_kernels.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Other projects' folders, places with a name of the reader's, the format's own name, a wildcard.
ELSEWHERE = {
    "tests/loading",
    "tests/saes",
    "tests/unit",
    "benchmarks/results/gpu-NAME.jsonl",
    "benchmarks/results/plan-NAME.jsonl",
    "sae_kernels.activations",
    "sk.encode_",
}


@functools.cache
def options() -> dict[str, set[str]]:
    """The options of each command."""
    root = typer.main.get_command(app)
    assert isinstance(root, typer.core.TyperGroup)
    return {
        name: {"--help", *(flag for p in command.params for flag in (*p.opts, *p.secondary_opts))}
        for name, command in root.commands.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    missing = {
        path
        for path in re.findall(
            r"(?<![\w./-])(?:sae_kernels|tests|docs|benchmarks|examples|csrc)/[\w./-]*\w", text
        )
        if not (ROOT / path).exists() and not list(ROOT.glob(f"{path}*"))
    }
    for name in set(re.findall(r"(?<![\w./-])(?:sk|sae_kernels)(?:\.[A-Za-z_]\w*)+", text)):
        try:
            pkgutil.resolve_name(re.sub(r"^sk\b", "sae_kernels", name))
        except (ImportError, AttributeError):
            missing.add(name)
    assert missing <= ELSEWHERE


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_options_of_commands_exist(page: Path) -> None:
    known = options()
    used = re.findall(r"^(?:\$ )?sae-kernels ([\w-]+)(.*)$", page.read_text(), re.MULTILINE)
    for command, rest in used:
        if command not in known:
            assert command in ("--help", "--version"), f"sae-kernels {command}"
            continue
        ours = re.split(r" -- |#", rest)[0]
        flags = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", ours))
        assert flags <= known[command], f"sae-kernels {command}"
