"""What a release is made from says the same everywhere: versions, Pythons, scripts, notes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sae_kernels._version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / ".github").exists(), reason="not a source tree")


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_the_citation_is_of_this_version() -> None:
    assert read("CITATION.cff")["version"] == __version__


def test_wheels_are_built_for_every_python_that_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    built = [name.removesuffix("-manylinux*") for name in project["tool"]["cibuildwheel"]["build"]]
    oldest = int(re.fullmatch(r">=3\.(\d+)", project["project"]["requires-python"])[1])  # type: ignore[index]
    assert built == [f"cp3{minor}" for minor in range(oldest, oldest + len(built))]
    assert built[-1] == "cp314"


@pytest.mark.parametrize("name", ["bug", "idea"])
def test_an_issue_asks_for_the_environment(name: str) -> None:
    fields = {field["id"]: field for field in read(f".github/ISSUE_TEMPLATE/{name}.yml")["body"]}
    assert fields["env"]["attributes"]["label"] == "`sae-kernels env --json`"
    assert fields["env"].get("validations", {}).get("required", False) == (name == "bug")


def test_workflows_call_scripts_that_are_here() -> None:
    called = {
        script
        for path in (ROOT / ".github/workflows").glob("*.yml")
        for job in read(f".github/workflows/{path.name}")["jobs"].values()
        for step in job["steps"]
        for script in re.findall(r"\.ci/[\w-]+", step.get("run", ""))
    }
    assert called == {".ci/run", ".ci/nightly", ".ci/release-notes"}
    assert all((ROOT / script).is_file() for script in called)


def test_every_page_is_on_the_site_and_in_the_readme() -> None:
    pages = {path.name for path in (ROOT / "docs").glob("*.md")}
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert pages <= listed, "add it to nav in mkdocs.yml"
    assert pages <= set(re.findall(r"docs/([\w-]+\.md)", (ROOT / "README.md").read_text()))


def notes_of(version: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / ".ci/release-notes"), version]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_notes_of_a_release_are_its_section_of_the_changelog() -> None:
    section = re.search(
        r"^## (\S+).*\n((?:(?!## ).*\n?)*)", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert section is not None
    assert notes_of(section[1]).stdout.strip() == section[2].strip()


def test_a_release_without_a_section_has_no_notes() -> None:
    done = notes_of("9.9")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "expected a section '## 9.9' in CHANGELOG.md, found none\n"
