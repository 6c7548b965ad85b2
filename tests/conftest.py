"""What all tests share: seeds, poisoned memory, thread counts and the kernels' variants.

A test of kernels takes the fixture ``backend``. Which backends that are depends on how pytest is
started, for one process can hold one of these only:

- plainly: the reference and every ISA variant of the host kernels;
- ``TRITON_INTERPRET=1``: the Triton kernels, in Triton's interpreter on CPU tensors;
- ``--emulate sm_80`` or ``sm_90``: all GPU kernels, compiled for that GPU, emulated on CPU tensors;
- ``SAE_TEST_DEVICE=cuda``: the reference and all GPU kernels, every tensor on the GPU.

All but the first leave out tests without that fixture: nothing would differ from the plain run.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

# Two test processes share the cores: threads that spin while they wait would take them from the
# other. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import interpreter
import pytest
import tiers
import torch
from emulator import cuda_kernels, library, triton_driver

from sae_kernels import backends, gpu
from sae_kernels.backends import cpu

if TYPE_CHECKING:
    from collections.abc import Iterator

ISAS = cpu.supported_isas()
DEVICE = torch.device(os.environ.get("SAE_TEST_DEVICE", "cpu"))
if DEVICE.type != "cpu":
    # What torch asks for before it calls cuBLAS repeatable, which poisoned memory turns on.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_default_device(DEVICE)
if gpu.interpreted():
    interpreter.round_alike()

# CI must not fail by chance: the same examples every time. A nightly run may ask for "random".
# The fixtures a property uses here only set the environment, which examples may well share.
_SHARED = hypothesis.HealthCheck.function_scoped_fixture
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=150, suppress_health_check=[_SHARED]
)
hypothesis.settings.register_profile(
    "random", deadline=None, max_examples=400, print_blob=True, suppress_health_check=[_SHARED]
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


_emulation = contextlib.ExitStack()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that runs GPU kernels in the emulator."""
    parser.addoption(
        "--emulate",
        choices=sorted(triton_driver.ARCHITECTURES),
        help="run the tests of kernels with the GPU kernels, compiled for this architecture and "
        "emulated (see docs/gpu.md)",
    )


def is_plain(config: pytest.Config) -> bool:
    """Whether the host's kernels are tested."""
    return DEVICE.type == "cpu" and not gpu.interpreted() and not config.option.emulate


def pytest_unconfigure() -> None:
    """Ends the emulation."""
    _emulation.close()


def pytest_configure(config: pytest.Config) -> None:
    """Runs tests that are named whatever their tier, and lets Ctrl-C end what a test starts."""
    if config.option.markexpr == tiers.FAST and all("::" in name for name in config.args):
        config.option.markexpr = ""
    emulate = config.option.emulate
    if emulate and library.unavailable() is None:
        architecture = triton_driver.ARCHITECTURES[emulate]
        _emulation.enter_context(triton_driver.emulated(architecture))
        if cuda_kernels.unavailable() is None:
            _emulation.enter_context(cuda_kernels.emulated(architecture))
    # A shell's background job ignores Ctrl-C, and so would every process that a test starts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process a core, up to four; none beside this one where files or tests are named."""
    named = all(Path(argument.partition("::")[0]).is_file() for argument in config.args)
    return 0 if named else min(4, os.cpu_count() or 1)


def pytest_report_header(config: pytest.Config) -> str:
    """Names the variants that the parametrized tests cover on this machine."""
    where = "Triton's interpreter" if gpu.interpreted() else str(DEVICE)
    if config.option.emulate:
        missing = library.unavailable() or cuda_kernels.unavailable()
        where = f"an emulated {config.option.emulate}" + (f" ({missing})" if missing else "")
    return f"sae_kernels on {where}; ISA variants {', '.join(ISAS)}; torch {torch.__version__}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fills what torch.empty returns with NaN and the largest integers.

    Outputs and workspaces are allocated by torch, so a kernel that reads what it has not written
    gives itself away.
    """
    # The oracles use operators of torch that are not repeatable on a GPU, where they may only warn.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE.type != "cpu")
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Forces each ISA variant of the host kernels that this machine runs."""
    monkeypatch.setenv(cpu.ISA_VARIABLE, request.param)
    name: str = request.param
    return name


def backends_for(primitives: tuple[str, ...], config: pytest.Config) -> list[str]:
    """The backends that this process can test and that implement all of these primitives."""
    if is_plain(config):
        return ["reference", *(f"cpu-{isa}" for isa in ISAS)]
    names = backends.NAMES if DEVICE.type == "cuda" else ("triton",)
    if config.option.emulate:
        gpus = ("cuda", "triton", "gluon")
        names = tuple(n for n in gpus if all(backends._written(p, n) for p in primitives))
    dtype = torch.bfloat16  # the one that all GPU backends take
    return [
        name
        for name in names
        if not_emulated(name, config)  # whose tests are skipped with that reason
        or all(dict(backends.candidates(p, DEVICE, dtype))[name] is None for p in primitives)
    ]


def not_emulated(backend: str, config: pytest.Config) -> str | None:
    """The reason why a backend that was asked for cannot be emulated, or None."""
    if not config.option.emulate:
        return None
    return library.unavailable() or (cuda_kernels.unavailable() if backend == "cuda" else None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Runs a test that takes ``backend`` once on each that implements its module's PRIMITIVES."""
    if "backend" in metafunc.fixturenames:
        primitives = getattr(metafunc.module, "PRIMITIVES", ("select_topk",))
        metafunc.parametrize("backend", backends_for(primitives, metafunc.config), indirect=True)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts the cases into tiers, and leaves out, on other kernels than the host's, other tests."""
    if not is_plain(config):
        kept = [item for item in items if "backend" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    for item in items if config.option.emulate else ():
        reason = not_emulated(item.callspec.params["backend"], config)  # type: ignore[attr-defined]
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
    tiers.mark(items)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend by name, the host kernels once per ISA variant."""
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv(cpu.ISA_VARIABLE, isa)
    return str(name)


@pytest.fixture(params=["reference", "cpu"])
def either_backend(request: pytest.FixtureRequest) -> str:
    """Every backend once, in the fastest variant, where what is tested lies above the kernels."""
    return str(request.param)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """Puts torch's number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(restore_threads: None) -> None:
    """One thread: small inputs spend their time on waking others, above all on a busy machine."""
    torch.set_num_threads(1)
