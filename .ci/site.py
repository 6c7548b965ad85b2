"""Hooks of mkdocs: the start page is README.md, and each sub-package gets a page of its API."""

from __future__ import annotations

import ast
import re
import zlib
from pathlib import Path
from typing import Any

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

import sae_kernels

ROOT = Path(sae_kernels.__file__).parent
_ROOM = """# sk.{room}

::: sae_kernels.{room}
    options:
      show_root_heading: false
      show_root_toc_entry: false
"""


class Doctests(griffe.Extension):
    """Shows what follows >>> in a docstring as code, under "Example:" or without a heading."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrites a docstring before its sections are read."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            bare = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)
            obj.docstring.value = bare.sub(
                lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", text
            )


def rooms() -> dict[str, list[str] | None]:
    """Each sub-package of the front door with what its __all__ names, or None without one."""
    return {room: _all_of(room) for room in sae_kernels._OFFERED}


def _all_of(room: str) -> list[str] | None:
    path = ROOT / room / "__init__.py"
    tree = ast.parse((path if path.exists() else ROOT / f"{room}.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    return None


def on_config(config: Any) -> None:
    """Adds the pages of the API to the navigation."""
    pages = [f"api/{name}.md" for name in ("index", *rooms())]
    if not any("API" in entry for entry in config.nav):
        config.nav.append({"API": pages})


def on_files(files: Files, config: Any) -> None:
    """Adds the pages that no file of docs/ is."""
    readme = (ROOT.parent / "README.md").read_text()
    generated = {"index.md": readme.replace("](docs/", "]("), "api/index.md": _front_door()}
    generated |= {f"api/{room}.md": _page(room, names) for room, names in rooms().items()}
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Leaves the words of links to files that are no pages, as tests and examples."""
    return re.sub(r"\[([^]]+)\]\((?:\.\./)?(?:examples|tests|benchmarks)/[^)]*\)", r"\1", markdown)


def on_post_build(config: Any) -> None:
    """Fails where a public name has no place in the API, by the site's inventory of objects.

    Raises:
        PluginError: names that are missing.
    """
    inventory = (Path(config.site_dir) / "objects.inv").read_bytes().split(b"\n", 4)[4]
    shown = {line.split()[0] for line in zlib.decompress(inventory).decode().splitlines()}
    public = {_path(room, name) for room, names in rooms().items() for name in names or ()}
    for room, names in sae_kernels._OFFERED.items():
        public |= {_path(room, sae_kernels._OWN_NAMES.get(name, name)) for name in names}
    if missing := public - shown:
        raise PluginError(f"expected a place in the API for every public name, none for {missing}")


def _page(room: str, names: list[str] | None) -> str:
    """A room's page; without an __all__ it shows every name without an underscore."""
    page = _ROOM.format(room=room)
    if names is None:
        return page
    # A function that bears the name of its file is hidden by it: it is shown by its full name.
    hidden = [name for name in names if _path(room, name).count(".") > 2]
    page += "      show_submodules: true\n"
    page += f"      members: {[name for name in names if name not in hidden]}\n"
    return page + "".join(f"\n::: {_path(room, name)}\n" for name in hidden)


def _path(room: str, name: str) -> str:
    """The full name of a public object: sae_kernels.nn.TopKSAE, sae_kernels.formats.load.load."""
    file = ROOT / room / f"{name}.py"
    defined = file.exists() and f"\ndef {name}(" in file.read_text()
    return f"sae_kernels.{room}.{name}" + (f".{name}" if defined else "")


def _front_door() -> str:
    """The names in ``sk.``, and the rooms."""
    lines = ["# API", "", "`import sae_kernels as sk` offers these names and rooms.", ""]
    for room, names in sae_kernels._OFFERED.items():
        paths = {name: _path(room, sae_kernels._OWN_NAMES.get(name, name)) for name in names}
        shown = ", ".join(f"[`{name}`][{path}]" for name, path in paths.items())
        lines.append(f"- [`sk.{room}`]({room}.md){': ' if shown else ''}{shown}")
    return "\n".join(lines)
