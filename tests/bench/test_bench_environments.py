"""The peers' environments: what counts as there, and how making one fails. Without network."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sae_kernels.bench import environments
from sae_kernels.bench.environments import PEERS, EnvironmentSetupError
from sae_kernels.errors import SaeKernelsError

MARKER = "installed.txt"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and requirement files that one can change."""
    pins = tmp_path / "pins"
    pins.mkdir()
    for path in environments.REQUIREMENTS.iterdir():
        (pins / path.name).write_text(path.read_text())
    monkeypatch.setattr(environments, "REQUIREMENTS", pins)
    monkeypatch.setenv("SAE_KERNELS_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pretend(name: str) -> Path:
    """A folder that looks like a complete environment made from the present pins."""
    where = environments.folder(name)
    (where / "bin").mkdir(parents=True)
    (where / "pyvenv.cfg").write_text("home = nowhere\n")
    (where / "bin" / "python").symlink_to(sys.executable)
    (where / MARKER).write_text(environments._pins(name))
    return where


def require(name: str, line: str) -> None:
    """Makes this the only requirement of a peer."""
    for path in environments.REQUIREMENTS.glob(f"{name}.*"):
        path.unlink()
    (environments.REQUIREMENTS / f"{name}.txt").write_text(f"{line}\n")


def test_the_pins_are_those_it_reports() -> None:
    for name, pin in PEERS.items():
        lines = environments._pins(name).splitlines()
        assert pin in lines
        assert any(line.startswith("torch==") for line in lines)


def test_the_folder_follows_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SAE_KERNELS_CACHE_DIR", str(tmp_path / "a"))
    assert environments.folder("sparsify") == tmp_path / "a" / "peers" / "sparsify"
    monkeypatch.delenv("SAE_KERNELS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert environments.folder("sparsify") == tmp_path / "b" / "sae-kernels" / "peers" / "sparsify"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert environments.folder("sparsify").is_relative_to(tmp_path / ".cache" / "sae-kernels")


@pytest.mark.parametrize("name", PEERS)
def test_what_is_not_there_has_no_interpreter(name: str, cache: Path) -> None:
    if environments.find_spec(name) is not None:
        pytest.skip(f"{name} is installed beside the tests")
    assert environments.python_of(name) is None


def test_a_complete_environment_counts(cache: Path) -> None:
    where = pretend("sae_lens")
    assert environments.python_of("sae_lens") == where / "bin" / "python"
    said: list[str] = []
    environments.setup(["sae_lens"], said.append)  # there is no network: it must do nothing
    assert len(said) == 1
    assert str(where) in said[0]


def test_without_its_marker_it_does_not_count(cache: Path) -> None:
    where = pretend("sae_lens")
    (where / MARKER).unlink()
    assert environments.python_of("sae_lens") != where / "bin" / "python"


def test_made_from_other_pins_it_does_not_count(cache: Path) -> None:
    where = pretend("dictionary_learning")
    second = environments.REQUIREMENTS / "dictionary_learning.no-deps.txt"
    second.write_text(second.read_text() + "another==1.0\n")
    assert environments.python_of("dictionary_learning") != where / "bin" / "python"


def test_a_package_beside_this_one_counts(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sparsify").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "sparsify", raising=False)
    assert environments.python_of("sparsify") is None, "a mere folder is no package"
    (tmp_path / "sparsify" / "__init__.py").touch()
    assert environments.python_of("sparsify") == Path(sys.executable)


def test_an_unknown_name_makes_nothing(cache: Path) -> None:
    for call in (
        lambda: environments.folder("saelens"),
        lambda: environments.python_of("saelens"),
        lambda: environments.setup(["sparsify", "saelens"], pytest.fail),
    ):
        with pytest.raises(ValueError, match="no peer 'saelens'; did you mean 'sae_lens'"):
            call()
    assert not cache.exists()


@pytest.mark.full
def test_what_pip_cannot_install_is_one_line(cache: Path) -> None:
    require("sparsify", "./nowhere/at-all")
    with pytest.raises(EnvironmentSetupError) as caught:
        environments.setup(["sparsify"], lambda _: None)
    message = str(caught.value)
    assert isinstance(caught.value, SaeKernelsError)
    assert message.startswith("sparsify: ")
    assert "nowhere/at-all" in message
    assert "\n" not in message
    assert environments.python_of("sparsify") is None


@pytest.mark.full
def test_what_cannot_be_imported_is_one_line(cache: Path) -> None:
    require("sparsify", "# nothing")
    with pytest.raises(EnvironmentSetupError, match="ModuleNotFoundError: No module named 'torch'"):
        environments.setup(["sparsify"], lambda _: None)
    assert environments.python_of("sparsify") is None


def test_an_interrupted_setup_is_begun_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = environments.folder("sparsify")

    def interrupted(name: str, *command: str) -> str:
        if "venv" not in command:
            raise KeyboardInterrupt
        where.mkdir()
        (where / "pyvenv.cfg").touch()
        return ""

    monkeypatch.setattr(environments, "_run", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            environments.setup(["sparsify"], lambda _: None)
        assert environments.python_of("sparsify") is None
        assert [path.name for path in where.iterdir()] == ["pyvenv.cfg"]
        (where / "left over").touch()


def test_a_strangers_folder_is_left_alone(cache: Path) -> None:
    where = environments.folder("sparsify")
    where.mkdir(parents=True)
    (where / "thesis.tex").touch()
    with pytest.raises(EnvironmentSetupError, match="expected an environment of ours"):
        environments.setup(["sparsify"], lambda _: None)
    assert (where / "thesis.tex").exists()


def test_the_extras_are_the_same_pins() -> None:
    project = Path(environments.__file__).parents[2] / "pyproject.toml"
    if not project.exists():
        pytest.skip("not a source tree")
    text = project.read_text()
    for pin in PEERS.values():
        assert f'["{pin}"]' in text
