"""Who may import whom: the layers point one way, and an import loads and prints nothing extra."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sae_kernels

ROOT = Path(sae_kernels.__file__).parent
# A module may import from its own layer and from lower ones only.
LAYERS = (
    {"_C", "_version", "errors", "files", "gpu", "machine", "tensors"},
    {"backends"},
    {"primitives"},
    {"codes"},
    {"functional"},
    {"config"},
    {"nn", "formats", "testing"},
    {"step"},
    {"data", "runs"},
    {"training", "harvest", "plotting"},
    {"cli", "bench", "demo", "report", "analyze", "__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def dotted(path: Path) -> str:
    """sae_kernels.a.b for a/b.py and for a/b/__init__.py."""
    parts = path.with_suffix("").parts
    return ".".join(("sae_kernels", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def runtime_nodes(tree: ast.AST) -> list[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING:``, which never run."""
    nodes = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            nodes += [n for part in child.orelse for n in (part, *runtime_nodes(part))]
        else:
            nodes += [child, *runtime_nodes(child)]
    return nodes


def imports(path: Path) -> set[str]:
    """The dotted names of all modules (or their members) that a module imports when it runs."""
    tree = ast.parse((ROOT / path).read_text())
    found: set[str] = set()
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = ("sae_kernels", *path.parts)[: -node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def inside(path: Path) -> set[str]:
    """What a module imports of this package, without the leading name."""
    prefix = "sae_kernels."
    return {name.removeprefix(prefix) for name in imports(path) if name.startswith(prefix)}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_arrows_point_down(path: Path) -> None:
    if path.name == "__init__.py" and len(path.parts) == 1:
        own = RANK["nn"]  # the package itself hands out what functional and codes hold
    else:
        part = path.parts[0].removesuffix(".py")
        assert part in RANK, f"{part} has no layer: add it to LAYERS and to docs"
        own = RANK[part]
    for name in inside(path):
        layer = name.split(".")[0]
        if layer in RANK:
            assert RANK[layer] <= own, f"{path} imports {name} from a higher layer"


def test_the_walk_sees_imports() -> None:
    # Guards the tests here against passing because nothing is found.
    assert "primitives.checks" in inside(Path("functional/encode.py"))
    assert "backends._C" not in inside(Path("backends/cpu.py"))
    assert "_C" in inside(Path("backends/cpu.py"))
    assert "plotting.page" in inside(Path("report/page.py"))
    assert "primitives.terms.Term" not in inside(Path("backends/cpu.py")), "for type checkers only"


BACKENDS = {path.stem for path in MODULES if path.match("backends/*.py")} - {"__init__"}


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if p.stem in BACKENDS and p.parts[0] in ("backends", "primitives")],
    ids=str,
)
def test_a_backend_never_imports_another(path: Path) -> None:
    others = BACKENDS - {path.stem}
    for name in inside(path):
        hit = others & set(name.split("."))
        assert not hit, f"{path} imports {name} of the backend {hit}"


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.match("primitives/*/reference.py")], ids=str
)
def test_the_reference_stands_on_torch_alone(path: Path) -> None:
    for name in imports(path):
        allowed = (
            name.split(".")[0] in ("__future__", "itertools", "typing", "torch")
            or ".reference" in name
            or name.endswith(".halves")  # torch alone too: the layout of a split master
            or name.startswith(("sae_kernels.primitives.terms", "sae_kernels.primitives.checks"))
        )
        assert allowed or name == "sae_kernels.primitives.checks", f"{path} imports {name}"
        assert "backends" not in name.split("."), f"{path} imports {name}"


def test_every_primitive_has_a_contract_and_a_reference() -> None:
    folders = {p.parts[1] for p in MODULES if p.parts[0] == "primitives" and len(p.parts) == 3}
    assert len(folders) >= 8
    for folder in folders:
        for name in ("__init__.py", "reference.py", "cpu.py"):
            assert Path("primitives", folder, name) in MODULES, f"{folder} has no {name}"


HEAVY = ("triton", "cupy", "transformers", "matplotlib", "rich", "typer", "safetensors")


def test_importing_loads_nothing_heavy_and_prints_nothing() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import sae_kernels; "
        f"loaded = set({HEAVY!r}) & (set(sys.modules) - before); "
        "assert not loaded, loaded; assert 'sae_kernels._C' not in sys.modules; "
        "assert not torch.cuda.is_initialized()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
