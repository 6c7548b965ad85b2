"""The handle of accelerate(): one installation a library, taken back whole; errors in one sentence.

The library here is a toy with an adapter of its own: what is tested is what all adapters share.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import types
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sae_kernels as sk
from sae_kernels import integrations
from sae_kernels.errors import AccelerationError
from sae_kernels.integrations.adapters import Adapter, Installation, fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator

LIBRARIES = [
    name
    for name in integrations._LIBRARIES
    if importlib.util.find_spec(f"sae_kernels.integrations.{name}")
]
SOURCE = '''
import torch

class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2, 3))

    def forward(self, x):
        """As shipped."""
        return "shipped"  # a comment

class Trainer:
    def __init__(self):
        self.module = Module()
        self.optimizer = torch.optim.Adam(self.module.parameters())
'''


def install(installation: Installation) -> None:
    toy: Any = sys.modules["toy"]

    def make(original: Any) -> Any:
        def forward(self: Any, x: Any) -> Any:
            if not installation.covers(self):
                return original(self, x)
            if x == "no":
                installation.ledger.left("forward", "it said no")
                return original(self, x)
            installation.ledger.took("forward")
            return "fast"

        return forward

    installation.patches.replace(toy.Module, "forward", make)
    if installation.level == "trainer":
        installation.patches.replace(toy.Trainer, "step", lambda original: lambda self: "fast")


def modules_of(target: Any) -> list[Any]:
    found = target if isinstance(target, torch.nn.Module) else getattr(target, "module", None)
    return [] if found is None else [found]


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[Any]:
    (tmp_path / "toy.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    library = importlib.import_module("toy")
    library.Trainer.step = lambda self: "shipped"
    adapter = Adapter(
        distribution="torch",  # one that is installed wherever this runs
        tested=(metadata.version("torch"),),
        oldest="1",
        below="100",
        levels=("module", "trainer"),
        seams={"toy:Module.forward": str(fingerprint("toy:Module.forward"))},
        install=install,
        modules_of=modules_of,
        optimizers_of=lambda target: [target.optimizer] if hasattr(target, "optimizer") else [],
    )
    room: Any = types.ModuleType("sae_kernels.integrations.toy")
    room.ADAPTER = adapter
    monkeypatch.setitem(sys.modules, room.__name__, room)
    monkeypatch.setattr(integrations, "_LIBRARIES", ("toy",))
    before = dict(vars(library.Module))
    yield library
    assert dict(vars(library.Module)) == before, "a test left a patch"
    assert integrations._installed == {}
    monkeypatch.delitem(sys.modules, "toy")


def replace_adapter(**changes: Any) -> None:
    import dataclasses

    room: Any = sys.modules["sae_kernels.integrations.toy"]
    room.ADAPTER = dataclasses.replace(room.ADAPTER, **changes)


def test_a_library_is_accelerated_and_taken_back(toy: Any) -> None:
    module, trainer = toy.Module(), toy.Trainer()
    run = sk.accelerate("toy")
    assert (run.library, run.level) == ("toy", "trainer")
    assert (module("yes"), module("no"), trainer.step()) == ("fast", "shipped", "fast")
    report = run.report()
    assert report.taken == {"forward": 1}
    assert [(one.what, one.why, one.count) for one in report.left] == [("forward", "it said no", 1)]
    assert report.version == metadata.version("torch")
    run.undo()
    run.undo()
    assert (module("yes"), trainer.step()) == ("shipped", "shipped")
    assert run.report() == report, "it can be read afterwards"


def test_a_block_takes_itself_back_after_an_error_too(toy: Any) -> None:
    module = toy.Module()
    with pytest.raises(KeyError), sk.accelerate("toy", level="module") as run:
        {}[module("yes")]
    assert (module("yes"), run.report().taken) == ("shipped", {"forward": 1})
    with pytest.raises(AccelerationError, match="it said no"), sk.accelerate("toy", strict=True):
        module("no")
    assert module("yes") == "shipped"


def test_twice_is_one(toy: Any) -> None:
    module = toy.Module()
    with sk.accelerate("toy") as outer:
        inner = sk.accelerate("toy")
        assert module("yes") == "fast"
        assert outer.report().taken == inner.report().taken == {"forward": 1}
        inner.undo()
        assert module("yes") == "fast", "the outer one holds"
        later = sk.accelerate("toy")
    assert module("yes") == "fast", "in any order"
    later.undo()
    assert module("yes") == "shipped"
    with sk.accelerate("toy") as again:
        assert again.report().taken == {}, "a new count"


def test_twice_with_other_options_is_refused(toy: Any) -> None:
    with sk.accelerate("toy", level="module"):
        with pytest.raises(AccelerationError, match="toy is accelerated already, with"):
            sk.accelerate("toy", level="trainer")
        with pytest.raises(AccelerationError, match="undo the other handle first"):
            sk.accelerate("toy", level="module", strict=True)
    sk.accelerate("toy", level="trainer").undo()


def test_one_trainer_or_module_alone(toy: Any) -> None:
    trainer, module, other = toy.Trainer(), toy.Module(), toy.Module()
    with sk.accelerate(trainer) as run:
        assert trainer.module("yes") == "fast"
        assert other("yes") == "shipped"
        assert run.report().taken == {"forward": 1}
        with sk.accelerate(module):
            assert (module("yes"), trainer.module("yes"), other("yes")) == (
                "fast", "fast", "shipped"
            )  # fmt: skip
        assert module("yes") == "shipped"
        with sk.accelerate("toy"):
            assert other("yes") == "fast"


def test_the_optimizer_of_a_trainer_that_exists(toy: Any) -> None:
    trainer = toy.Trainer()
    with sk.accelerate(trainer, optimizer="fused") as run:
        assert trainer.optimizer.param_groups[0]["fused"]
        assert run.report().taken == {"fused Adam": 1}
    assert not trainer.optimizer.param_groups[0]["fused"]
    trainer.optimizer = torch.optim.SGD(trainer.module.parameters())
    with pytest.raises(AccelerationError, match="type SGD"):
        sk.accelerate(trainer, optimizer="fused", strict=True)


def test_an_installation_that_fails_leaves_nothing(toy: Any) -> None:
    def half(installation: Installation) -> None:
        install(installation)
        raise RuntimeError("half way")

    replace_adapter(install=half)
    with pytest.raises(RuntimeError, match="half way"):
        sk.accelerate("toy")
    assert toy.Module()("yes") == "shipped"


def test_versions_and_code_that_it_does_not_know(toy: Any) -> None:
    installed = metadata.version("torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy.Module, "forward", lambda self, x: "another formula")
        with pytest.raises(AccelerationError, match=r"got another in toy:Module\.forward"):
            sk.accelerate("toy")
        patch.delattr(toy.Module, "forward")
        with pytest.raises(AccelerationError, match=r"got another in toy:Module\.forward"):
            sk.accelerate("toy")
    for limits in ({"oldest": "90"}, {"below": "1.0.1"}):
        room: Any = sys.modules["sae_kernels.integrations.toy"]
        whole = room.ADAPTER
        replace_adapter(**limits)
        with pytest.raises(
            AccelerationError, match=rf"expected a version from .*, got {re.escape(installed)}"
        ):
            sk.accelerate("toy")
        room.ADAPTER = whole
    replace_adapter(distribution="no-such-library-of-saes")
    with pytest.raises(AccelerationError, match="pip install no-such-library-of-saes"):
        sk.accelerate("toy")
    replace_adapter(distribution="torch", levels=("module",))
    with pytest.raises(AccelerationError, match="toy: expected level 'module', got 'trainer'"):
        sk.accelerate("toy", level="trainer")


def test_targets_and_options_that_it_does_not_know(toy: Any) -> None:
    with pytest.raises(AccelerationError, match=r"expected one of its trainers .* got Other"):
        sk.accelerate(type("Other", (), {"__module__": "toy.other"})())
    with pytest.raises(AccelerationError, match="target: expected a trainer or an SAE of toy"):
        sk.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(AccelerationError, match=r"Module: expected weights .* got device meta"):
        sk.accelerate(toy.Module().to("meta"))
    with pytest.raises(ValueError, match="no adapter for 'toi'; did you mean 'toy'"):
        sk.accelerate("toi")
    with pytest.raises(ValueError, match="level: expected 'module', 'trainer' or None, got 'deep'"):
        sk.accelerate("toy", level="deep")
    with pytest.raises(ValueError, match="optimizer: expected 'fused' or None, got 'adam'"):
        sk.accelerate("toy", optimizer="adam")


def test_a_fingerprint_is_of_the_code_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    forms = {
        "same": 'def f(x):\n    """Docs."""\n    # a comment\n    return (x\n            + 1)\n',
        "other": "def f(x):\n    return x + 2\n",
        "words": 'def f(x):\n    return "words"\n',
        "more": 'def f(x):\n    return "more words"\n',
        "base": "def f(x): return (x + 1)\n",
    }
    found = {}
    for name, source in forms.items():
        (tmp_path / f"printed_{name}.py").write_text(source)
        found[name] = fingerprint(f"printed_{name}:f")
    assert found["same"] == found["base"]
    assert len({*found.values()}) == 4


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_that_is_not_there(library: str) -> None:
    try:
        adapter = importlib.import_module(f"sae_kernels.integrations.{library}").ADAPTER
        metadata.version(adapter.distribution)
    except metadata.PackageNotFoundError:
        with pytest.raises(AccelerationError, match=f"pip install {adapter.distribution}"):
            sk.accelerate(library)
    else:
        with sk.accelerate(library) as run:
            assert run.library == library


def test_importing_changes_nothing_and_needs_little() -> None:
    # Environments of other libraries have torch and what they need, not what our commands do.
    absent = "tomli_w", "typer", "rich", "jinja2", "safetensors", "huggingface_hub", "yaml"
    code = f"""
import sys
for name in {absent!r}:
    sys.modules[name] = None
import torch
from torch.optim import optimizer
import sae_kernels as sk
sk.accelerate
from sae_kernels.integrations import lazy_codes, late, sae_lens
assert not optimizer._global_optimizer_pre_hooks
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
