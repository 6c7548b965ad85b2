"""The routes to the CUDA kernels: which is taken, and what is said where there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.backends import cuda

if TYPE_CHECKING:
    from pathlib import Path

NO_MODULE = """
import sys
sys.modules["sae_kernels._C"] = None
if "cupy" in sys.argv: sys.modules["cupy"] = None
from sae_kernels.backends import cuda
print(cuda.route())
"""


@pytest.fixture
def module() -> Any:
    """The compiled module, if it holds CUDA kernels."""
    compiled = pytest.importorskip("sae_kernels._C")
    if not hasattr(compiled, "cuda_launch"):
        pytest.skip("sae_kernels._C was built without nvcc")
    return compiled


def test_tensors_elsewhere_and_other_dtypes_are_refused() -> None:
    reason = cuda.reason(torch.device("cpu"), torch.float32)
    assert reason == "tensors are on cpu, its kernels run on NVIDIA GPUs"
    reason = cuda.reason(torch.device("cuda"), torch.float64)
    assert reason == "no kernel for torch.float64, only for float32, bfloat16 and float16"
    if not torch.cuda.is_available():
        assert "not an NVIDIA GPU" in str(cuda.reason(torch.device("cuda"), torch.float32))


def test_kernels_of_the_module_come_first(module: Any) -> None:
    assert cuda.route() == f"ahead of time ({module.build_info()['cuda_archs']})"


@pytest.mark.full
def test_without_a_route_each_is_told_its_remedy() -> None:
    # A None in sys.modules makes any import of the name fail.
    done = subprocess.run(
        [sys.executable, "-c", NO_MODULE, "cupy"], capture_output=True, text=True, check=True
    )
    assert "sae_kernels._C cannot be loaded" in done.stdout
    assert "`pip install .`; CuPy" in done.stdout
    assert "`pip install cupy-cuda13x`" in done.stdout


@pytest.mark.full
def test_without_the_module_cupy_is_the_route() -> None:
    cupy = pytest.importorskip("cupy")
    done = subprocess.run(
        [sys.executable, "-c", NO_MODULE], capture_output=True, text=True, check=True
    )
    found = f"NVRTC by CuPy {cupy.__version__}\n"
    assert done.stdout == found or "CuPy cannot compile them" in done.stdout


def test_a_launch_names_what_is_wrong(module: Any) -> None:
    with pytest.raises(RuntimeError, match="there is no CUDA kernel 'select'"):
        module.cuda_launch("select", 0, 1, 32, 0, 0, [])
    with pytest.raises(RuntimeError, match="transpose_sum: expected 3 arguments, got 1"):
        module.cuda_launch("transpose_sum", 0, 1, 32, 0, 0, [0])
    if torch.cuda.is_available():
        return
    wanted = r"(?s)transpose_sum on device 0 cannot be launched: cuda\w+: .*: (install|update)"
    with pytest.raises(RuntimeError, match=wanted):
        module.cuda_launch("transpose_sum", 0, 1, 32, 0, 0, [0, 0, 0])
    assert module.cuda_reason(0).startswith("cuda")


def test_importing_the_module_needs_neither_driver_nor_runtime(module: Any) -> None:
    if shutil.which("ldd") is None:
        pytest.skip("no ldd")
    needed = subprocess.run(["ldd", module.__file__], capture_output=True, text=True, check=True)
    assert "libcuda" not in needed.stdout


def test_a_launch_without_a_route_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_route", lambda device: "no way")
    with pytest.raises(RuntimeError, match="transpose_sum cannot run: no way"):
        cuda.launch("transpose_sum", 1, 32, 0, torch.zeros(1), 3, None)


def test_pointers_sizes_and_nothing_become_words(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    route = cuda.Route("listening", lambda *launched: seen.append(launched))
    monkeypatch.setattr(cuda, "_route", lambda device: route)
    rows = torch.arange(6.0)
    cuda.launch("a_kernel", 2, 64, 96, rows[2:], None, 2**40)
    assert seen == [("a_kernel", None, 2, 64, 96, [rows.data_ptr() + 8, 0, 2**40])]


def test_a_changed_header_is_another_source_for_cupy(tmp_path: Path) -> None:
    folder = cuda.sources()
    assert folder is not None
    shutil.copytree(folder, tmp_path / "cuda")
    before = cuda.translation_unit(tmp_path / "cuda")
    assert before == cuda.translation_unit(folder)
    for path in folder.glob("*.cu"):
        assert f'#include "{path.name}"' in before
    header = tmp_path / "cuda" / "device.cuh"
    header.write_text(header.read_text() + "\n")
    after = cuda.translation_unit(tmp_path / "cuda")
    assert after != before
    assert after.splitlines()[1:] == before.splitlines()[1:]
