"""What the compilers make of the CUDA kernels, for GPUs that are not there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, NamedTuple

import pytest

from sae_kernels import gpu
from sae_kernels.backends import cuda
from sae_kernels.primitives.select_topk import cuda as tiles
from sae_kernels.primitives.transpose_codes import cuda as sort

if TYPE_CHECKING:
    from pathlib import Path

FOLDER = cuda.sources()
assert FOLDER is not None
NAMES = re.findall(r"SAE_CUDA_KERNEL\((\w+)\)", (FOLDER / "kernels.h").read_text())
ARCHITECTURES = ("80", "90a", "100")
SHARED_LIMIT = {"80": 163 << 10, "90a": 227 << 10, "100": 227 << 10}  # bytes of a block
REGISTERS = 65536  # of a multiprocessor
MOST_THREADS = {"select": 512, "transpose": sort._THREADS}
MOST_CANDIDATES = gpu.next_power_of_two(2 * tiles._MOST_KEPT)
DYNAMIC = {"select_tile": 8 * MOST_CANDIDATES, "select_tile_scaled": 12 * MOST_CANDIDATES}


class Usage(NamedTuple):
    """What a kernel takes, by ptxas."""

    stack: int
    spilled: int
    registers: int
    shared: int


@pytest.fixture(scope="module")
def nvcc() -> str:
    """The compiler."""
    found = shutil.which("nvcc")
    if found is None:
        pytest.skip("no nvcc in the PATH")
    return found


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kernels as one source."""
    path = tmp_path_factory.mktemp("unit") / "kernels.cu"
    path.write_text(cuda.translation_unit(FOLDER))
    return path


def compile_for(nvcc: str, unit: Path, architecture: str) -> dict[str, Usage]:
    """Compiles, with warnings as errors, and reads what ptxas says of each kernel."""
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags = ("-std=c++17", "-Werror", "all-warnings", "-Xptxas", "-v", "-cubin", f"-I{FOLDER}")
    out = str(unit.with_suffix(f".{architecture}"))
    done = subprocess.run(
        [nvcc, *flags, target, str(unit), "-o", out], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    usage = {}
    for part in (done.stdout + done.stderr).split("Compiling entry function ")[1:]:
        match = re.search(r"'(\w+)'", part)
        assert match is not None
        usage[match[1]] = Usage(
            *(
                sum(map(int, re.findall(pattern, part)))
                for pattern in (
                    r"(\d+) bytes stack",
                    r"(\d+) bytes spill",
                    r"(\d+) registers",
                    r"(\d+) bytes smem",
                )
            )
        )
    return usage


@pytest.mark.sampled(1)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_and_each_fits_a_multiprocessor(
    nvcc: str, unit: Path, architecture: str
) -> None:
    usage = compile_for(nvcc, unit, architecture)
    assert sorted(usage) == sorted(NAMES)
    for name, kernel in usage.items():
        assert (kernel.stack, kernel.spilled) == (0, 0), name
        assert 0 < kernel.registers * MOST_THREADS[name.split("_")[0]] <= REGISTERS, name
        assert kernel.shared + DYNAMIC.get(name, 0) <= SHARED_LIMIT[architecture], name
    # Four blocks of 256 threads: enough warps to cover the latency of reading codes.
    assert usage["transpose_move"].registers <= REGISTERS // (4 * sort._THREADS)
    # Six blocks of 128 threads, with a row each.
    assert usage["select_tile"].registers <= REGISTERS // (6 * 128)


@pytest.mark.full
def test_scores_are_read_16_bytes_at_a_time(nvcc: str, unit: Path) -> None:
    out = unit.with_suffix(".ptx")
    flags = ("-std=c++17", "-arch=compute_90", "-ptx", f"-I{FOLDER}")
    subprocess.run([nvcc, *flags, str(unit), "-o", str(out)], check=True)
    ptx = out.read_text()
    body = ptx[ptx.index(".entry select_tile(") :].split(".entry", 2)[1]
    # The scores and the bias of a round, 16 of each.
    assert len(re.findall(r"ld\.global(?:\.nc)?\.v4\.(?:f32|b32|u32)", body)) == 2 * 16 // 4


# In a process of its own: what other tests have loaded (other compilers) made NVRTC crash once.
NVRTC = """
import sys
from cupy.cuda import nvrtc
from sae_kernels.backends import cuda
architecture, folder, out = sys.argv[1:]
try:
    nvrtc.getVersion()
except RuntimeError as error:
    sys.exit(f"CuPy finds no NVRTC: {error}")
source = cuda.translation_unit(cuda.sources())
# -ftz=true is what CuPy adds to all code.
options = ("-std=c++17", f"-I{folder}", "-ftz=true")
made = []
for kind in ("sm", "compute"):
    made.append(nvrtc.createProgram(source, "kernels.cu", (), ()))
    nvrtc.compileProgram(made[-1], (*options, f"-arch={kind}_{architecture}"))
assert len(nvrtc.getCUBIN(made[0])) > 0
ptx = nvrtc.getPTX(made[1])
open(out, "wb").write(ptx if isinstance(ptx, bytes) else ptx.encode())
"""


@pytest.mark.full
@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_nvrtc_compiles_the_same_sources_and_flushes_nothing(
    architecture: str, tmp_path: Path
) -> None:
    pytest.importorskip("cupy", reason="CuPy is not installed")
    command = [sys.executable, "-c", NVRTC, architecture, str(FOLDER), str(tmp_path / "ptx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "CuPy finds no NVRTC" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    ptx = (tmp_path / "ptx").read_text()
    assert sorted(re.findall(r"\.entry (\w+)", ptx)) == sorted(NAMES)
    # Comparisons may flush: they only let more scores through to their keys, which are integers.
    flushing = set(re.findall(r"[a-z][\w.]*\.ftz[\w.]*", ptx))
    assert {name.split(".")[0] for name in flushing} <= {"setp"}, flushing
    assert "add.rn.f32" in ptx
