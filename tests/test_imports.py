"""Who may import whom: no circle of files, rooms that point one way, and a light front door."""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import sae_kernels
from sae_kernels.nn import architectures

ROOT = Path(sae_kernels.__file__).parent
# The rooms from the lowest up: a file imports from its own room and from lower ones. Rooms of one
# line do not import each other.
ROOMS = (
    {"_C", "_version"},
    {"errors", "gpu", "machine"},
    {"io"},
    {"config"},
    {"backends"},
    {"primitives"},
    {"codes"},
    {"functional"},
    {"nn"},
    {"formats", "step"},
    {"data", "plotting", "runs", "testing"},
    {"distributed", "harvest", "integrations"},
    {"training"},
    {"interventions", "report"},
    {"analyze", "bench", "demo"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
FRONT_DOOR = Path("__init__.py")


def dotted(path: Path) -> str:
    """sae_kernels.a.b for a/b.py and for a/b/__init__.py."""
    parts = path.with_suffix("").parts
    return ".".join(("sae_kernels", *(parts[:-1] if parts[-1] == "__init__" else parts)))


FILES = {dotted(path): path for path in MODULES}


def room(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def runtime_nodes(tree: ast.AST) -> list[ast.AST]:
    """All nodes, those in functions too, but for what stands under ``if TYPE_CHECKING:``."""
    nodes = []
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            nodes += [n for part in child.orelse for n in (part, *runtime_nodes(part))]
        else:
            nodes += [child, *runtime_nodes(child)]
    return nodes


def imports_of(source: str, path: Path) -> set[str]:
    """The dotted names of all modules, or of their members, that a file imports when it runs."""
    found: set[str] = set()
    for node in runtime_nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            # The package's own name imports its version alone; what is taken from it counts.
            found |= {alias.name for alias in node.names} - {"sae_kernels"}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "sae_kernels":
            found |= set() if node.attr.startswith("__") else {f"sae_kernels.{node.attr}"}
        elif isinstance(node, ast.ImportFrom):
            above = ("sae_kernels", *path.parts)[: -node.level] if node.level else ()
            module = ".".join((*above, *filter(None, [node.module])))
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def imports(path: Path) -> set[str]:
    return imports_of((ROOT / path).read_text(), path)


def file_of(name: str) -> Path | None:
    """The file that an imported name is, or stands in; None for what is not of this package.

    A package's ``__init__`` counts where a name is taken from it: that it runs first whenever one
    of its modules is imported does not, or no package could gather its own modules.
    """
    if name == "sae_kernels._C":
        return None  # compiled: it imports nothing
    return FILES.get(name, FILES.get(name.rpartition(".")[0]))


@functools.cache
def graph() -> dict[Path, set[Path]]:
    """Each file with the files that it imports."""
    edges = {path: {file_of(name) for name in imports(path)} for path in MODULES}
    return {path: {file for file in files if file is not None} for path, files in edges.items()}


def inside(path: Path) -> set[str]:
    """What a file imports of this package, without the leading name."""
    prefix = "sae_kernels."
    return {name.removeprefix(prefix) for name in imports(path) if name.startswith(prefix)}


def test_no_circle_of_files() -> None:
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        circle = " imports ".join(map(str, reversed(error.args[1])))
        pytest.fail(f"a circle: {circle}")


@pytest.mark.parametrize("path", [p for p in MODULES if p != FRONT_DOOR], ids=str)
def test_rooms_point_one_way(path: Path) -> None:
    own = room(path)
    assert own in RANK, f"{own} has no place among the rooms: add it to ROOMS and to docs"
    for file in graph()[path]:
        assert file != FRONT_DOOR, f"{path} imports the front door, which imports everything"
        other = room(file)
        assert other == own or RANK[other] < RANK[own], (
            f"{path} imports {file} of a room that is not below its own"
        )


def test_the_front_door_imports_the_version_alone() -> None:
    assert graph()[FRONT_DOOR] == {Path("_version.py")}


def test_the_walk_sees_imports() -> None:
    # Guards the tests here against passing because nothing is found.
    assert Path("primitives/checks.py") in graph()[Path("functional/encode.py")]
    assert "_C" in inside(Path("backends/cpu.py"))
    assert "primitives.terms.Term" not in inside(Path("backends/cpu.py")), "for type checkers only"
    assert Path("nn/pretrained.py") in graph()[Path("nn/upkeep.py")], "in a function"
    source = "from . import b\nfrom ..nn.topk import T\ndef f():\n    from .c import d, e\n"
    source += "if TYPE_CHECKING:\n    import x\nelse:\n    import y\n"
    source += "import sae_kernels\nprint(sae_kernels.__file__, sae_kernels.train)\n"
    package = "sae_kernels"
    ours = ("step.b", "nn.topk.T", "step.c.d", "step.c.e", "train")
    expected = {f"{package}.{name}" for name in ours} | {"y"}
    assert imports_of(source, Path("step/a.py")) == expected
    assert imports_of("from . import b", Path("step/__init__.py")) == {f"{package}.step.b"}
    assert file_of("sae_kernels.step.FusedStep") == Path("step/__init__.py")
    assert file_of("sae_kernels.step.fused_step") == Path("step/fused_step.py")
    assert file_of("torch.nn") is None


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


def test_processes_talk_in_one_room_alone() -> None:
    for path in MODULES:
        if room(path) != "distributed":
            found = [name for name in imports(path) if name.startswith("torch.distributed")]
            assert not found, f"{path} imports {found}: exchanges belong to distributed/"


def test_every_primitive_has_a_contract_and_a_reference() -> None:
    folders = {p.parts[1] for p in MODULES if p.parts[0] == "primitives" and len(p.parts) == 3}
    assert len(folders) >= 8
    for folder in folders:
        for name in ("__init__.py", "reference.py", "cpu.py"):
            assert Path("primitives", folder, name) in MODULES, f"{folder} has no {name}"


HEAVY = ("triton", "cupy", "transformers", "matplotlib", "rich", "typer", "safetensors", "scipy")


def run_python(code: str) -> str:
    """What a fresh interpreter prints; a warning or anything on standard error fails."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_importing_loads_nothing_heavy_and_prints_nothing() -> None:
    code = (
        "import sys, sae_kernels; assert 'torch' not in sys.modules; "
        "ours = {n for n in sys.modules if n.startswith('sae_kernels.')}; "
        "assert ours == {'sae_kernels._version'}, ours; "
        f"heavy = set({HEAVY!r}) & set(sys.modules); assert not heavy, heavy"
    )
    assert run_python(code) == ""


def test_what_most_work_needs_loads_nothing_heavy() -> None:
    code = (
        "import torch, sys; before = set(sys.modules); import sae_kernels as sk; "
        "sk.TopKSAE, sk.FusedStep, sk.encode_topk, sk.decode, sk.SparseCodes, sk.use_backend; "
        f"loaded = set({HEAVY!r}) & (set(sys.modules) - before); assert not loaded, loaded; "
        "assert 'sae_kernels._C' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    assert run_python(code) == ""


def test_a_step_needs_few_modules_and_runs_few_files() -> None:
    """Whoever reads a TopK step opens ten files; primitives and backends are rooms of their own."""
    code = """
import sys
import torch
from sae_kernels.step import FusedStep
loaded = [name for name in sys.modules if name.startswith("sae_kernels")]
from sae_kernels.nn import TopKSAE
step, x, ran = FusedStep(TopKSAE(16, 64, k=4)), torch.randn(32, 16), set()
step(x, lr=1e-3)
def trace(frame, event, argument):
    ran.add(frame.f_code.co_filename)
    return trace
sys.settrace(trace)
step(x, lr=1e-3)
sys.settrace(None)
own = [f.split("/sae_kernels/")[1] for f in ran if "/sae_kernels/" in f]
print(len(loaded), *sorted(f for f in own if not f.startswith(("primitives/", "backends/"))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    loaded, *files = done.stdout.split()
    assert int(loaded) <= 71, done.stderr
    assert {"step/fused_step.py", "nn/topk.py"} < set(files)
    assert len(files) <= 10, files


def test_importing_takes_no_time() -> None:
    # 9 ms of processor time on a Zen 5; 1 ms after torch, which has imported most of it already.
    code = (
        "import time; start = time.process_time(); import sae_kernels; "
        "print(time.process_time() - start)"
    )
    seconds = sorted(float(run_python(code)) for _ in range(5))
    assert seconds[2] < 0.05, seconds


def test_the_front_door_has_everything_it_names() -> None:
    code = (
        "import sae_kernels as sk, types\n"
        "for name in reversed(sk.__all__):\n"
        "    assert name in dir(sk)\n"
        "    getattr(sk, name)\n"
        "modules = [n for n in sk.__all__ if isinstance(getattr(sk, n), types.ModuleType)]\n"
        "others = set(sk.__all__) - {'__version__', *modules}\n"
        "assert all(callable(getattr(sk, name)) for name in others)\n"
        "assert sk.train is sk.training.train and sk.load is sk.formats.load\n"
        "assert sk.evaluate is sk.training.evaluate and sk.decode is sk.functional.decode\n"
        "print(*modules)\n"
    )
    packages = {p.parts[0] for p in MODULES if len(p.parts) > 1} - {"cli", "demo"}
    assert run_python(code).split() == sorted(packages | {"codes", "errors"})


def test_no_module_bears_the_name_of_what_is_offered() -> None:
    """Importing it would put it in the place of the function."""
    modules = {*sae_kernels._OFFERED}
    taken = {name for name in sae_kernels.__all__ if f"sae_kernels.{name}" in FILES}
    assert taken == modules


def test_the_front_door_tells_type_checkers_the_same() -> None:
    tree = ast.parse((ROOT / FRONT_DOOR).read_text())
    (block,) = (n for n in tree.body if isinstance(n, ast.If))
    names = {a.asname for n in ast.walk(block) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert names | {"__version__"} == set(sae_kernels.__all__)


def test_a_name_that_the_front_door_does_not_have() -> None:
    with pytest.raises(AttributeError, match="module 'sae_kernels' has no attribute 'TopK'"):
        _ = sae_kernels.TopK
    assert not hasattr(sae_kernels, "numpy")


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parts[0] not in ("nn", "formats")], ids=str
)
def test_nothing_outside_asks_which_architecture_it_has(path: Path) -> None:
    """It would not know one that somebody registers."""
    kinds = [(sae, sae.config_class, sae.objective_class) for sae in architectures().values()]
    named = {each.__name__ for kind in kinds for each in kind} - {"ObjectiveConfig"}
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance":
            asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
            assert not asked & named, f"{path}:{node.lineno} asks for {asked & named}"
